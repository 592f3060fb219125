"""The gradients of weight and bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ckd._triton import tiles
from ckd._triton.contrastive_ce_backward import bank_gradient_kernel
from ckd._triton.products import weight_gradient_kernel
from ckd._triton.rows import bank_norm_backward_kernel, half_tiles_kernel
from ckd._triton.tiles import ProductTiles, Tiles, power_of_two
from ckd.backends.interface import Gradients, Needs
from ckd.backends.triton.call import Call, Chunk, is_aligned, sum_of_parts
from ckd.backends.triton.products import Product
from ckd.backends.triton.students import Students
from ckd.backends.triton.targets import Shift

SCALED_ROWS = 64  # rows of dZ that share a scale, where half_tiles_kernel converts it


class ProjectionGradient:
    """Accumulates d_weight = dZ^T T and d_bias = sum_k dZ_k over the chunks of the bank."""

    def __init__(self, call: Call, needs: Needs) -> None:
        self._call, self._needs = call, needs
        self._tiles: Tiles | None = None
        self._exact = Product(call, call.student_dim, call.teacher_dim)
        self._parts: Tensor | None = None  # partial sums of d_weight, from half-precision operands
        self._product_tiles: ProductTiles | None = None
        self._sums: Tensor | None = None  # [programs, width] sums of dZ over a program's rows
        self._bias: Tensor | None = None  # [width]

    def add_softmax(self, chunk: Chunk, students: Students, shift: Shift, smooth: bool) -> None:
        """Add a chunk of the contrastive cross-entropy; `smooth`: with label smoothing."""
        call, count = self._call, len(chunk.n)
        sizes = (call.chunk_rows, call.processors)
        candidates = tiles.backward_tiles(call.width, call.arithmetic, call.family, *sizes)
        whole = candidates[0].width >= call.width
        # The kernel gives dZ if a program holds whole rows, else dN: only candidates of one kind.
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
                *students, *shift, chunk.n, chunk.inverse, call.scale, gradient, scales, self._sums,
                call.batch, count, chunk.first, call.width,
                HAS_SUMS=self._sums is not None, SMOOTH=smooth,
                MATRIX=shift.matrix is not None, ENTRIES=shift.rows is not None,
                HALF=call.half, PRECISION=call.precision, FULL=chosen.width == call.width,
                **chosen.launch(call.width),
            )  # fmt: skip

        if self._tiles is None:  # tuned on the first chunk: later launches add to its results
            kind = (call.batch, count, call.width, shift.rows is None)
            self._tiles = call.choose("bank_gradient", kind, candidates, launch)
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
        """Add a chunk, given d_n [rows, width]; d_n is overwritten with d_z."""
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
        """Add d_z^T t to the parts of d_weight; d_z is in half precision, scaled by `rows`."""
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

        if self._product_tiles is None:  # tuned on the first chunk: later launches add
            sizes = (call.student_dim, call.teacher_dim, rows, aligned)
            self._product_tiles = call.choose("weight_gradient", sizes, candidates, launch)
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


def gradients(
    call: Call,
    needs: Needs,
    d_student: Tensor | None,
    d_scale: Tensor | None,
    projection: ProjectionGradient | None = None,
) -> Gradients:
    """The gradients in their inputs' dtypes, [0] where none is requested."""
    d_weight = d_bias = None
    if projection is not None and needs.weight and call.weight_like is not None:
        d_weight = projection.weight.to(call.weight_like.dtype)
    if projection is not None and needs.bias and call.bias_like is not None:
        d_bias = projection.bias[: call.student_dim].to(call.bias_like.dtype)
    asked = (d_student, d_weight, d_bias, d_scale)
    return Gradients(*(call.empty(0) if d is None else d for d in asked))
