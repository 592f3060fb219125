"""Distillation of a teacher's similarities: where an embedding lies among all rows of a bank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ckd.backends.interface import BackendName, Reduction
from ckd.heads import widened
from ckd.losses._rows import (
    check_pair,
    check_reduction,
    check_temperature,
    reduced,
    unit_rows,
)
from ckd.ops import contrastive_cross_entropy

_NO_TARGET = -1
_NO_ROW = torch.iinfo(torch.int32).max  # as ignore_index: the entropy counts all entries


class _SoftLoss(nn.Module):
    """The options that both forms have."""

    def __init__(
        self,
        temperature: float,
        *,
        reduction: Reduction = "mean",
        backend: BackendName = "auto",
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_reduction(reduction)
        self.temperature = temperature
        self.reduction: Reduction = reduction
        self.backend: BackendName = backend

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, reduction={self.reduction!r}, "
            f"backend={self.backend!r}"
        )


class SoftDistillationLoss(_SoftLoss):
    """KL between the teacher's and the student's softmax over all K rows of a bank, exactly.

        q_ik = softmax_k(tau cos(t_i, b_k))      the teacher's, tau = 1 / temperature
        p_ik = softmax_k(tau cos(z_i, b_k))      the student's
        KL_i = sum_k q_ik log(q_ik / p_ik)
             = lse_i - lse^T_i - tau (z_i/|z_i| - t_i/|t_i|) . m_i,   m_i = sum_k q_ik b_k/|b_k|

    (SEED, arXiv 2101.04731; CompRess, arXiv 2010.14713; both with a queue in place of the bank.)
    The teacher's m_i and lse^T_i do not change in training: `ckd bank neighbours --exact` stores
    them. So a step needs lse_i = log sum_k exp(tau cos(z_i, b_k)) alone, which the op computes
    without a [B, K] array.

    Args:
        temperature: that of both softmaxes, and of m and lse^T.
        reduction: "mean" (0 for an empty batch), "sum", "none".
        backend: as for the op.

    Shapes: forward(student z [B, D], bank b [K, D], teacher t [B, D], mean m [B, D], lse lse^T [B])
    -> scalar, or [B] for "none"; float32, or float64 for a float64 student. Differentiable in
    `student` alone.

    The value is a difference of numbers of some log K: rounding (of m to float16, say) may leave a
    small negative KL where both softmaxes agree. Rows with norm below 1e-6 have cosine 0, and NaN
    gives NaN, as in the op.

    Raises:
        ValueError: shapes that differ, a temperature that is not positive, an unknown reduction.
        TypeError, BackendError: as the op.
    """

    def forward(
        self, student: Tensor, bank: Tensor, teacher: Tensor, mean: Tensor, lse: Tensor
    ) -> Tensor:
        check_pair(student, teacher, "D")
        if mean.shape != student.shape or lse.shape != student.shape[:1]:
            raise ValueError(
                f"mean must be {list(student.shape)} and lse [{len(student)}], "
                f"got {list(mean.shape)} and {list(lse.shape)}"
            )
        ignored = torch.full((len(student),), _NO_TARGET, device=student.device)
        _, student_lse = contrastive_cross_entropy(
            student,
            bank,
            ignored,
            logit_scale=1 / self.temperature,
            ignore_index=_NO_TARGET,
            return_lse=True,
            backend=self.backend,
        )
        apart = unit_rows(widened(student)) - unit_rows(widened(teacher))
        moved = (apart * widened(mean)).sum(dim=1) / self.temperature
        return reduced(student_lse - lse - moved, self.reduction)


class TopSoftDistillationLoss(_SoftLoss):
    """The same KL with the teacher's softmax cut to its M largest weights, scaled to sum to 1.

        KL_i = sum_m w_im log(w_im / p_i,rows_im),   w_im = weights_im / sum_m weights_im

    The student's softmax p_i still runs over all K rows. What the cut leaves out is
    1 - sum_m weights_im; `ckd bank neighbours` prints it.

    Args: as SoftDistillationLoss.

    Shapes: forward(student z [B, D], bank [K, D], rows [B, M] integers, weights [B, M]) -> scalar,
    or [B] for "none"; float32, or float64 for a float64 student. Differentiable in `student` alone.
    Weights are not negative and each row has a positive one.

    Raises: as SoftDistillationLoss.
    """

    def forward(self, student: Tensor, bank: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        if rows.dim() != 2 or rows.shape != weights.shape or len(rows) != len(student):
            raise ValueError(
                f"rows and weights must both be [{len(student)}, M], got {list(rows.shape)} and "
                f"{list(weights.shape)}"
            )
        if rows.is_floating_point():
            raise ValueError(f"rows must be integers, got {rows.dtype}; it comes before weights")
        share = widened(weights.detach())
        share = share / share.sum(dim=1, keepdim=True).abs()  # negative ones stay so: an error
        cross_entropy = contrastive_cross_entropy(
            student,
            bank,
            rows.long(),
            logit_scale=1 / self.temperature,
            target_weight=share,
            ignore_index=_NO_ROW,
            reduction="none",
            backend=self.backend,
        )
        entropy = -torch.xlogy(share, share).sum(dim=1)
        return reduced(cross_entropy - entropy, self.reduction)
