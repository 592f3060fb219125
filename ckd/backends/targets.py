"""Weighted targets, several a student, in the form that the kernels take (see `Targets`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ckd.backends.interface import INVALID_WEIGHT, Split


def split_targets(
    target: Tensor,
    weight: Tensor | None,
    bank_rows: int,
    ignore_index: int,
    label_smoothing: float,
    dtype: torch.dtype,
) -> Split:
    """Split -sum_m w_im log p_{i, y_im} into total_i (nll_i - sum_m shift_im l_im), where nll_i is
    the loss of one target, and the rows of `shift` sum to zero.

    target, weight: [B, M], contiguous; weight None: equal weights with a sum of 1. In torch's
    operators, which compilers trace: it reads no values.
    """
    valid = target != ignore_index
    rows = target.clamp(0, bank_rows - 1)
    outside = (rows != target) & valid
    if weight is None:
        w = valid.to(dtype)
        w = w / w.sum(1, keepdim=True).clamp(min=1)
    else:
        w = torch.where(valid, weight, 0).to(dtype)
        w = torch.where(w >= 0, w, torch.nan)
    # A target out of range is the largest, so that the backends find it: they refuse it, or give
    # the loss NaN.
    w = torch.where(outside, torch.inf, w)
    total = w.sum(1)
    wrong = ~(total < torch.inf)
    first = w.argmax(1, keepdim=True)
    row = target.gather(1, first)
    refused = torch.where(outside, target, INVALID_WEIGHT).gather(1, first)
    main = torch.where(wrong.unsqueeze(1), refused, row).squeeze(1)
    total = total.masked_fill(wrong, 1)
    kept = valid.any(1).sum().clamp(min=1).to(dtype)
    if target.shape[1] == 1:
        return Split(main, None, None, total, kept)
    w = w.masked_fill(wrong.unsqueeze(1), 0)
    # Entries of the target's row have no shift, exactly.
    share = (w / total.masked_fill(total == 0, 1).unsqueeze(1)).masked_fill(target == row, 0)
    shift = share.scatter(1, first, -share.sum(1, keepdim=True))
    return Split(
        main, rows, shift * (1 - label_smoothing) if label_smoothing else shift, total, kept
    )
