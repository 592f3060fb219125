"""What the losses of rows share: unit rows, reductions, and checks of shapes."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from ckd._hints import unknown
from ckd.backends.interface import Reduction
from ckd.backends.reference import MIN_NORM


def unit_rows(rows: Tensor) -> Tensor:
    """x / |x| of each row, as the op defines it: zeros without a gradient where |x| < 1e-6, NaN
    where |x| is not finite."""
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / norm.masked_fill(norm.isinf(), torch.nan).masked_fill(norm < MIN_NORM, torch.inf)


def reduced(losses: Tensor, reduction: Reduction) -> Tensor:
    """The losses [B] of the rows, their sum, or their mean: 0 for an empty batch, like the op's."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / max(len(losses), 1)


def check_reduction(reduction: str) -> None:
    """Raise ValueError for an unknown reduction."""
    if reduction not in get_args(Reduction):
        raise ValueError(unknown("reduction", reduction, get_args(Reduction)))


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless the temperature is positive and finite."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def check_pair(student: Tensor, teacher: Tensor, columns: str) -> None:
    """Raise ValueError unless both are matrices of one shape, [B, `columns`]."""
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must both be [B, {columns}], got {list(student.shape)} and "
            f"{list(teacher.shape)}"
        )
