"""One call of an op: its inputs in the kernels' form, and the projected bank chunk by chunk."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from triton.runtime import driver

from ckd._triton import tiles, tuning
from ckd._triton.products import project_kernel
from ckd._triton.rows import unit_rows_kernel
from ckd._triton.tiles import ProductTiles, power_of_two
from ckd.backends.device import Gpu
from ckd.backends.interface import MAX_LOGIT_SCALE, Inputs, Plan
from ckd.backends.precision import float32_products
from ckd.backends.triton.layout import padded, reference_bytes

# Limits on the bytes of a chunk's unit rows and of the arrays computed from them, in whole waves of
# programs (at least one). The forward reads a chunk for every tile of students: with two waves of
# W = 256 its kernel took 4 % longer than with one, the backward 2 % less (H100, 2026-11-27).
FORWARD_BYTES, BACKWARD_BYTES = 24 << 20, 48 << 20
# Bank rows of a program of project_kernel and bank_gradient_kernel in a large problem.
PROGRAM_ROWS = 128
T = TypeVar("T")


class Chunk(NamedTuple):
    """Consecutive rows of the bank, from row `first` on."""

    first: int
    t: Tensor  # [rows, D] as stored
    n: Tensor  # [rows, width] unit rows in the operands' dtype
    inverse: Tensor  # [rows] 1 / |z|


class Call:
    """The inputs in the kernels' form, and the launches that both ops share."""

    def __init__(
        self, gpu: Gpu, inputs: Inputs, plan: Plan, chunk_bytes: int = BACKWARD_BYTES
    ) -> None:
        student, bank, weight, bias, logit_scale = inputs
        self._gpu, self._chunk_bytes = gpu, chunk_bytes
        self.half = allow_half = plan.allow_half
        self.operand = torch.float16 if allow_half else torch.float32
        # A bfloat16 or float32 bank may hold values beyond float16's range.
        self.bank_operand = self.operand
        if allow_half and bank.dtype != torch.float16:
            self.bank_operand = torch.bfloat16
        self.precision = tiles.IEEE
        if not allow_half and torch.version.hip is None:
            self.precision = float32_products("cuda")
        self.arithmetic = tiles.HALF if allow_half else self.precision
        self.student = student if student.stride(1) == 1 else student.contiguous()
        self.bank = bank if bank.stride(1) == 1 else bank.contiguous()
        self.scale = logit_scale.float()
        self.weight_like, self.bias_like = weight, bias
        self.bias = None if bias is None else bias.float().contiguous()
        self.batch, self.student_dim = student.shape
        self.bank_rows, self.teacher_dim = bank.shape
        self.width = padded(self.student_dim)
        self.processors = gpu.processors(student.device)
        self.family = gpu.family or family(student.device)

    def empty(self, *shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.student.device)

    @functools.cached_property
    def weight(self) -> Tensor | None:
        """In the operands' dtype; converted on first use, since a cached projection needs none."""
        weight = self.weight_like
        return None if weight is None else weight.to(self.bank_operand).contiguous()

    @property
    def positive_scale(self) -> Tensor:
        """The scale, or NaN for one that the op refuses."""
        valid = (self.scale > 0) & (self.scale <= MAX_LOGIT_SCALE)
        return torch.where(valid, self.scale, torch.nan)

    def on_device(self) -> AbstractContextManager[Any]:
        return self._gpu.current(self.student.device)

    def choose(
        self,
        kernel: str,
        sizes: tuple[int, ...],
        candidates: Sequence[T],
        launch: Callable[[T], None],
    ) -> T:
        """The fastest tiles of a kernel for the bucket of these sizes (ckd._triton.tuning)."""
        arithmetic = (self.operand, self.bank_operand, self.precision, self.bank.dtype)
        key = (kernel, self.student.device, *arithmetic, *map(tuning.bucket, sizes))
        return tuning.choose(key, candidates, launch)

    def students(self) -> Tensor:
        """The students' unit rows u [B, width]."""
        u = self.empty(self.batch, self.width, dtype=self.operand)
        self._unit_rows(self.student, self.student_dim, u, self.empty(self.batch))
        return u

    @functools.cached_property
    def chunk_rows(self) -> int:
        """Bank rows of a chunk."""
        # A row takes n, and z or its gradient: in half precision where a program holds whole rows.
        second = self.operand.itemsize if self.half and self.width <= 256 else 4
        row = self.width * (self.operand.itemsize + second) + 8
        wave = self.processors * PROGRAM_ROWS  # one program on every processor
        waves = max(1, self._chunk_bytes // (row * wave))
        return min(waves * wave, self.bank_rows, self._gpu.chunk_rows)

    def reference(self, cache: Tensor) -> Tensor | None:
        """[2 B], the start of the cache (see combine_kernel); None without a cache."""
        size = reference_bytes(self.batch)
        return cache[:size].view(torch.float32)[: 2 * self.batch] if len(cache) > 0 else None

    def chunks(self, cache: Tensor | None = None, filled: bool = False) -> Iterator[Chunk]:
        """The bank, projected and normalised. If the cache has room for all of it, chunks are views
        of the cache, and with `filled` they are not computed again."""
        room, count = self._room(cache), self.chunk_rows
        has_cache = room is not None
        n, inverse = room or (
            self.empty(count, self.width, dtype=self.operand),
            self.empty(count),
        )
        for first in range(0, self.bank_rows, self.chunk_rows):
            t = self.bank[first : first + self.chunk_rows]
            at = first if has_cache else 0
            chunk = Chunk(first, t, n[at : at + len(t)], inverse[at : at + len(t)])
            if not (filled and has_cache):
                self._fill(chunk)
            yield chunk

    def cached_bank(self, cache: Tensor) -> Tensor | None:
        """[K, width], the unit rows that `chunks` stores in the cache, or None."""
        room = self._room(cache)
        return room and room[0]

    def _room(self, cache: Tensor | None) -> tuple[Tensor, Tensor] | None:
        cache = None if cache is None else cache[reference_bytes(self.batch) :]
        if cache is None or len(cache) == 0:
            return None
        end = self.bank_rows * self.width * self.operand.itemsize
        n = cache[:end].view(self.operand).view(self.bank_rows, self.width)
        return n, cache[end:].view(torch.float32)

    def _fill(self, chunk: Chunk) -> None:
        count = len(chunk.t)
        if self.weight_like is None:
            self._unit_rows(chunk.t, self.teacher_dim, chunk.n, chunk.inverse)
            return
        aligned = is_aligned(chunk.t)
        candidates = tiles.project_tiles(
            self.width, self.arithmetic, self.family, aligned, self.chunk_rows, self.processors
        )
        fused = candidates[0].columns >= self.width
        z = chunk.n if fused else self.empty(count, self.student_dim)

        def launch(chosen: ProductTiles) -> None:
            grid = (-(-count // chosen.rows), -(-self.width // chosen.columns))
            project_kernel[grid](
                chunk.t, self.weight, self.bias, z, chunk.inverse,
                count, self.teacher_dim, self.student_dim, chunk.t.stride(0), z.shape[1],
                HAS_BIAS=self.bias is not None, FUSED=fused, PRECISION=self.precision,
                BLOCK_ROWS=chosen.rows, BLOCK_WIDTH=chosen.columns, BLOCK_DIM=chosen.sums,
                num_warps=chosen.warps, num_stages=chosen.stages,
            )  # fmt: skip

        sizes = (count, self.teacher_dim, self.width, aligned)
        launch(self.choose("project", sizes, candidates, launch))
        if not fused:
            self._unit_rows(z, self.student_dim, chunk.n, chunk.inverse)

    def _unit_rows(self, x: Tensor, dim: int, unit: Tensor, inverse: Tensor) -> None:
        unit_rows_kernel[(-(-len(x) // 8),)](
            x, unit, inverse, len(x), dim, x.stride(0), self.width, PRECISION=self.precision,
            BLOCK_ROWS=8, BLOCK_WIDTH=min(256, power_of_two(self.width)),
        )  # fmt: skip


def sum_of_parts(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)


def stride(row: Tensor | None) -> int:
    return 0 if row is None else row.stride(0)


def is_aligned(matrix: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes, as vector loads need."""
    size = matrix.element_size()
    return matrix.stride(0) * size % 16 == 0 and matrix.storage_offset() * size % 16 == 0


@functools.cache
def family(device: torch.device) -> str:
    """The family of tiles that fit a GPU's shared memory (ckd._triton.tiles)."""
    properties = driver.active.utils.get_device_properties(device.index)
    shared = properties["max_shared_mem"]
    if torch.version.hip is not None or shared < 163 << 10:
        return tiles.SMALL
    return tiles.HOPPER if shared >= 227 << 10 else tiles.AMPERE
