"""The records that pass between the ops and the backends, and the settings that both depend on."""

from __future__ import annotations

from typing import Literal, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

DEFAULT_CACHE_LIMIT = 128 << 20
_cache_limit = DEFAULT_CACHE_LIMIT
settings_version = 0  # +1 on each change of a setting; part of every plan's cache key


def invalidate_plans() -> None:
    """Invalidate all cached plans: to be called when a setting that plans depend on changes."""
    global settings_version
    settings_version += 1


def cache_limit() -> int:
    """The most bytes of the projected bank that a forward keeps for its backward (see
    `set_cache_limit`)."""
    return _cache_limit


def set_cache_limit(limit: int) -> None:
    """Let a forward keep up to `limit` bytes of the projected bank for its backward.

    The backward for weight and bias projects all other rows again, 2 D W operations each. A kept
    row takes W float16 numbers on a GPU or W bfloat16 ones on the CPU where half precision is
    permitted, else W float32 ones (`cuda`: 3 W float16). A GPU keeps all rows or none. The default
    is 128 MiB.

    Raises ValueError for a negative limit.

    >>> ckd.backends.set_cache_limit(1 << 30)  # 1 GiB: a million rows at W = 256
    """
    global _cache_limit
    if not isinstance(limit, int) or limit < 0:
        raise ValueError(f"limit must be a number of bytes, an int >= 0, got {limit!r}")
    _cache_limit = limit
    invalidate_plans()


# Below it neither logits, nor the sum of 2^26 losses, nor scale / norm overflow float32.
MAX_LOGIT_SCALE = 2.0**100

# The target of a student with an invalid weight: out of range, so that its loss is NaN on a GPU.
INVALID_WEIGHT = -(1 << 63)

Reduction = Literal["none", "sum", "mean"]
BackendName = Literal["auto", "triton", "cuda", "cpu", "reference"]


class Inputs(NamedTuple):
    """The tensors that are compared."""

    student: Tensor  # [B, W]
    bank: Tensor  # [K, D]
    weight: Tensor | None  # [W, D]
    bias: Tensor | None  # [W]
    logit_scale: Tensor  # 0-dim, float32, or float64 for a float64 student


class Targets(NamedTuple):
    """The targets of the contrastive cross-entropy, and how it treats them.

    A distribution q_i over the bank's rows is stored as the one-hot distribution of `target` and
    the difference from it, the shift: -sum_k q_ik l_ik = -l_{i,y} - sum_m shift_im l_{i,rows_im}.
    The sum over m is linear in the logits, so it stays out of the softmax.
    """

    target: Tensor  # [B] int64: y, the row that the softmax sums leave out
    shift_rows: Tensor | None  # [B, M] int64 rows of the bank; None: no shift, q is one-hot
    shift: Tensor | None  # [B, M] float32 or float64; the sum of each row is 0; 0 where ignored
    label_smoothing: float
    ignore_index: int
    reduction: Reduction


class Split(NamedTuple):
    """The distributions of weighted targets, and how much each student counts."""

    target: Tensor  # [B] int64: the row with the largest weight
    shift_rows: Tensor | None  # [B, M]; None if M is 1
    shift: Tensor | None  # [B, M] times (1 - label_smoothing)
    total: Tensor  # [B] the sum of a student's weights
    kept: Tensor  # 0-dim: the number of students with a target, at least 1


class Plan(NamedTuple):
    """The backend that computes a call, and the precision that it may use."""

    backend: str
    allow_half: bool  # see Problem: the backend may still use float32


class Keep(NamedTuple):
    """Which fields of Forward the contrastive cross-entropy keeps for its backward."""

    residual: bool
    attention: bool
    cache_bytes: int


class Problem(NamedTuple):
    """The metadata of a call, by which backends decide whether they can serve it.

    `allow_half` permits rounding the operands of matrix products to half precision (sums and the
    softmax stay float32): the student is in half precision, or autocast is on.
    """

    op: str
    batch: int  # B, student rows
    bank_rows: int  # K
    teacher_dim: int  # D
    student_dim: int  # W
    device_type: str
    student_dtype: torch.dtype
    bank_dtype: torch.dtype
    weight_dtype: torch.dtype | None  # None: no projection
    allow_half: bool
    cache_limit: int  # most bytes of the projected bank that the forward keeps
    device_index: int | None  # None for a device type that has a single device
    targets: int = 0  # M, bank rows with a shift for each student (see Targets); 0: no shift

    @classmethod
    def of(
        cls, op: str, student: Tensor, bank: Tensor, weight: Tensor | None, targets: int = 0
    ) -> Problem:
        device_type = student.device.type
        half_student = student.dtype in (torch.float16, torch.bfloat16)
        return cls(
            op=op,
            batch=student.shape[0],
            bank_rows=bank.shape[0],
            teacher_dim=bank.shape[1],
            student_dim=student.shape[1],
            device_type=device_type,
            student_dtype=student.dtype,
            bank_dtype=bank.dtype,
            weight_dtype=None if weight is None else weight.dtype,
            allow_half=half_student
            or (device_type != "meta" and torch.is_autocast_enabled(device_type)),
            cache_limit=_cache_limit,
            device_index=student.device.index,
            targets=targets,
        )


class Forward(NamedTuple):
    """The results of the contrastive cross-entropy; float32, or float64 for a float64 student.

    The fields after lse are for the backward: with them it computes the gradients of student and
    logit_scale without reading the bank again.
    """

    loss: Tensor  # [B] for reduction "none": nll, 0 where ignored; else 0-dim
    lse: Tensor  # [B] log sum exp over the whole bank
    kept: Tensor  # 0-dim, for reduction "mean": number of rows not ignored, at least 1; else [0]
    p_other: Tensor  # [B] probability of all rows but the target, accurate when it is tiny
    residual: Tensor  # [B, W] d nll / d (logit_scale u); [0] unless kept
    attention: Tensor  # [B, W] d lse / d (logit_scale u) = sum_k p_k n_k; [0] unless kept
    cache: Tensor  # uint8 [Keep.cache_bytes], in the backend's own format


class Saved(NamedTuple):
    """The outputs of the forward that the backward reads: all but the loss."""

    lse: Tensor
    kept: Tensor
    p_other: Tensor
    residual: Tensor
    attention: Tensor
    cache: Tensor


class Upstream(NamedTuple):
    """Gradients of the outputs of the contrastive cross-entropy; None: zeros."""

    d_loss: Tensor | None  # shaped as the loss
    d_lse: Tensor | None  # [B]


class Needs(NamedTuple):
    """Which gradients autograd requests."""

    student: bool
    weight: bool
    bias: bool
    logit_scale: bool


class Gradients(NamedTuple):
    """Gradients in their inputs' dtypes; an empty tensor [0] where none is requested."""

    student: Tensor
    weight: Tensor
    bias: Tensor
    logit_scale: Tensor


class Backend(Protocol):
    """A module of `ckd.backends`. ckd/backends/reference.py defines the results."""

    def missing(self) -> str | None:
        """Why this installation cannot run the backend at all, or None."""

    def unsupported(self, problem: Problem) -> str | None:
        """Why the backend cannot serve a problem, in words, or None."""

    def contrastive_ce_cache_bytes(self, problem: Problem) -> int:
        """The size of Forward.cache in bytes, for a call with a gradient of weight or bias."""

    def split_targets(
        self,
        target: Tensor,
        weight: Tensor | None,
        bank_rows: int,
        ignore_index: int,
        label_smoothing: float,
        dtype: torch.dtype,
    ) -> Split:
        """See `ckd.backends.targets.split_targets`."""

    def contrastive_ce_forward(
        self, inputs: Inputs, targets: Targets, plan: Plan, keep: Keep
    ) -> Forward: ...

    def contrastive_ce_backward(
        self,
        upstream: Upstream,
        inputs: Inputs,
        targets: Targets,
        plan: Plan,
        saved: Saved,
        needs: Needs,
    ) -> Gradients: ...

    def similarity_forward(self, inputs: Inputs, plan: Plan) -> Tensor: ...

    def similarity_backward(
        self, d_logits: Tensor, inputs: Inputs, plan: Plan, needs: Needs
    ) -> Gradients: ...


def zero_gradients(inputs: Inputs, needs: Needs) -> Gradients:
    """The gradients of a batch without students."""
    differentiable = (inputs.student, inputs.weight, inputs.bias, inputs.logit_scale)
    pairs = zip(differentiable, needs)
    nothing = inputs.student.new_empty
    return Gradients(
        *(torch.zeros_like(x) if x is not None and need else nothing(0) for x, need in pairs)
    )


def reduce_rows(nll: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Forward.loss and Forward.kept from the rows' losses [B]. The mean over no rows is 0."""
    if targets.reduction != "mean":
        return nll if targets.reduction == "none" else nll.sum(), nll.new_empty(0)
    kept = (targets.target != targets.ignore_index).sum().clamp_(min=1).to(nll.dtype)
    return nll.sum() / kept, kept


def check_targets(targets: Targets, bank_rows: int) -> None:
    """Raise IndexError for a target out of range. On a GPU, where reading targets would
    synchronise, nothing is read, and the kernels give such a row the loss NaN."""
    target = targets.target
    if target.device.type != "cpu" or len(target) == 0:
        return
    bad = ((target < 0) | (target >= bank_rows)) & (target != targets.ignore_index)
    if bad.any():
        refuse_target(targets, int(bad.nonzero()[0]), bank_rows)


def refuse_target(targets: Targets, row: int, bank_rows: int) -> NoReturn:
    target = int(targets.target[row])
    if target == INVALID_WEIGHT:
        raise ValueError(
            f"target_weight must be finite and at least 0, with finite sums over a student's "
            f"targets, but target_weight[{row}] is not"
        )
    raise IndexError(
        f"target[{row}] = {target} is out of range for a bank of {bank_rows} "
        f"rows; expected 0 <= target < {bank_rows}, or ignore_index ({targets.ignore_index})"
    )
