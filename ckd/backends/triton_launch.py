"""How the triton backend launches its kernels: inputs as they take them, chunks of the bank, tiles.

Imports Triton, so `ckd/backends/triton.py` imports it inside functions.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from ckd._triton import tiles
from ckd._triton.contrastive_ce import combine_kernel, forward_kernel, keep_targets_kernel
from ckd._triton.contrastive_ce_backward import (
    STUDENTS_MULTIPLE,
    bank_gradient_kernel,
    student_factors_kernel,
)
from ckd._triton.products import product_kernel, project_kernel, weight_gradient_kernel
from ckd._triton.rows import (
    bank_norm_backward_kernel,
    half_tiles_kernel,
    student_gradient_kernel,
    unit_rows_kernel,
)
from ckd._triton.similarity import similarity_kernel
from ckd._triton.tiles import ProductTiles, Tiles, power_of_two
from ckd._triton.tuning import bucket, choose
from ckd.backends.interface import Gradients, Needs, Options, Saved
from ckd.backends.precision import float32_products
from ckd.backends.triton import WIDTH_MULTIPLE, reference_bytes

# Bytes of a chunk of the bank with what is computed about it, at most; a chunk has whole waves, one
# at least. The forward reads it for every tile of students: at two waves of W = 256 its kernel took
# 4 % longer than at one, and the backward 2 % less (H100, 2026-11-27).
FORWARD_BYTES, BACKWARD_BYTES = 24 << 20, 48 << 20
# Bank rows that a program of the projection and of the bank's gradient owns in a large problem.
PROGRAM_ROWS = 128
# Of student_gradient_kernel, at most: every program of student_factors_kernel reads
# what each of them leaves.
STUDENT_PROGRAMS = 1024
BLOCK_PARTS = 256  # of them that are read at once
SCALED_ROWS = 64  # of dZ that share a scale, where a kernel of its own makes it half precision


class Chunk(NamedTuple):
    """Rows first, first + 1, ... of the bank."""

    first: int
    t: Tensor  # [rows, D] as stored
    n: Tensor  # [rows, width] unit rows in the operands' dtype
    inverse: Tensor  # [rows] 1 / |z|


class RowGradients(NamedTuple):
    """The gradients of the students' losses that a backward begins with."""

    g: Tensor | None  # d loss / d nll [B], or with `kept` that of the mean; None: zeros
    h: Tensor | None  # d loss / d lse [B]; None: zeros
    kept: Tensor | None  # [] how many students the mean is over

    @property
    def strides(self) -> tuple[int, int]:
        return stride(self.g), stride(self.h)

    @property
    def flags(self) -> dict[str, bool]:
        return {
            "HAS_G": self.g is not None,
            "HAS_H": self.h is not None,
            "HAS_KEPT": self.kept is not None,
        }


class StudentGradient(NamedTuple):
    """The outputs of student_gradient_kernel; one that is not asked for holds no values."""

    d_student: Tensor
    along: Tensor  # parts of d_logit_scale
    largest: Tensor  # upper bounds on |G|, the gradient with respect to the logits


class Call:
    """The inputs as the kernels take them, and what both ops do with them."""

    def __init__(
        self,
        student: Tensor,
        bank: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        logit_scale: Tensor,
        allow_half: bool,
        chunk_bytes: int | None = None,
    ) -> None:
        self._chunk_bytes = BACKWARD_BYTES if chunk_bytes is None else chunk_bytes
        self.half = allow_half
        self.operand = torch.float16 if allow_half else torch.float32
        # float16 would overflow on what a bank in another dtype may hold.
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
        self.processors = processors(student.device)
        self.family = family(student.device)

    def empty(self, *shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.student.device)

    @functools.cached_property
    def weight(self) -> Tensor | None:
        """As an operand; not needed where a cache has the projected bank."""
        weight = self.weight_like
        return None if weight is None else weight.to(self.bank_operand).contiguous()

    @property
    def positive_scale(self) -> Tensor:
        """NaN in place of a scale that the op refuses."""
        return torch.where((self.scale > 0) & self.scale.isfinite(), self.scale, torch.nan)

    def on_device(self) -> AbstractContextManager[Any]:
        device = self.student.device
        return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

    def key(self, kernel: str, *sizes: int) -> tuple[object, ...]:
        """What the fastest tiles of a kernel depend on."""
        arithmetic = (self.operand, self.bank_operand, self.precision, self.bank.dtype)
        return (kernel, self.student.device, *arithmetic, *map(bucket, sizes))

    def students(self) -> Tensor:
        """u [B, width]."""
        u = self.empty(self.batch, self.width, dtype=self.operand)
        self._unit_rows(self.student, self.student_dim, u, self.empty(self.batch))
        return u

    @property
    def wave_rows(self) -> int:
        """Bank rows of one program on every processor: chunks of whole waves leave none idle."""
        return self.processors * PROGRAM_ROWS

    @functools.cached_property
    def chunk_rows(self) -> int:
        """Bank rows that are worked on at once."""
        # n, and z or its gradient: in half precision where one program has whole rows.
        second = self.operand.itemsize if self.half and self.width <= 256 else 4
        row = self.width * (self.operand.itemsize + second) + 8
        waves = max(1, self._chunk_bytes // (row * self.wave_rows))
        return min(waves * self.wave_rows, self.bank_rows)

    def reference(self, cache: Tensor) -> Tensor | None:
        """[2, B], where the cache begins (combine_kernel)."""
        size = reference_bytes(self.batch)
        return cache[:size].view(torch.float32)[: 2 * self.batch] if len(cache) > 0 else None

    def chunks(self, cache: Tensor | None = None, filled: bool = False) -> Iterator[Chunk]:
        """The bank, projected; a cache may have room for all of it and be filled already."""
        room = None if cache is None else cache[reference_bytes(self.batch) :]
        has_cache = room is not None and len(room) > 0
        n, inverse = self._room(room if has_cache else None)
        for first in range(0, self.bank_rows, self.chunk_rows):
            t = self.bank[first : first + self.chunk_rows]
            at = first if has_cache else 0
            chunk = Chunk(first, t, n[at : at + len(t)], inverse[at : at + len(t)])
            if not (filled and has_cache):
                self._fill(chunk)
            yield chunk

    def _room(self, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        if cache is None:
            count = self.chunk_rows
            return self.empty(count, self.width, dtype=self.operand), self.empty(count)
        end = self.bank_rows * self.width * self.operand.itemsize
        n = cache[:end].view(self.operand).view(self.bank_rows, self.width)
        return n, cache[end:].view(torch.float32)

    def _fill(self, chunk: Chunk) -> None:
        count = len(chunk.t)
        if self.weight_like is None:
            self._unit_rows(chunk.t, self.teacher_dim, chunk.n, chunk.inverse)
            return
        aligned = is_aligned(chunk.t)
        sizes = (self.chunk_rows, self.processors)
        candidates = tiles.project_tiles(self.width, self.arithmetic, self.family, aligned, *sizes)
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

        key = self.key("project", count, self.teacher_dim, self.width, aligned)
        launch(choose(key, candidates, launch))
        if not fused:
            self._unit_rows(z, self.student_dim, chunk.n, chunk.inverse)

    def _unit_rows(self, x: Tensor, dim: int, unit: Tensor, inverse: Tensor) -> None:
        unit_rows_kernel[(-(-len(x) // 8),)](
            x, unit, inverse, len(x), dim, x.stride(0), self.width, PRECISION=self.precision,
            BLOCK_ROWS=8, BLOCK_WIDTH=min(256, power_of_two(self.width)),
        )  # fmt: skip

    def similarities(self, u: Tensor, chunk: Chunk, out: Tensor) -> None:
        """The columns of out [B, K] that belong to a chunk."""
        count = len(chunk.n)

        def launch(chosen: Tiles) -> None:
            similarity_kernel[(-(-self.batch // chosen.batch), -(-count // chosen.bank))](
                u, chunk.n, self.scale, out[:, chunk.first :], self.batch, count, self.width,
                self.bank_rows, PRECISION=self.precision,
                BLOCK_BATCH=chosen.batch, BLOCK_BANK=chosen.bank, BLOCK_INNER=chosen.inner,
                num_warps=chosen.warps, num_stages=chosen.stages,
            )  # fmt: skip

        candidates = tiles.similarity_tiles(self.arithmetic, self.family)
        key = self.key("similarity", self.batch, count, self.width)
        launch(choose(key, candidates, launch))

    def student_gradient(
        self,
        rows: RowGradients,
        residual: Tensor,
        attention: Tensor,
        needs: Needs,
        target: Tensor | None = None,
        options: Options | None = None,
        p_other: Tensor | None = None,
    ) -> StudentGradient:
        """The gradients of student and scale, from slope = g residual + h attention. A student
        without a target (None: every one has) takes no part of g. With p_other also `largest`."""
        has_slope = needs.student or needs.logit_scale
        block_rows = 8
        programs = min(-(-self.batch // block_rows), STUDENT_PROGRAMS)
        d_student = self.empty(0)
        if needs.student:
            d_student = self.empty(self.batch, self.student_dim, dtype=self.student.dtype)
        along, largest = self.empty(programs), self.empty(programs)
        ignore_index, smoothing = 0, 0.0
        if options is not None:
            ignore_index, smoothing = options.ignore_index, options.label_smoothing
        student_gradient_kernel[(programs,)](
            self.student, self.scale, target, *rows, residual, attention, p_other,
            d_student, along, largest,
            self.batch, self.student_dim, self.student.stride(0), *rows.strides,
            ignore_index, self.bank_rows, smoothing,
            HAS_TARGET=target is not None, **rows.flags, HAS_SLOPE=has_slope,
            HAS_STUDENT=needs.student, HAS_BOUND=p_other is not None,
            BLOCK_ROWS=block_rows, BLOCK_WIDTH=min(256, power_of_two(self.student_dim)),
        )  # fmt: skip
        return StudentGradient(d_student, along, largest)

    def zero_gradients(self, needs: Needs) -> Gradients:
        """Of no students."""
        every = (self.student, self.weight_like, self.bias_like, self.scale)
        pairs = zip(every, needs)
        return Gradients(
            *(torch.zeros_like(x) if x is not None and need else self.empty(0) for x, need in pairs)
        )

    def gradients(
        self,
        d_student: Tensor | None,
        projection: ProjectionGradient | None,
        d_scale: Tensor | None,
        needs: Needs,
    ) -> Gradients:
        """Each in its input's dtype, [0] where none was asked for."""
        d_weight = d_bias = None
        if projection is not None and needs.weight and self.weight_like is not None:
            d_weight = projection.weight.to(self.weight_like.dtype)
        if projection is not None and needs.bias and self.bias_like is not None:
            d_bias = projection.bias[: self.student_dim].to(self.bias_like.dtype)
        asked = (d_student, d_weight, d_bias, d_scale)
        return Gradients(*(self.empty(0) if d is None else d for d in asked))


class SoftmaxSums:
    """The forward of contrastive_ce, chunk by chunk."""

    def __init__(self, call: Call, target: Tensor, options: Options, keep_values: bool) -> None:
        self._call, self._target, self._options = call, target, options
        self._keep_values = keep_values
        sizes = (call.batch, call.chunk_rows, call.processors)
        self._candidates = tiles.forward_tiles(call.width, call.arithmetic, call.family, *sizes)
        self._tiles: Tiles | None = None
        first = self._candidates[0]
        students, columns = self._programs(first)
        self._splits = tiles.splits(
            call.chunk_rows, first.bank, students * columns, call.processors
        )
        batch, width = call.batch, call.width
        self._u = call.students()
        most = max(self._programs(chosen)[1] for chosen in self._candidates)
        self._top, self._total = (call.empty(most, self._splits, batch) for _ in range(2))
        self._values = call.empty((self._splits, batch, width) if keep_values else 0)
        self._arrived = call.empty(1, dtype=torch.int32)
        self._whole_bank: Tensor | None = None  # its unit rows, where they are all at hand
        self._n_target: Tensor | None = None
        smooth = options.label_smoothing > 0
        self._n_sum = (
            torch.zeros(width, dtype=torch.float32, device=target.device) if smooth else None
        )

    def _programs(self, chosen: Tiles) -> tuple[int, int]:
        """Of students, and of blocks of the width."""
        call = self._call
        columns = -(-call.width // chosen.width) if self._keep_values else 1
        return -(-call.batch // chosen.batch), columns

    def add(self, chunk: Chunk) -> None:
        call, count = self._call, len(chunk.n)
        sizes = (call.batch, count, chunk.first, call.bank_rows, self._options.ignore_index)
        if count == call.bank_rows:
            self._whole_bank = chunk.n
        else:
            self._keep_targets(chunk, sizes)

        def launch(chosen: Tiles) -> None:
            students, columns = self._programs(chosen)
            forward_kernel[(students, self._splits, columns)](
                self._u, chunk.n, self._target, call.scale, self._top,
                self._total, self._values, self._arrived, *sizes, call.width,
                KEEP_VALUES=self._keep_values, HALF=call.half,
                PRECISION=call.precision, **chosen.launch(call.width),
            )  # fmt: skip

        if self._tiles is None:  # of the first chunk, whose launch may be repeated
            key = call.key("forward", call.batch, count, call.width, self._keep_values)
            self._tiles = choose(key, self._candidates, launch)
        launch(self._tiles)
        if self._n_sum is not None:
            self._n_sum += chunk.n.sum(0, dtype=torch.float32)

    def _keep_targets(self, chunk: Chunk, sizes: tuple[int, ...]) -> None:
        call = self._call
        if self._n_target is None:
            self._n_target = call.empty(call.batch, call.width, dtype=call.operand)
        keep_targets_kernel[(-(-call.batch // 16),)](
            chunk.n, self._target, self._n_target, *sizes, call.width,
            BLOCK_BATCH=16, BLOCK_WIDTH=min(128, power_of_two(call.width)),
        )  # fmt: skip

    def combine(
        self,
        nll: Tensor,
        lse: Tensor,
        p_other: Tensor,
        residual: Tensor | None,
        attention: Tensor | None,
        reference: Tensor | None,
        mean: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Write the results of every student into the tensors given; None: not asked for. `mean` is
        the pair that receives the mean loss, and the number of students in it."""
        call, options = self._call, self._options
        gather = self._whole_bank is not None
        loss, kept = mean or (None, None)
        combine_kernel[(-(-call.batch // 2),)](
            self._u, self._target, call.scale, self._top, self._total, self._values,
            self._whole_bank if gather else self._n_target, self._n_sum,
            nll, lse, p_other, residual, attention, reference, loss, kept, self._arrived,
            call.batch, self._splits, call.bank_rows, options.ignore_index,
            options.label_smoothing, call.width, call.student_dim,
            GATHER=gather, HALF=call.half, SMOOTH=self._n_sum is not None,
            KEEP_RESIDUAL=residual is not None, KEEP_ATTENTION=attention is not None,
            KEEP_REFERENCE=reference is not None, MEAN=mean is not None,
            BLOCK_BATCH=2, BLOCK_SPLITS=tiles.MOST_SPLITS,
            BLOCK_WIDTH=min(256, power_of_two(call.width)), BLOCK_MEAN=1024,
        )  # fmt: skip


class Students(NamedTuple):
    """What the bank's gradient needs of each student (student_factors_kernel)."""

    u: Tensor  # [padded, width]
    column: Tensor
    rate: Tensor
    cosine: Tensor
    above: Tensor
    at_target: Tensor
    by_all: Tensor
    size: Tensor

    @classmethod
    def of(
        cls,
        call: Call,
        target: Tensor,
        rows: RowGradients,
        saved: Saved,
        options: Options,
        by_student: StudentGradient,
        d_scale: Tensor | None,
    ) -> Students:
        """d_logit_scale is written to d_scale, unless that is None."""
        multiple = STUDENTS_MULTIPLE.value
        count = -(-call.batch // multiple) * multiple
        size = call.empty(1)
        column = call.empty(count, dtype=torch.int32)
        rate, cosine, above, at_target, by_all = (call.empty(count) for _ in range(5))
        u = call.empty(count, call.width, dtype=call.operand)
        parts = len(by_student.largest)
        reference = call.reference(saved.cache)  # None where the op is called without a cache
        block_rows = 8
        student_factors_kernel[(count // block_rows,)](
            call.student, call.scale, target, *rows, saved.lse, reference, saved.p_other,
            by_student.largest, by_student.along,
            u, column, rate, cosine, above, at_target, by_all, size, d_scale,
            call.batch, parts, call.student_dim, call.student.stride(0), call.width,
            *rows.strides, options.ignore_index, call.bank_rows, options.label_smoothing,
            **rows.flags, HAS_SCALE=d_scale is not None, HAS_REFERENCE=reference is not None,
            HALF=call.half, PRECISION=call.precision, BLOCK_ROWS=block_rows,
            BLOCK_WIDTH=min(256, power_of_two(call.width)), BLOCK_PARTS=BLOCK_PARTS,
        )  # fmt: skip
        return cls(u, column, rate, cosine, above, at_target, by_all, size)


class ProjectionGradient:
    """d_weight = dZ^T T and d_bias = sum_k dZ_k, chunk by chunk."""

    def __init__(self, call: Call, needs: Needs) -> None:
        self._call, self._needs = call, needs
        self._tiles: Tiles | None = None
        self._exact = Product(call, call.student_dim, call.teacher_dim)
        self._parts: Tensor | None = None  # of d_weight, in half precision
        self._product_tiles: ProductTiles | None = None
        self._sums: Tensor | None = None  # of dZ over the rows of a program
        self._bias: Tensor | None = None  # [width]

    def add_softmax(self, chunk: Chunk, students: Students, smooth: bool) -> None:
        """The rows of a chunk, of a loss over softmax probabilities."""
        call, count = self._call, len(chunk.n)
        sizes = (call.chunk_rows, call.processors)
        candidates = tiles.backward_tiles(call.width, call.arithmetic, call.family, *sizes)
        whole = candidates[0].width >= call.width
        # The kernel leaves d z where a program holds whole rows, else d n: all of one kind.
        candidates = tuple(c for c in candidates if (c.width >= call.width) == whole)
        half = whole and call.half
        gradient = call.empty(count, call.width, dtype=call.bank_operand if half else torch.float32)
        most = -(-count // min(chosen.bank for chosen in candidates))
        scales = call.empty(most) if half else None
        if self._sums is None and whole and self._needs.bias:
            self._sums = call.empty(most, call.width)

        def launch(chosen: Tiles) -> None:
            grid = (-(-count // chosen.bank), -(-call.width // chosen.width))
            bank_gradient_kernel[grid](
                *students, chunk.n, chunk.inverse, call.scale, gradient, scales, self._sums,
                call.batch, count, chunk.first, call.width,
                HAS_SUMS=self._sums is not None, SMOOTH=smooth, HALF=call.half,
                PRECISION=call.precision, FULL=chosen.width == call.width,
                **chosen.launch(call.width),
            )  # fmt: skip

        if self._tiles is None:  # of the first chunk, whose launch may be repeated
            key = call.key("bank_gradient", call.batch, count, call.width)
            self._tiles = choose(key, candidates, launch)
            if self._sums is not None:
                self._sums = self._sums[: -(-count // self._tiles.bank)]
        launch(self._tiles)
        if not whole:
            self.add(chunk, gradient)
        elif half and self._needs.weight:
            self._add_half(chunk, gradient, scales, self._tiles.bank)
        elif self._needs.weight:
            self._add_exact(chunk, gradient)

    def add(self, chunk: Chunk, d_n: Tensor) -> None:
        """The rows of a chunk; d_n [rows, width] becomes d_z."""
        call, rows, width = self._call, len(d_n), self._call.width
        largest = call.empty(rows)
        bank_norm_backward_kernel[(-(-rows // 8),)](
            d_n, chunk.n, chunk.inverse, largest, rows, width,
            BLOCK_ROWS=8, BLOCK_WIDTH=min(256, power_of_two(width)),
        )  # fmt: skip
        if self._needs.bias:
            column_sums = d_n.sum(0)
            self._bias = column_sums if self._bias is None else self._bias.add_(column_sums)
        if not self._needs.weight:
            return
        if not call.half:
            self._add_exact(chunk, d_n)
            return
        half = call.empty(rows, width, dtype=call.bank_operand)
        scales = call.empty(-(-rows // SCALED_ROWS))
        columns = min(128, power_of_two(width))
        half_tiles_kernel[(len(scales), -(-width // columns))](
            d_n, largest, half, scales, rows, width,
            BLOCK_ROWS=SCALED_ROWS, BLOCK_WIDTH=columns,
        )  # fmt: skip
        self._add_half(chunk, half, scales, SCALED_ROWS)

    def _add_exact(self, chunk: Chunk, d_z: Tensor) -> None:
        columns = d_z[:, : self._call.student_dim].T
        self._exact.add(columns, chunk.t, None, self._call.bank_operand)

    def _add_half(self, chunk: Chunk, d_z: Tensor, scales: Tensor | None, rows: int) -> None:
        """d_z in half precision, with a scale for every `rows` of it."""
        call = self._call
        aligned = is_aligned(chunk.t)
        candidates = tiles.weight_gradient_tiles(call.width, call.family, rows, aligned)

        def blocks(chosen: ProductTiles) -> tuple[int, int]:
            return -(-call.student_dim // chosen.rows), -(-call.teacher_dim // chosen.columns)

        add = int(self._parts is not None)
        if self._parts is None:
            others = math.prod(blocks(candidates[0]))
            count = tiles.splits(len(d_z), rows, others, call.processors, 16)
            self._parts = call.empty(count, call.student_dim, call.teacher_dim)
        parts = self._parts
        sums_rows = 0
        if self._sums is not None:
            self._bias = call.empty(call.width) if self._bias is None else self._bias
            sums_rows = len(self._sums) if chunk.first + len(d_z) == call.bank_rows else 0

        def launch(chosen: ProductTiles) -> None:
            weight_gradient_kernel[(*blocks(chosen), len(parts))](
                d_z, scales, chunk.t, parts, self._sums, self._bias,
                len(d_z), call.width, call.student_dim, call.teacher_dim, chunk.t.stride(0),
                add, sums_rows, HAS_SUMS=self._sums is not None,
                BLOCK_ROWS=chosen.rows, BLOCK_COLUMNS=chosen.columns, BLOCK_SUMS=rows,
                num_warps=chosen.warps, num_stages=chosen.stages,
            )  # fmt: skip

        if self._product_tiles is None:  # of the first chunk, whose launch may be repeated
            key = call.key("weight_gradient", call.student_dim, call.teacher_dim, rows, aligned)
            self._product_tiles = choose(key, candidates, launch)
        launch(self._product_tiles)

    @property
    def weight(self) -> Tensor:
        return self._exact.sum() if self._parts is None else sum_of_parts(self._parts)

    @property
    def bias(self) -> Tensor:
        """[width]"""
        if self._bias is not None:
            return self._bias
        if self._sums is not None:
            return sum_of_parts(self._sums)
        return self._call.empty(self._call.width).zero_()


class Product:
    """A sum of products a b over chunks, in parts that are summed at the end."""

    def __init__(self, call: Call, count: int, columns: int) -> None:
        self._call, self._rows, self._columns = call, count, columns
        self._parts: Tensor | None = None
        self._tiles: ProductTiles | None = None

    def add(self, a: Tensor, b: Tensor, largest: Tensor | None, operand: torch.dtype) -> None:
        """a: float32 [rows, sums] of any strides; b: [sums, at least columns]; largest: max |a| of
        each row, for half-precision operands."""
        call, sums = self._call, a.shape[1]
        aligned = is_aligned(b) and is_aligned(a if a.stride(1) == 1 else a.T)
        candidates = tiles.product_tiles(call.arithmetic, call.family, aligned)
        add = self._parts is not None
        if self._parts is None:
            first = candidates[0]
            others = -(-self._rows // first.rows) * -(-self._columns // first.columns)
            count = tiles.splits(sums, first.sums, others, call.processors, 16)
            self._parts = call.empty(count, self._rows, self._columns)
        parts = self._parts

        def launch(chosen: ProductTiles) -> None:
            grid = (-(-self._rows // chosen.rows), -(-self._columns // chosen.columns), len(parts))
            product_kernel[grid](
                a, b, largest, parts, self._rows, self._columns, sums,
                a.stride(0), a.stride(1), b.stride(0),
                ADD=add, HALF=call.half, PRECISION=call.precision,
                OPERAND=getattr(tl, str(operand).removeprefix("torch.")),
                BLOCK_ROWS=chosen.rows, BLOCK_COLUMNS=chosen.columns, BLOCK_SUMS=chosen.sums,
                num_warps=chosen.warps, num_stages=chosen.stages,
            )  # fmt: skip

        if self._tiles is None:
            key = call.key("product", self._rows, self._columns, sums, aligned)
            self._tiles = choose((*key, operand), candidates, launch)
        launch(self._tiles)

    def sum(self) -> Tensor:
        if self._parts is None:
            return self._call.empty(self._rows, self._columns).zero_()
        return sum_of_parts(self._parts)


def sum_of_parts(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)


def stride(row: Tensor | None) -> int:
    return 0 if row is None else row.stride(0)


def padded(student_dim: int) -> int:
    """Row length of the workspaces: whole 32-byte sectors."""
    return -(-student_dim // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def is_aligned(matrix: Tensor) -> bool:
    """Whether every row begins where 16 bytes can be read at once."""
    size = matrix.element_size()
    return matrix.stride(0) * size % 16 == 0 and matrix.storage_offset() * size % 16 == 0


@functools.cache
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # interpreted: enough for several splits
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def family(device: torch.device) -> str:
    """Which tiles fit (ckd._triton.tiles)."""
    if device.type != "cuda":
        return tiles.INTERPRETER
    properties = driver.active.utils.get_device_properties(device.index)
    shared = properties["max_shared_mem"]
    if torch.version.hip is not None or shared < 163 << 10:
        return tiles.SMALL
    return tiles.HOPPER if shared >= 227 << 10 else tiles.AMPERE
