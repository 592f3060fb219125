"""The cosine between a student's rows and their teacher's."""

from __future__ import annotations

from torch import Tensor, nn

from ckd.backends.interface import Reduction
from ckd.heads import widened
from ckd.losses._rows import check_pair, check_reduction, reduced, unit_rows


class CosineDistillationLoss(nn.Module):
    """1 - cos(h_i, t_i) of each student's row with its teacher's.

    Give it rows that are centred, such as `TeacherSpaceHead`'s: embeddings of one teacher share a
    large mean, beside which their differences hardly change the cosine.

    Args:
        reduction: "mean" (0 for an empty batch), "sum", "none".

    Shapes: forward(student [B, D], teacher [B, D]) -> scalar, or [B] for "none"; float32 also under
    autocast and for half-precision rows, float64 for float64 rows. No gradient for `teacher`.

    A row with norm below 1e-6 has no direction: its cosine is 0 and it gets no gradient, as in
    `contrastive_cross_entropy`. NaN, inf and a norm that overflows give NaN.

    Raises:
        ValueError: shapes that differ, an unknown reduction.
    """

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction: Reduction = reduction

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_pair(student, teacher, "D")
        cosines = unit_rows(widened(student)) * unit_rows(widened(teacher.detach()))
        return reduced(1 - cosines.sum(dim=1), self.reduction)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"
