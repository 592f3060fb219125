"""The ops in C++ on the CPU: csrc/cpu, compiled for several instruction sets ("tiers").

Arithmetic is float32. Where half precision is allowed (by the problem, or by
`torch.set_float32_matmul_precision("medium")`) and the tier has it, matrix operands are rounded to
bfloat16; sums, softmax and norms stay float32. Results are the same bits on any number of threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, overload

import torch
from torch import Tensor

from ckd.backends.interface import (
    Forward,
    Gradients,
    Needs,
    Options,
    Problem,
    Saved,
    changed_settings,
    refuse_target,
)
from ckd.backends.precision import float32_products

_missing: str | None = None
try:
    from ckd import _C  # type: ignore[attr-defined]
except ImportError as error:
    _C: Any = None  # type: ignore[no-redef]
    _missing = f"ckd._C is not installed ({error}); python -m ckd.info says why"

TIERS: dict[str, bool] = dict(_C.cpu_tiers()) if _C is not None else {}  # name -> has bfloat16
ELEMENTS = {
    torch.float16: 0,
    torch.bfloat16: 1,
    torch.float32: 2,
}  # Element of csrc/cpu/arguments.h
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}  # Reduction of csrc/cpu/arguments.h
PANEL = 64  # bank rows of a panel of the cache
CACHE_HEADER_BYTES = 64
SMALL_WORKSPACE = 1 << 20  # bytes
_CPU = torch.device("cpu")

# _empty(2, 3) is what kernels write to, whatever torch's defaults are, in half the time that
# torch.empty takes when all is named. (Of a buffer, real numbers come even under a mode that fakes
# what is created.)
_empty = torch.frombuffer(bytearray(4), dtype=torch.float32).new_empty

_tier = next(iter(TIERS), "")


@contextlib.contextmanager
def use_tier(name: str) -> Iterator[None]:
    """Compute with another instruction set than the best one: for tests and benchmarks.

    Not thread-safe.
    Raises ValueError for a tier that does not run here (see TIERS).
    """
    global _tier
    if name not in TIERS:
        raise ValueError(f"tier must be one of {', '.join(TIERS)} on this machine, got {name!r}")
    before, _tier = _tier, name
    changed_settings()
    try:
        yield
    finally:
        _tier = before
        changed_settings()


def missing() -> str | None:
    """Why this installation cannot run the backend at all, or None."""
    return _missing


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot serve the problem, or None."""
    if _missing is not None:
        return _missing
    if problem.device_type != "cpu":
        return f"the tensors are on {problem.device_type}"
    if problem.student_dtype == torch.float64:
        return "a float64 student is for the reference backend alone"
    if problem.student_dim == 0 or problem.teacher_dim == 0:
        return "rows of width 0"
    return None


def contrastive_ce_cache_bytes(problem: Problem) -> int:
    """Memory for what the forward leaves to the backward (Cache of csrc/cpu/arguments.h): a float
    for each student, and panels of the bank, words(W) rows of 64 words (as AMX pads them; other
    tiers may need less) and 64 inverse norms."""
    panels = (problem.bank_rows + PANEL - 1) // PANEL
    half = problem.allow_half and TIERS[_tier]
    words = 16 * ((problem.student_dim + 31) // 32) if half else problem.student_dim
    size = 4 * PANEL * (words + 1)
    students = 64 * ((problem.batch + 15) // 16)
    return CACHE_HEADER_BYTES + students + min(panels, problem.cache_limit // size) * size


def contrastive_ce_forward(
    student: Tensor,
    bank: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor,
    options: Options,
    *,
    save_residual: bool,
    save_attention: bool,
    cache_bytes: int,
) -> Forward:
    inputs = _Inputs(student, bank, weight, bias, logit_scale, options.allow_half)
    batch, width = student.shape
    loss = _empty(batch) if options.reduction == "none" else _empty(())
    kept = _empty(()) if options.reduction == "mean" else _empty(0)
    lse, p_other = _empty(batch), _empty(batch)
    residual = _empty(batch, width) if save_residual else _empty(0)
    attention = _empty(batch, width) if save_attention else _empty(0)
    cache = _workspace(cache_bytes)
    target = target.contiguous()
    bad = _C.cpu_contrastive_ce_forward(
        *inputs.arguments,
        _targets(target, options),
        (cache.data_ptr(), cache_bytes),
        loss.data_ptr(),
        kept.data_ptr(),
        lse.data_ptr(),
        p_other.data_ptr(),
        residual.data_ptr(),
        attention.data_ptr(),
    )
    if bad >= 0:
        refuse_target(target, bad, len(bank), options.ignore_index)
    return Forward(loss, lse, kept, p_other, residual, attention, cache)


def contrastive_ce_backward(
    d_loss: Tensor | None,
    d_lse: Tensor | None,
    student: Tensor,
    bank: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor,
    saved: Saved,
    needs: Needs,
    options: Options,
) -> Gradients:
    inputs = _Inputs(student, bank, weight, bias, logit_scale, options.allow_half)
    gradients = inputs.empty_gradients(needs)
    target = target.contiguous()
    d_loss, d_lse = _single(d_loss), _single(d_lse)
    _C.cpu_contrastive_ce_backward(
        *inputs.arguments,
        _targets(target, options),
        (saved.cache.data_ptr(), saved.cache.numel()),
        _address(d_loss),
        saved.kept.data_ptr(),
        _address(d_lse),
        saved.lse.data_ptr(),
        saved.p_other.data_ptr(),
        saved.residual.data_ptr(),
        saved.attention.data_ptr(),
        *(gradient.data_ptr() for gradient in gradients),
    )
    return _in_dtypes_of(gradients, student, weight, bias)


def similarity_forward(
    student: Tensor,
    bank: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor,
    allow_half: bool,
) -> Tensor:
    inputs = _Inputs(student, bank, weight, bias, logit_scale, allow_half)
    logits = _empty(len(student), len(bank))
    _C.cpu_similarity_forward(*inputs.arguments, logits.data_ptr())
    return logits


def similarity_backward(
    d_logits: Tensor,
    student: Tensor,
    bank: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor,
    needs: Needs,
    allow_half: bool,
) -> Gradients:
    inputs = _Inputs(student, bank, weight, bias, logit_scale, allow_half)
    gradients = inputs.empty_gradients(needs)
    d_logits = _single(d_logits)
    _C.cpu_similarity_backward(
        *inputs.arguments, d_logits.data_ptr(), *(gradient.data_ptr() for gradient in gradients)
    )
    return _in_dtypes_of(gradients, student, weight, bias)


class _Inputs:
    """Student, bank, projection and scale as the kernels take them, kept alive during the call.

    The bank is read in place, whatever its dtype and the distance of its rows; the rest is small
    and converted to contiguous float32.
    """

    def __init__(
        self,
        student: Tensor,
        bank: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        logit_scale: Tensor,
        allow_half: bool,
    ) -> None:
        half = allow_half or float32_products("cpu") == "bf16"
        self.student = _single(student)
        self.bank = bank if bank.stride(1) == 1 else bank.contiguous()
        self.weight = _single(weight)
        self.bias = _single(bias)
        self.arguments = (
            _tier,
            (
                (self.student.data_ptr(), *student.shape),
                (
                    self.bank.data_ptr(),
                    ELEMENTS[bank.dtype],
                    *bank.shape,
                    self.bank.stride(0),
                ),
                _address(self.weight),
                _address(self.bias),
                logit_scale.item(),
                half and TIERS[_tier],
                torch.get_num_threads(),
            ),
        )

    def empty_gradients(self, needs: Needs) -> Gradients:
        (batch, width), dim = self.student.shape, self.bank.shape[1]
        return Gradients(
            student=_empty(batch, width) if needs.student else _empty(0),
            weight=_empty(width, dim) if needs.weight else _empty(0),
            bias=_empty(width) if needs.bias else _empty(0),
            logit_scale=_empty(()) if needs.logit_scale else _empty(0),
        )


@overload
def _single(x: Tensor) -> Tensor: ...
@overload
def _single(x: Tensor | None) -> Tensor | None: ...
def _single(x: Tensor | None) -> Tensor | None:
    """Contiguous float32. To look first is faster than to let torch find that there is nothing to
    do."""
    if x is None or (x.dtype is torch.float32 and x.is_contiguous()):
        return x
    return x.float().contiguous()


def _workspace(size: int) -> Tensor:
    """Bytes. Many come from the kernels' own memory, which stays allocated: fresh pages cost 4 % of
    a step. Few come from torch, which is faster, and malloc keeps their pages too."""
    if size <= SMALL_WORKSPACE:
        return torch.empty(size, dtype=torch.uint8, device=_CPU)
    return torch.frombuffer(_C.CpuWorkspace(size), dtype=torch.uint8)


def _targets(target: Tensor, options: Options) -> tuple[int, int, float, int]:
    reduction = REDUCTIONS[options.reduction]
    return target.data_ptr(), options.ignore_index, options.label_smoothing, reduction


def _in_dtypes_of(
    gradients: Gradients, student: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Gradients:
    return Gradients(
        _like(gradients.student, student),
        _like(gradients.weight, weight),
        _like(gradients.bias, bias),
        gradients.logit_scale,
    )


def _like(gradient: Tensor, x: Tensor | None) -> Tensor:
    return gradient if x is None or x.dtype is torch.float32 else gradient.to(x.dtype)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
