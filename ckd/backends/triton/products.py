"""A sum of matrix products over the chunks of a bank."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ckd._triton import tiles
from ckd._triton.products import product_kernel
from ckd._triton.tiles import ProductTiles
from ckd.backends.triton.call import Call, is_aligned, sum_of_parts


class Product:
    """A sum of products a b over chunks, as partial sums (split-k) that `sum` adds up."""

    def __init__(self, call: Call, count: int, columns: int) -> None:
        self._call, self._rows, self._columns = call, count, columns
        self._parts: Tensor | None = None
        self._tiles: ProductTiles | None = None

    def add(self, a: Tensor, b: Tensor, largest: Tensor | None, operand: torch.dtype) -> None:
        """Add a b. a: float32 [rows, sums] of any strides; b: [sums, columns or more]; largest: the
        maximum of |a| in each row, by which half-precision operands are scaled."""
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
            sizes = (self._rows, self._columns, sums, aligned)
            self._tiles = call.choose(f"product in {operand}", sizes, candidates, launch)
        launch(self._tiles)

    def sum(self) -> Tensor:
        if self._parts is None:
            return self._call.empty(self._rows, self._columns).zero_()
        return sum_of_parts(self._parts)
