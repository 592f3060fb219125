"""Argument checks shared by the ops. They read metadata alone (shapes, dtypes, devices), except
`check_scale`: it reads a tensor's value, and so runs inside the op and on the CPU alone."""

from __future__ import annotations

from typing import get_args

import numpy as np
import torch
from torch import Tensor

from ckd import _hints
from ckd.backends.interface import (
    INVALID_WEIGHT,
    MAX_LOGIT_SCALE,
    Inputs,
    Reduction,
    Targets,
)
from ckd.ops._gradients import BANK_GRADIENT

SINGLE = (torch.float16, torch.bfloat16, torch.float32)
# Only with a float64 student: for any other, float64 tensors would cost memory and add no digit.
DOUBLE = (*SINGLE, torch.float64)


def check_inputs(inputs: Inputs) -> None:
    """Raise TypeError or ValueError that names the argument, what was expected and the remedy."""
    student, bank, weight, bias, _ = inputs
    _check_tensor("student", student, ("B", "W"), DOUBLE)
    dtypes = DOUBLE if student.dtype == torch.float64 else SINGLE
    _check_tensor("bank", bank, ("K", "D"), dtypes, student)
    if bank.requires_grad:
        raise ValueError(BANK_GRADIENT)
    if bank.shape[0] == 0:
        raise ValueError("bank must hold at least one row, got shape [0, D]")
    if weight is None:
        if bias is not None:
            raise ValueError("bias needs weight: without a projection pass bias=None")
        if bank.shape[1] != student.shape[1]:
            raise ValueError(
                f"without weight, bank and student must have the same width, got bank "
                f"{list(bank.shape)} and student {list(student.shape)}; pass weight "
                f"[{student.shape[1]}, {bank.shape[1]}] to project the bank"
            )
        return
    _check_tensor("weight", weight, ("W", "D"), dtypes, student)
    width, dim = weight.shape
    if (width, dim) == (bank.shape[1], student.shape[1]) and width != dim:
        raise ValueError(
            f"weight must have shape [{dim}, {width}], from the width of the bank to that of the "
            f"student, got {list(weight.shape)}; pass weight.T"
        )
    if dim == bank.shape[1] and width != student.shape[1]:
        raise ValueError(
            f"student must have the width that weight {list(weight.shape)} projects the bank to, "
            f"[B, {width}], got {list(student.shape)}"
        )
    _check_shape("weight", weight, (student.shape[1], bank.shape[1]))
    if bias is not None:
        _check_tensor("bias", bias, ("W",), dtypes, student)
        _check_shape("bias", bias, (student.shape[1],))


def check_targets(targets: Targets, inputs: Inputs) -> None:
    """Check all but the values of the targets: those are left to the backends, which read them."""
    _check_target(targets.target, inputs.student)
    check_options(targets.label_smoothing, targets.ignore_index, targets.reduction)


def check_weighted_targets(target: Tensor, weight: Tensor | None, student: Tensor) -> None:
    """Check `target` [B, M] and `target_weight`, but for their values."""
    _check_target(target, student)
    if 0 in target.shape[1:]:
        raise ValueError(
            "target must hold at least one row of the bank for each student, got shape "
            f"{list(target.shape)}"
        )
    if weight is None:
        return
    _check_type("target_weight", weight)
    if weight.shape != target.shape:
        raise ValueError(
            f"target_weight must have the shape of target, {list(target.shape)}, got "
            f"{list(weight.shape)}"
        )
    _check_tensor("target_weight", weight, ("B", "M")[: target.dim()], DOUBLE, student)
    if weight.requires_grad:
        raise ValueError(
            "target_weight never receives a gradient, but target_weight.requires_grad is True; "
            "pass target_weight.detach()"
        )


def _check_target(target: Tensor, student: Tensor) -> None:
    _check_type("target", target)
    if target.dim() not in (1, 2):
        raise ValueError(f"target must have shape [B] or [B, M], got {list(target.shape)}")
    if target.is_floating_point() and target.dim() == 2:
        raise ValueError(
            f"target must be rows of the bank, int64 [B] or [B, M], got {_names((target.dtype,))} "
            f"{list(target.shape)}; pass the rows of the largest probabilities with their values: "
            "target_weight, target = probabilities.topk(M)"
        )
    _check_tensor("target", target, ("B", "M")[: target.dim()], (torch.int64,), student)
    _check_shape("target", target, (student.shape[0], *target.shape[1:]))


def check_options(label_smoothing: float, ignore_index: int, reduction: str) -> None:
    """Check the options of the loss; `reduction` may be any object."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if ignore_index == INVALID_WEIGHT:
        raise ValueError(f"ignore_index must be above {INVALID_WEIGHT}, which marks wrong weights")
    if reduction not in get_args(Reduction):
        raise ValueError(_hints.unknown("reduction", reduction, get_args(Reduction)))


def scale_tensor(logit_scale: float | Tensor, student: Tensor) -> Tensor:
    """A 0-dim tensor on the student's device: float32, or float64 for a float64 student."""
    _check_type("student", student)
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    if isinstance(logit_scale, Tensor):
        if logit_scale.dim() != 0 or not logit_scale.is_floating_point():
            raise ValueError(
                "logit_scale must be a float or a 0-dim floating-point tensor, got shape "
                f"{list(logit_scale.shape)}, {logit_scale.dtype}; use logit_scale.float().squeeze()"
            )
        if logit_scale.dtype is dtype and logit_scale.device == student.device:
            return logit_scale
        return logit_scale.to(device=student.device, dtype=dtype)
    if not isinstance(logit_scale, (int, float, np.floating, np.integer)):
        raise TypeError(
            f"logit_scale must be a float or a 0-dim tensor, got {type(logit_scale).__name__}"
        )
    if not 0 < logit_scale <= MAX_LOGIT_SCALE:  # only comparisons: torch.compile can trace these
        raise ValueError(_scale_message(logit_scale))
    return torch.full((), logit_scale, dtype=dtype, device=student.device)


def check_scale(logit_scale: Tensor) -> None:
    """Raise ValueError for a scale that is not > 0 and at most MAX_LOGIT_SCALE. On a GPU, where
    reading it would synchronise, nothing is raised and the loss is NaN."""
    if logit_scale.is_cpu and not 0 < logit_scale.item() <= MAX_LOGIT_SCALE:
        raise ValueError(_scale_message(logit_scale.item()))


def _scale_message(value: float) -> str:
    return (
        f"logit_scale must be finite, > 0 and at most 2^100 = {MAX_LOGIT_SCALE:.3g}, got {value}; "
        "it is the factor itself, not its logarithm: pass log_scale.exp() if you hold the logarithm"
    )


def _check_tensor(
    name: str,
    value: Tensor,
    axes: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...],
    student: Tensor | None = None,
) -> None:
    _check_type(name, value)
    where = value.device if student is None else student.device
    if value.dtype not in dtypes or value.device != where:
        known = _names(dtypes)
        # The remedy keeps an allowed dtype; else it is float32, but float16 for a (large) bank.
        wide = torch.float32 if torch.float32 in dtypes and name != "bank" else dtypes[0]
        remedy = f'{name}.to("{where}", {value.dtype if value.dtype in dtypes else wide})'
        raise ValueError(
            f"{name} must be {known} on {where}, got {_names((value.dtype,))} on {value.device}; "
            f"convert with {remedy}"
        )
    if value.dim() != len(axes):
        raise ValueError(
            f"{name} must have shape [{', '.join(axes)}], got {list(value.shape)} "
            f"({value.dim()} dimensions)"
        )


def _check_type(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise ValueError(
            f"{name} must have shape {list(shape)} to fit student and bank, got {list(value.shape)}"
        )


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    names = [str(d).removeprefix("torch.") for d in dtypes]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
