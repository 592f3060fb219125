"""Weighted targets, several a student, in the form that the backends take (see `Targets`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ckd.backends.interface import INVALID_WEIGHT


class Split(NamedTuple):
    """The distributions of weighted targets, and how much each student counts."""

    target: Tensor  # [B] int64: the row with the largest weight
    shift_rows: Tensor | None  # [B, M]; None if M is 1
    shift: Tensor | None  # [B, M] times (1 - label_smoothing)
    total: Tensor  # [B] the sum of a student's weights
    kept: Tensor  # 0-dim: the number of students with a target, at least 1


def split(
    target: Tensor,
    weight: Tensor | None,
    bank_rows: int,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
) -> Split:
    """Split -sum_m w_im log p_{i, y_im} into total_i (nll_i - sum_m shift_im l_im), where nll_i is
    the loss of one target, and the rows of `shift` sum to zero.

    target, weight: [B, M]; weight None: equal weights with a sum of 1. Traceable: it reads no
    values.
    """
    valid = target != ignore_index
    if weight is None:
        w = valid.to(dtype)
        w = w / w.sum(1, keepdim=True).clamp(min=1)
    else:
        w = weight.to(dtype).masked_fill(~valid, 0)
    total = w.sum(1)
    invalid = (w < 0).any(1) | ~(total < torch.inf)
    outside = valid & ((target < 0) | (target >= bank_rows))
    wrong = outside.any(1) | invalid
    first = w.masked_fill(~valid, -1).argmax(1, keepdim=True)
    # An entry out of range is the target: the backends refuse it, or give the loss NaN.
    pick = torch.where(outside.any(1, keepdim=True), outside.int().argmax(1, keepdim=True), first)
    main = target.gather(1, pick).squeeze(1).masked_fill(invalid, INVALID_WEIGHT)
    kept = valid.any(1).sum().clamp(min=1).to(dtype)
    total = total.masked_fill(wrong, 1)
    if target.shape[1] == 1:
        return Split(main, None, None, total, kept)
    share = (w / total.masked_fill(total == 0, 1).unsqueeze(1)).scatter(1, first, 0)
    shift = share.scatter(1, first, -share.sum(1, keepdim=True)) * (1 - label_smoothing)
    empty = (wrong | ~valid.any(1)).unsqueeze(1)
    some_row = main.clamp(0, bank_rows - 1).unsqueeze(1)
    rows = torch.where(valid & ~empty, target, some_row)
    return Split(main, rows, shift.masked_fill(empty, 0), total, kept)
