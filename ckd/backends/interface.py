"""What passes between the ops and the backends."""

from __future__ import annotations

from typing import Literal, NamedTuple, NoReturn

import torch
from torch import Tensor

DEFAULT_CACHE_LIMIT = 128 << 20
_cache_limit = DEFAULT_CACHE_LIMIT
settings = 0  # how often something changed on which a backend's choice or memory hangs


def changed_settings() -> None:
    """To be called after such a change: what examining earlier calls found holds no longer."""
    global settings
    settings += 1


def cache_limit() -> int:
    """Bytes of the projected bank that a forward may keep for its backward; see
    `set_cache_limit`."""
    return _cache_limit


def set_cache_limit(limit: int) -> None:
    """Let a forward keep up to `limit` bytes of the projected bank for its backward.

    Without it the backward for weight and bias projects the bank again: 2 K D W operations. Kept
    rows take W float16 numbers on a GPU and W bfloat16 ones on the CPU where half precision is
    permitted, else W float32 ones; a GPU keeps all rows or none. 128 MiB unless it is set.

    Raises ValueError for a negative limit.

    >>> ckd.backends.set_cache_limit(1 << 30)  # 1 GiB: a million rows at W = 256
    """
    global _cache_limit
    if not isinstance(limit, int) or limit < 0:
        raise ValueError(f"limit must be a number of bytes, an int >= 0, got {limit!r}")
    _cache_limit = limit
    changed_settings()


class Problem(NamedTuple):
    """One call of an op: sizes, dtypes and device, no tensors.

    `allow_half` says that matrix operands may be rounded to half precision (accumulation and the
    softmax stay float32): the student is half precision, or autocast is on.
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
    cache_limit: int  # bytes that the forward may keep of the projected bank
    device_index: int | None  # which of the devices; None for a type that has one

    @classmethod
    def of(cls, op: str, student: Tensor, bank: Tensor, weight: Tensor | None) -> Problem:
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
        )


Reduction = Literal["none", "sum", "mean"]


class Options(NamedTuple):
    """How the contrastive cross-entropy treats targets, and what precision it may use."""

    label_smoothing: float
    ignore_index: int
    allow_half: bool  # see Problem; permission, not an order
    reduction: Reduction


class Forward(NamedTuple):
    """The forward of the contrastive cross-entropy; float32, or float64 for a float64 student.

    All but the loss and lse is for the backward, which for student and logit_scale then needs no
    second look at the bank.
    """

    loss: Tensor  # [B] for reduction "none": nll, 0 where ignored; else 0-dim
    lse: Tensor  # [B] log sum exp over the whole bank
    kept: Tensor  # 0-dim, for reduction "mean": the rows that are not ignored, at least 1; else [0]
    p_other: Tensor  # [B] probability of all rows but the target, exact when it is tiny
    residual: Tensor  # [B, W] d nll / d (logit_scale u); [0] when not asked for
    attention: Tensor  # [B, W] d lse / d (logit_scale u) = sum_k p_k n_k; [0] when not asked for
    cache: Tensor  # uint8 [cache_bytes] what the backend leaves for its own backward


class Saved(NamedTuple):
    """What the backward gets of Forward."""

    lse: Tensor
    kept: Tensor
    p_other: Tensor
    residual: Tensor
    attention: Tensor
    cache: Tensor


class Needs(NamedTuple):
    """Which gradients are asked for."""

    student: bool
    weight: bool
    bias: bool
    logit_scale: bool


class Gradients(NamedTuple):
    """Gradients in their inputs' dtypes; an empty tensor [0] where none was asked for."""

    student: Tensor
    weight: Tensor
    bias: Tensor
    logit_scale: Tensor


def reduce_rows(nll: Tensor, target: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Forward.loss and Forward.kept of the rows' losses [B]. The mean over no rows is 0."""
    if options.reduction != "mean":
        return nll if options.reduction == "none" else nll.sum(), nll.new_empty(0)
    kept = (target != options.ignore_index).sum().clamp_(min=1).to(nll.dtype)
    return nll.sum() / kept, kept


def row_weights(d_loss: Tensor | None, kept: Tensor, options: Options) -> Tensor | None:
    """What is to be taken for d nll, [B] or 0-dim, from d loss."""
    return d_loss / kept if d_loss is not None and options.reduction == "mean" else d_loss


def check_targets(target: Tensor, bank_rows: int, ignore_index: int) -> None:
    """Raise IndexError for a target that is no row of the bank. On a GPU, where looking would be a
    synchronisation, nothing is read, and such a row's loss is NaN."""
    if target.device.type != "cpu" or len(target) == 0:
        return
    bad = ((target < 0) | (target >= bank_rows)) & (target != ignore_index)
    if bad.any():
        refuse_target(target, int(bad.nonzero()[0]), bank_rows, ignore_index)


def refuse_target(target: Tensor, row: int, bank_rows: int, ignore_index: int) -> NoReturn:
    raise IndexError(
        f"target[{row}] = {int(target[row])} is out of range for a bank of {bank_rows} rows; "
        f"expected 0 <= target < {bank_rows}, or ignore_index ({ignore_index})"
    )
