"""The squared distance between a student's rows and their teacher's."""

from __future__ import annotations

from torch import Tensor, nn

from ckd.backends.interface import Reduction
from ckd.heads import widened
from ckd.losses._rows import check_pair, check_reduction, reduced


class MSEDistillationLoss(nn.Module):
    """|h_i - t_i|^2 / D of each student's row with its teacher's.

    Give it standardised rows, such as `TeacherSpaceHead`'s (PHI-S, arXiv 2410.01680): then h = 0
    has a loss of 1 on average, whatever the teacher's scale and width.

    Args:
        reduction: "mean" (0 for an empty batch), "sum", "none".

    Shapes: forward(student [B, D], teacher [B, D]) -> scalar, or [B] for "none"; float32 also under
    autocast and for half-precision rows, float64 for float64 rows. No gradient for `teacher`.

    Raises:
        ValueError: shapes that differ, an unknown reduction.
    """

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction: Reduction = reduction

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_pair(student, teacher, "D")
        distances = (widened(student) - widened(teacher.detach())).square().mean(dim=1)
        return reduced(distances, self.reduction)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"
