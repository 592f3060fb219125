"""The ops in Triton kernels (triton_kernels/, installed as ckd._triton), for any GPU it serves.

The bank is projected and normalised a chunk at a time into a workspace, in float16 where half
precision is permitted, else float32 ("ieee", or "tf32" as torch's float32 matmul precision says);
then every kernel reads unit rows. No logits in memory, no atomics on results, no host
synchronisation but for measuring which tiles are fastest, once for each kind of problem.

With TRITON_INTERPRET=1 the same kernels run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from ckd.backends.interface import (
    Forward,
    Gradients,
    Needs,
    Options,
    Problem,
    Saved,
    check_targets,
    reduce_rows,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDTH_MULTIPLE = 16  # rows of the projected bank are whole 32-byte sectors


_installed = importlib.util.find_spec("triton") is not None
# As Triton reads it, once.
_interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def missing() -> str | None:
    """Why no problem at all can be served here."""
    if not _installed:
        return "triton is not installed; pip install triton"
    if interpreted() or torch.cuda.is_available():
        return None
    return "torch sees no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter."""
    return _interpreted


def unsupported(problem: Problem) -> str | None:
    device = "cpu" if interpreted() else "cuda"
    if problem.device_type != device:  # first: asking for GPUs takes longer
        return f"the tensors are on {problem.device_type}, not on {device}"
    reason = missing()
    if reason is not None:
        return reason
    if problem.student_dtype not in DTYPES:
        return f"has no {str(problem.student_dtype).removeprefix('torch.')} arithmetic"
    if max(problem.batch, problem.bank_rows) >= 2**31 - 1024:  # loops count in blocks beyond
        return "has 32-bit row numbers: less than 2^31 - 1024 students and bank rows"
    if problem.student_dim == 0 or problem.teacher_dim == 0:
        return "rows of width 0"
    return None


def contrastive_ce_cache_bytes(problem: Problem) -> int:
    """Two numbers for each student, and room for the whole projected bank and its inverse norms, or
    for none of it."""
    size = 2 if problem.allow_half else 4
    width = -(-problem.student_dim // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    needed = problem.bank_rows * (width * size + 4)
    return reference_bytes(problem.batch) + (needed if needed <= problem.cache_limit else 0)


def reference_bytes(batch: int) -> int:
    """Of the numbers for each student; a multiple of what the bank behind them is aligned to."""
    return -(-8 * batch // 256) * 256


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
    from ckd.backends.triton_launch import FORWARD_BYTES, Call, SoftmaxSums

    check_targets(target, len(bank), options.ignore_index)
    call = Call(student, bank, weight, bias, logit_scale, options.allow_half, FORWARD_BYTES)
    cache = call.empty(cache_bytes, dtype=torch.uint8)
    nll, lse, p_other = (call.empty(call.batch) for _ in range(3))
    residual = call.empty(student.shape if save_residual else 0)
    attention = call.empty(student.shape if save_attention else 0)
    if call.batch > 0:
        with call.on_device():
            keep_values = save_residual or save_attention
            sums = SoftmaxSums(call, target.contiguous(), options, keep_values)
            for chunk in call.chunks(cache):
                sums.add(chunk)
            mean = (call.empty(()), call.empty(())) if options.reduction == "mean" else None
            sums.combine(
                nll,
                lse,
                p_other,
                residual if save_residual else None,
                attention if save_attention else None,
                call.reference(cache),
                mean,
            )
            if mean is not None:
                loss, kept = mean
                return Forward(loss, lse, kept, p_other, residual, attention, cache)
    loss, kept = reduce_rows(nll, target, options)
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
    from ckd.backends.triton_launch import Call, ProjectionGradient, RowGradients, Students

    call = Call(student, bank, weight, bias, logit_scale, options.allow_half)
    if call.batch == 0:
        return call.zero_gradients(needs)
    target = target.contiguous()
    mean = d_loss is not None and options.reduction == "mean"
    d_loss = None if d_loss is None else d_loss.expand(target.shape)
    rows = RowGradients(d_loss, d_lse, saved.kept if mean else None)
    learned = needs.weight or needs.bias
    with call.on_device():
        found = call.student_gradient(
            rows, saved.residual, saved.attention, needs, target, options,
            saved.p_other if learned else None,
        )  # fmt: skip
        if not learned:
            d_scale = found.along.sum() if needs.logit_scale else None
            return call.gradients(found.d_student, None, d_scale, needs)
        d_scale = call.empty(()) if needs.logit_scale else None
        students = Students.of(call, target, rows, saved, options, found, d_scale)
        projection = ProjectionGradient(call, needs)
        for chunk in call.chunks(saved.cache, filled=True):
            projection.add_softmax(chunk, students, options.label_smoothing > 0)
        return call.gradients(found.d_student, projection, d_scale, needs)


def similarity_forward(
    student: Tensor,
    bank: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor,
    allow_half: bool,
) -> Tensor:
    from ckd.backends.triton_launch import Call

    call = Call(student, bank, weight, bias, logit_scale, allow_half)
    out = call.empty(call.batch, call.bank_rows)
    if call.batch > 0:
        with call.on_device():
            u = call.students()
            for chunk in call.chunks():
                call.similarities(u, chunk, out)
    return out


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
    from ckd.backends.triton_launch import Call, Product, ProjectionGradient, RowGradients

    call = Call(student, bank, weight, bias, logit_scale, allow_half)
    if call.batch == 0:
        return call.zero_gradients(needs)
    d_logits = d_logits.float().contiguous()
    with call.on_device():
        u = call.students()
        slope = Product(call, call.batch, call.student_dim)
        projection = ProjectionGradient(call, needs)
        for chunk in call.chunks():
            part = d_logits[:, chunk.first : chunk.first + len(chunk.n)]
            if needs.student or needs.logit_scale:
                slope.add(part, chunk.n, _largest(part), call.operand)
            if needs.weight or needs.bias:
                d_n = Product(call, len(chunk.n), call.width)
                d_n.add(part.T, u, _largest(part.T), call.operand)
                projection.add(chunk, d_n.sum() * call.positive_scale)
        d_student = d_scale = None
        if needs.student or needs.logit_scale:
            rows = RowGradients(call.empty(call.batch).fill_(1), None, None)
            total = slope.sum()
            d_student, along, _ = call.student_gradient(rows, total, total, needs)
            d_scale = along.sum() if needs.logit_scale else None
        return call.gradients(d_student, projection, d_scale, needs)


def _largest(matrix: Tensor) -> Tensor:
    """The largest magnitude of each row."""
    return torch.linalg.vector_norm(matrix, torch.inf, dim=1)
