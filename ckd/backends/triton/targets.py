"""Weighted targets: launches of the kernels over the entries (i, m) of a shift (see `Targets`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ckd._triton.contrastive_ce_backward import PARTS
from ckd._triton.targets import (
    NOWHERE,
    add_shift_kernel,
    shift_matrix_kernel,
    split_kernel,
)
from ckd._triton.tiles import power_of_two
from ckd.backends.device import Gpu
from ckd.backends.interface import Split, Targets
from ckd.backends.triton.call import Call

# Up to this many elements, of 4 bytes, the shift of all students is a matrix: however many entries
# a bank row has, it costs one load for each element of G.
MATRIX_ELEMENTS = 1 << 22


def split(
    gpu: Gpu,
    target: Tensor,
    weight: Tensor | None,
    bank_rows: int,
    ignore_index: int,
    label_smoothing: float,
) -> Split:
    """See ckd.backends.targets.split_targets."""
    batch, each = target.shape
    new = torch.empty_like if each > 1 else lambda *_, **options: None
    rows, shift = new(target), new(target, dtype=torch.float32)
    total, kept = torch.empty(2, batch, dtype=torch.float32, device=target.device)
    main = target.new_empty(batch)
    with gpu.current(target.device):
        split_kernel[(batch,)](
            target, weight, main, rows, shift, total, kept,
            bank_rows, each, ignore_index, 1.0 - label_smoothing,
            BLOCK=min(256, power_of_two(each)),
        )  # fmt: skip
    return Split(main, rows, shift, total, kept.sum().clamp_(min=1))


def contiguous(targets: Targets) -> Targets:
    rows, shift = targets.shift_rows, targets.shift
    return targets._replace(
        target=targets.target.contiguous(),
        shift_rows=None if rows is None else rows.contiguous(),
        shift=None if shift is None else shift.contiguous(),
    )


def add_shift(call: Call, targets: Targets, n: Tensor, first: int, n_shift: Tensor) -> None:
    """Add the sums over entries among the bank rows n, from row `first` on, to n_shift
    [B, width]; overwrite it if `first` is 0."""
    assert targets.shift is not None
    block = min(256, power_of_two(call.width))
    add_shift_kernel[(call.batch, -(-call.width // block))](
        n, targets.shift_rows, targets.shift, n_shift,
        len(n), first, targets.shift.shape[1], call.width,
        BLOCK_TARGETS=16, BLOCK_WIDTH=block,
    )  # fmt: skip


class Shift(NamedTuple):
    """The shift by bank rows: as a matrix, as sorted entries, or neither if there is none."""

    matrix: Tensor | None = None  # [K, padded] float32: a column for each student
    rows: Tensor | None = None  # [entries] int32, sorted
    students: Tensor | None = None  # [entries] int32
    shares: Tensor | None = None  # [entries] float32
    entries: int | None = None
    rounds: int | None = None  # of count_below

    @classmethod
    def of(cls, call: Call, targets: Targets, columns: int) -> Shift:
        """columns: students, padded as in `Students`."""
        shift_rows, shift = targets.shift_rows, targets.shift
        if shift is None or shift_rows is None:
            return cls()
        if call.bank_rows * columns <= MATRIX_ELEMENTS:
            matrix = call.empty(call.bank_rows, columns).zero_()
            shift_matrix_kernel[(call.batch,)](
                shift_rows, shift, matrix, call.bank_rows, shift.shape[1], columns, BLOCK=32
            )
            return cls(matrix)
        rows, students, shares = _sort(shift_rows, shift)
        rounds = 1
        while PARTS.value**rounds < len(rows):
            rounds += 1
        return cls(None, rows, students, shares, len(rows), rounds)


def _sort(shift_rows: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The bank rows, students and shares of the entries, by rows, then by students. Entries without
    a share are last."""
    rows = torch.where(shift != 0, shift_rows, NOWHERE.value).int().flatten()
    rows, order = rows.sort(stable=True)
    students = torch.div(order, shift.shape[1], rounding_mode="floor").int()
    return rows, students, shift.flatten()[order].float()
