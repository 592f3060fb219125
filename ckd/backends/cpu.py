"""The ops in C++ on the CPU: csrc/cpu, compiled for several instruction sets ("tiers").

Arithmetic is float32. Where half precision is allowed (by the problem, or by
`torch.set_float32_matmul_precision("medium")`) and the tier has it, matrix operands are rounded to
bfloat16; sums, softmax and norms stay float32. Results are bitwise equal for any number of threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import overload

import torch
from torch import Tensor

from ckd.backends import native
from ckd.backends.interface import (
    Forward,
    Gradients,
    Inputs,
    Keep,
    Needs,
    Plan,
    Problem,
    Saved,
    Targets,
    Upstream,
    invalidate_plans,
    refuse_target,
)
from ckd.backends.native import _C
from ckd.backends.precision import float32_products
from ckd.backends.targets import split_targets as split_targets

# name -> has bfloat16 arithmetic; the best first
TIERS = dict(_C.cpu_tiers()) if native.missing is None else {}
ELEMENTS = {
    torch.float16: 0,
    torch.bfloat16: 1,
    torch.float32: 2,
}  # Element of csrc/cpu/arguments.h
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}  # Reduction of csrc/cpu/arguments.h
PANEL = 64  # bank rows of a panel: the cache holds whole panels
CACHE_HEADER_BYTES = 64
SMALL_WORKSPACE = 1 << 20  # bytes

# Fast CPU allocation, in half the time of torch.empty: `new_empty` ignores torch's default dtype
# and device, and the new_empty of a tensor over a buffer gives a real tensor even under
# FakeTensorMode.
_empty = torch.frombuffer(bytearray(4), dtype=torch.float32).new_empty
_empty_bytes = torch.frombuffer(bytearray(4), dtype=torch.uint8).new_empty

_tier = next(iter(TIERS), "")


@contextlib.contextmanager
def use_tier(name: str) -> Iterator[None]:
    """Compute with the named instruction set instead of the best one: for tests and benchmarks.

    Not thread-safe. Raises ValueError for a tier that does not run here (see TIERS).
    """
    global _tier
    if name not in TIERS:
        raise ValueError(f"tier must be one of {', '.join(TIERS)} on this machine, got {name!r}")
    before, _tier = _tier, name
    invalidate_plans()
    try:
        yield
    finally:
        _tier = before
        invalidate_plans()


def missing() -> str | None:
    """Why this installation cannot run the backend at all, or None."""
    return native.missing


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot serve the problem, or None."""
    return native.missing or unfit(problem)


def unfit(problem: Problem) -> str | None:
    """Why the kernels cannot serve the problem even where they are built, or None."""
    if problem.device_type != "cpu":
        return f"the tensors are on {problem.device_type}"
    if problem.student_dtype == torch.float64:
        return "a float64 student is for the reference backend alone"
    if problem.student_dim == 0 or problem.teacher_dim == 0:
        return "the tensors have rows of width 0"
    return None


def contrastive_ce_cache_bytes(problem: Problem) -> int:
    """Size of the forward's cache for the backward (Cache of csrc/cpu/arguments.h): a header, two
    floats for each student, and panels of projected bank rows. A panel takes 64 x `words` words of
    4 bytes and 64 inverse norms. A word is one float32 or two bfloat16 (gemm.h), `words` their
    number in a row of width W, padded as AMX needs it; other tiers may need less."""
    panels = (problem.bank_rows + PANEL - 1) // PANEL
    half = problem.allow_half and TIERS[_tier]
    words = 16 * ((problem.student_dim + 31) // 32) if half else problem.student_dim
    size = 4 * PANEL * (words + 1)
    students = 64 * ((problem.batch + 7) // 8)
    return CACHE_HEADER_BYTES + students + min(panels, problem.cache_limit // size) * size


def contrastive_ce_forward(inputs: Inputs, targets: Targets, plan: Plan, keep: Keep) -> Forward:
    call = _Call(inputs, plan)
    batch, width = inputs.student.shape
    loss = _empty(batch) if targets.reduction == "none" else _empty(())
    kept = _empty(()) if targets.reduction == "mean" else _empty(0)
    lse, p_other = _empty(batch), _empty(batch)
    residual = _empty(batch, width) if keep.residual else _empty(0)
    attention = _empty(batch, width) if keep.attention else _empty(0)
    cache = _workspace(keep.cache_bytes)
    contiguous = _contiguous(targets)
    bad = _C.cpu_contrastive_ce_forward(
        inputs=call.inputs,
        targets=_targets(*contiguous, targets),
        cache=(cache.data_ptr(), keep.cache_bytes),
        loss=loss.data_ptr(),
        kept=kept.data_ptr(),
        lse=lse.data_ptr(),
        p_other=p_other.data_ptr(),
        residual=residual.data_ptr(),
        attention=attention.data_ptr(),
    )
    if bad >= 0:
        refuse_target(targets, bad, len(inputs.bank))
    return Forward(loss, lse, kept, p_other, residual, attention, cache)


def contrastive_ce_backward(
    upstream: Upstream, inputs: Inputs, targets: Targets, plan: Plan, saved: Saved, needs: Needs
) -> Gradients:
    call = _Call(inputs, plan)
    gradients = call.empty_gradients(needs)
    contiguous = _contiguous(targets)
    d_loss, d_lse = _single(upstream.d_loss), _single(upstream.d_lse)
    _C.cpu_contrastive_ce_backward(
        inputs=call.inputs,
        targets=_targets(*contiguous, targets),
        cache=(saved.cache.data_ptr(), saved.cache.numel()),
        d_loss=_address(d_loss),
        kept=saved.kept.data_ptr(),
        d_lse=_address(d_lse),
        lse=saved.lse.data_ptr(),
        p_other=saved.p_other.data_ptr(),
        residual=saved.residual.data_ptr(),
        attention=saved.attention.data_ptr(),
        d_student=gradients.student.data_ptr(),
        d_weight=gradients.weight.data_ptr(),
        d_bias=gradients.bias.data_ptr(),
        d_logit_scale=gradients.logit_scale.data_ptr(),
    )
    return _in_dtypes_of(gradients, inputs)


def similarity_forward(inputs: Inputs, plan: Plan) -> Tensor:
    logits = _empty(len(inputs.student), len(inputs.bank))
    call = _Call(inputs, plan)
    _C.cpu_similarity_forward(inputs=call.inputs, logits=logits.data_ptr())
    return logits


def similarity_backward(d_logits: Tensor, inputs: Inputs, plan: Plan, needs: Needs) -> Gradients:
    call = _Call(inputs, plan)
    gradients = call.empty_gradients(needs)
    d_logits = _single(d_logits)
    _C.cpu_similarity_backward(
        inputs=call.inputs,
        d_logits=d_logits.data_ptr(),
        d_student=gradients.student.data_ptr(),
        d_weight=gradients.weight.data_ptr(),
        d_bias=gradients.bias.data_ptr(),
        d_logit_scale=gradients.logit_scale.data_ptr(),
    )
    return _in_dtypes_of(gradients, inputs)


class _Call:
    """The inputs in the kernels' form; holds the tensors whose addresses it passes.

    Kernels read the bank in place, in any dtype and with any row stride. The other tensors are
    small and are converted to contiguous float32.
    """

    def __init__(self, inputs: Inputs, plan: Plan) -> None:
        half = TIERS[_tier] and (plan.allow_half or float32_products("cpu") == "bf16")
        student, bank, weight, bias, logit_scale = inputs
        self.student = student = _single(student)
        self.bank = bank = bank if bank.stride(1) == 1 else bank.contiguous()
        self.weight, self.bias = _single(weight), _single(bias)
        self.inputs = (
            _tier,
            (student.data_ptr(), *student.shape),
            (bank.data_ptr(), ELEMENTS[bank.dtype], *bank.shape, bank.stride(0)),
            _address(self.weight),
            _address(self.bias),
            logit_scale.item(),
            half,
            torch.get_num_threads(),
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
    """x as contiguous float32, or None. Checking first is faster than calling torch for nothing."""
    if x is None or (x.dtype is torch.float32 and x.is_contiguous()):
        return x
    return x.float().contiguous()


def _workspace(size: int) -> Tensor:
    """Uninitialised bytes. Large workspaces come from the kernels' pool, which keeps its memory:
    page faults of fresh memory cost 4 % of a step. Small ones come from torch, which is faster, and
    malloc keeps their pages mapped too."""
    if size <= SMALL_WORKSPACE:
        return _empty_bytes(size)
    return torch.frombuffer(_C.CpuWorkspace(size), dtype=torch.uint8)


def _contiguous(targets: Targets) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """target, shift_rows and shift in the kernels' form."""
    if targets.shift_rows is None:
        return targets.target.contiguous(), None, None
    return targets.target.contiguous(), targets.shift_rows.contiguous(), _single(targets.shift)


def _targets(
    target: Tensor, rows: Tensor | None, shift: Tensor | None, targets: Targets
) -> tuple[int, tuple[int, int, int], int, float, int]:
    return (
        target.data_ptr(),
        (0, 0, 0) if rows is None else (rows.data_ptr(), _address(shift), rows.shape[1]),
        targets.ignore_index,
        targets.label_smoothing,
        REDUCTIONS[targets.reduction],
    )


def _in_dtypes_of(gradients: Gradients, inputs: Inputs) -> Gradients:
    return Gradients(
        _like(gradients.student, inputs.student),
        _like(gradients.weight, inputs.weight),
        _like(gradients.bias, inputs.bias),
        gradients.logit_scale,
    )


def _like(gradient: Tensor, x: Tensor | None) -> Tensor:
    return gradient if x is None or x.dtype is torch.float32 else gradient.to(x.dtype)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
