"""The Kullback-Leibler divergence between a teacher's and a student's class probabilities."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ckd.backends.interface import Reduction
from ckd.heads import widened
from ckd.losses._rows import check_pair, check_reduction, check_temperature


class LogitDistillationLoss(nn.Module):
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of class logits.

    (Hinton, Vinyals and Dean 2015, arXiv 1503.02531; T^2 keeps the size of the gradient.)

    Args:
        temperature: T, positive.
        reduction: "mean" over the rows (0 for an empty batch), "sum", "none".

    Shapes: forward(student [B, C], teacher [B, C]) -> scalar, or [B] for "none"; float32 also under
    autocast and for half-precision logits, float64 for float64 ones. No gradient for `teacher`.

    Raises:
        ValueError: shapes that differ, a temperature that is not positive, an unknown reduction.
    """

    def __init__(self, temperature: float = 4.0, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_temperature(temperature)
        check_reduction(reduction)
        self.temperature, self.reduction = temperature, reduction

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_pair(student, teacher, "C")
        kl = F.kl_div(
            F.log_softmax(widened(student) / self.temperature, dim=1),
            F.log_softmax(widened(teacher.detach()) / self.temperature, dim=1),
            reduction="none" if self.reduction == "none" else "sum",
            log_target=True,
        )
        if self.reduction == "none":
            kl = kl.sum(dim=1)
        elif self.reduction == "mean":
            kl = kl / max(len(student), 1)
        return self.temperature**2 * kl

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}"
