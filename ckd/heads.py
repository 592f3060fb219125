"""Heads that map a student's embedding into the teacher's space."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ckd._hints import unknown

HeadKind = Literal["linear", "mlp"]


def widened(rows: Tensor) -> Tensor:
    """The rows in float32, or in float64 if they are: norms and softmaxes need that precision."""
    return rows if rows.dtype == torch.float64 else rows.float()


class TeacherSpaceHead(nn.Module):
    """Maps a student's embedding s into the teacher's space.

        h = net(s)                       standardised: about 0, of |h|^2 about D
        z = mean + sigma h               comparable with the teacher's own embeddings

    The teacher's rows are standardised alike, (t - mean) / sigma. `mean` [D] is the mean of the
    bank's rows, and `sigma` one number, the root of the mean of the per-dimension variances
    (`EmbeddingBank.statistics()`). One scale for all dimensions keeps the angles and the relative
    distances of rows, and brings teachers of any scale to the same size of loss (PHI-S, arXiv
    2410.01680, without its rotation, under which a squared error does not change). Both are
    buffers, so that the state dict holds the whole map.

    Args:
        student_dim: W, width of the student's embedding.
        teacher_dim: D, width of the bank.
        kind: "linear", or "mlp": Linear, LayerNorm, GELU, Linear. LayerNorm gives GELU inputs of
            unit scale whatever the scale of s, and unlike BatchNorm does not depend on the batch.
        hidden: width of the mlp's hidden layer; default max(W, D), so that it is no bottleneck:
            fewer than D hidden units would confine h to a subspace.
        mean: [D]; default zeros. sigma: positive; default 1.

    Shapes: forward(student [B, W]) -> h [B, D].

    Raises:
        ValueError: an unknown kind; dimensions, mean or sigma out of range.

    Example:
        >>> statistics = bank.statistics()
        >>> head = ckd.losses.TeacherSpaceHead(
        ...     256, bank.dim, mean=statistics.mean, sigma=statistics.sigma
        ... )
        >>> h = head(student(images))
        >>> loss = ckd.losses.CosineDistillationLoss()(h, head.standardize(bank.rows(sample_ids)))
        >>> like_the_teachers = head.to_teacher(h)
    """

    mean: Tensor
    sigma: Tensor

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        kind: HeadKind = "linear",
        *,
        hidden: int | None = None,
        mean: Tensor | None = None,
        sigma: float = 1.0,
    ) -> None:
        super().__init__()
        if kind not in get_args(HeadKind):
            raise ValueError(unknown("kind of head", kind, get_args(HeadKind)))
        width = max(student_dim, teacher_dim) if hidden is None else hidden
        if min(student_dim, teacher_dim, width) < 1:
            raise ValueError(
                "student_dim, teacher_dim and hidden must be at least 1, got "
                f"{student_dim}, {teacher_dim} and {width}"
            )
        if not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(
                f"sigma must be positive and finite, got {sigma}; it is 0 where all rows are equal"
            )
        if mean is None:
            mean = torch.zeros(teacher_dim)
        else:
            mean = mean.detach().float()
            if mean.shape != (teacher_dim,) or not bool(mean.isfinite().all()):
                raise ValueError(f"mean must be finite, [{teacher_dim}], got {list(mean.shape)}")
        self.student_dim, self.teacher_dim, self.kind = student_dim, teacher_dim, kind
        self.hidden = width if kind == "mlp" else None
        self.net: nn.Module = nn.Linear(student_dim, teacher_dim)
        if kind == "mlp":
            self.net = nn.Sequential(
                nn.Linear(student_dim, width),
                nn.LayerNorm(width),
                nn.GELU(),
                nn.Linear(width, teacher_dim),
            )
        self.register_buffer("mean", mean.clone())
        self.register_buffer("sigma", torch.tensor(float(sigma)))

    def forward(self, student: Tensor) -> Tensor:
        return self.net(student)

    def standardize(self, teacher: Tensor) -> Tensor:
        """(t - mean) / sigma of the teacher's rows [B, D], in float32 (or float64)."""
        return (widened(teacher) - self.mean) / self.sigma

    def to_teacher(self, h: Tensor) -> Tensor:
        """mean + sigma h [B, D], in float32 (or float64): the inverse of `standardize`."""
        return self.mean + self.sigma * widened(h)

    def extra_repr(self) -> str:
        return f"student_dim={self.student_dim}, teacher_dim={self.teacher_dim}, kind={self.kind!r}"
