"""Contrast with a bank: the op with a trainable projection and scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ckd.backends.interface import BackendName, Reduction
from ckd.ops import _arguments, contrastive_cross_entropy


class EmbeddingDistillationLoss(nn.Module):
    """Contrastive cross-entropy against a teacher's embeddings, with a trainable projection.

        loss = contrastive_cross_entropy(student, bank, target, weight, bias, exp(log_logit_scale))

    (CLIP-Embed-KD, arXiv 2404.06170.) The module owns `weight` [student_dim, teacher_dim] and
    `bias` [student_dim], initialised like `nn.Linear`, and `log_logit_scale`, a 0-dim parameter
    (a buffer when the scale is fixed) that holds the logarithm of the scale, as in CLIP. Give its
    parameters to the optimizer with the student's. The trained student does not need the module.

    Args:
        student_dim: W, width of the student's embedding.
        teacher_dim: D, width of the bank.
        projection: False compares students with the bank itself, which needs D == W.
        bias: whether the projection has a bias.
        logit_scale: initial (or fixed) inverse temperature; 14.2857 = 1 / 0.07 as in CLIP.
        learn_logit_scale: False keeps it fixed.
        max_logit_scale: each forward clamps the learned scale to this, up to rounding (CLIP: 100).
        label_smoothing, ignore_index, reduction, backend: as for the op.

    Shapes: forward(student [B, W], bank [K, D], target [B]) -> scalar, or [B] for "none"; also
    forward(student, bank, target [B, M], target_weight [B, M]), as for the op.

    Under DistributedDataParallel the module is used like any other. torch's `fully_shard` takes no
    0-dim parameter: `fully_shard(criterion, ignored_params={criterion.log_logit_scale})`, and
    average this one's gradient over the ranks before each step, or pass `learn_logit_scale=False`.

    Raises:
        ValueError: dimensions, scale or options out of range; the message names the argument.

    Example:
        >>> criterion = ckd.EmbeddingDistillationLoss(256, 1024)
        >>> loss = criterion(student(images), bank.centroids().half(), labels)
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        projection: bool = True,
        bias: bool = True,
        logit_scale: float = 14.2857,
        learn_logit_scale: bool = True,
        max_logit_scale: float = 100.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        backend: BackendName = "auto",
    ) -> None:
        super().__init__()
        if student_dim < 1 or teacher_dim < 1:
            raise ValueError(
                "student_dim and teacher_dim must be at least 1, "
                f"got student_dim={student_dim}, teacher_dim={teacher_dim}"
            )
        if not projection and student_dim != teacher_dim:
            raise ValueError(
                f"projection=False needs student_dim == teacher_dim, got {student_dim} and "
                f"{teacher_dim}; leave projection=True to map {teacher_dim} to {student_dim}"
            )
        if not (math.isfinite(logit_scale) and 0 < logit_scale <= max_logit_scale):
            raise ValueError(
                f"logit_scale must lie in (0, max_logit_scale = {max_logit_scale}], "
                f"got {logit_scale}"
            )
        _arguments.check_options(label_smoothing, ignore_index, reduction)
        self.student_dim, self.teacher_dim = student_dim, teacher_dim
        self.initial_logit_scale = logit_scale
        self.max_logit_scale = max_logit_scale
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.backend = backend

        self.weight = nn.Parameter(torch.empty(student_dim, teacher_dim)) if projection else None
        self.bias = nn.Parameter(torch.empty(student_dim)) if projection and bias else None
        log_scale = torch.empty(())
        if learn_logit_scale:
            self.log_logit_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_logit_scale", log_scale)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the projection as `nn.Linear` does, uniform in +-1 / sqrt(teacher_dim), and set the
        scale to its initial value."""
        bound = 1 / math.sqrt(self.teacher_dim)
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)
        nn.init.constant_(self.log_logit_scale, math.log(self.initial_logit_scale))

    @property
    def logit_scale(self) -> Tensor:
        """The current scale, 0-dim, differentiable if it is learned."""
        return self.log_logit_scale.exp()

    def forward(
        self, student: Tensor, bank: Tensor, target: Tensor, target_weight: Tensor | None = None
    ) -> Tensor:
        if self.log_logit_scale.requires_grad:
            # The parameter is clamped, not its exponential: the gradient of a clamped exponential
            # is zero above the maximum, so that a parameter there would stay there.
            with torch.no_grad():
                self.log_logit_scale.clamp_(max=math.log(self.max_logit_scale))
        return contrastive_cross_entropy(
            student,
            bank,
            target,
            self.weight,
            self.bias,
            self.logit_scale,
            target_weight=target_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"student_dim={self.student_dim}, teacher_dim={self.teacher_dim}, "
            f"projection={self.weight is not None}, bias={self.bias is not None}, "
            f"learn_logit_scale={isinstance(self.log_logit_scale, nn.Parameter)}, "
            f"max_logit_scale={self.max_logit_scale}, backend={self.backend!r}"
        )
