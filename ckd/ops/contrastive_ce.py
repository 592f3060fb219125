"""Contrastive cross-entropy of student rows against a bank of teacher embeddings, as one op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from ckd import backends
from ckd.backends.interface import Needs, Options, Problem, Reduction, Saved
from ckd.ops import _arguments
from ckd.ops._gradients import fake_gradients, or_none
from ckd.ops._library import Op
from ckd.ops._plans import Plan, Plans


@overload
def contrastive_cross_entropy(
    student: Tensor,
    bank: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def contrastive_cross_entropy(
    student: Tensor,
    bank: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def contrastive_cross_entropy(
    student: Tensor,
    bank: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Cross-entropy over scaled cosine similarities to every row of the bank.

        u_i = s_i / |s_i|          n_k = z_k / |z_k|,  z_k = P t_k + b
        l_ik = logit_scale u_i.n_k
        nll_i = log sum_k exp l_ik - l_{i, target_i}

    This is the objective of CLIP-Embed-KD (arXiv 2404.06170), in which stored teacher embeddings
    take the place of a running teacher; with the teacher embeddings of the batch as bank and
    `arange(B)` as target it is CLIP's image-to-text half (arXiv 2103.00020). The [B, K] logits
    are never held in memory.

    Args:
        student: [B, W] float32, float16 or bfloat16 (float64 for gradient checks). Gradient.
        bank: [K, D] float16, bfloat16 or float32 teacher embeddings, any norm. Never a gradient.
        target: [B] int64, a row of the bank for each student row, or `ignore_index`.
        weight: P [W, D], the projection from teacher to student width; None when D == W. Gradient.
        bias: b [W], or None. Gradient.
        logit_scale: inverse temperature, a float or 0-dim tensor, > 0 and already exponentiated.
            Gradient.
        label_smoothing: mass in [0, 1] spread evenly over the bank, as in
            `torch.nn.functional.cross_entropy`.
        ignore_index: rows with this target have loss 0 and no gradient.
        reduction: "mean" over the rows that are not ignored (0 if there are none), "sum", "none".
        return_lse: also return lse_i = log sum_k exp l_ik, of every row, differentiable.
        backend: "auto", or a name from `ckd.backends.available()`, which then never falls back.

    Returns:
        The loss: 0-dim, or [B] for reduction "none"; with `return_lse` also lse [B]. float32
        (float64 for a float64 student), also under autocast, which lets the backend use
        half-precision operands with float32 accumulation. Gradients have their inputs' dtypes.

    A student or projected bank row with norm below 1e-6 has zero logits and zero gradient. A
    student row with NaN or inf, or whose norm is not finite, has a NaN loss. Second derivatives
    are not implemented.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, device, shape or value.
        IndexError: a target out of range, on the CPU. On a GPU, where looking would need a
            synchronisation, that row's loss is NaN and its gradient zero.
        ckd.backends.BackendError: the named backend cannot serve the call.

    Example:
        >>> student = torch.randn(64, 256, requires_grad=True)
        >>> bank = torch.randn(1000, 1024).half()
        >>> weight = torch.randn(256, 1024, requires_grad=True)
        >>> target = torch.randint(1000, (64,))
        >>> loss = ckd.contrastive_cross_entropy(student, bank, target, weight, logit_scale=14.3)
        >>> loss.backward()
    """
    scale = _arguments.scale_tensor(logit_scale, student)
    tensors = (student, bank, target, weight, bias, scale)
    plan = _plans(tensors, (label_smoothing, ignore_index, reduction, return_lse, backend))
    loss, lse, *_ = plan.way(plan.options, *tensors)
    return (loss, lse) if return_lse else loss


def _examine(
    student: Tensor,
    bank: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    return_lse: bool,
    backend: str,
) -> Plan:
    _arguments.check_matrices(student, bank, weight, bias)
    _arguments.check_target(target, student)
    _arguments.check_options(label_smoothing, ignore_index, reduction)

    problem = Problem.of("contrastive_ce", student, bank, weight)
    name = backends.resolve(backend, problem)
    # Without a gradient for student or scale the forward need not accumulate sum_k p_k n_k.
    row_gradients = torch.is_grad_enabled() and (student.requires_grad or logit_scale.requires_grad)
    projection_gradients = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (weight, bias)
    )
    keep = backends.ORDER[name].contrastive_ce_cache_bytes if projection_gradients else None
    return Plan(
        _forward.way((student, bank, target, weight, bias, logit_scale)),
        (
            row_gradients,
            row_gradients and return_lse,
            0 if keep is None else keep(problem),
            float(label_smoothing),
            ignore_index,
            reduction,
            problem.allow_half,
            name,
        ),
    )


def _implementation(
    student: Tensor,
    bank: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor,
    save_residual: bool,
    save_attention: bool,
    cache_bytes: int,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    allow_half: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _arguments.check_scale(logit_scale)
    return backends.ORDER[backend].contrastive_ce_forward(
        student,
        bank,
        target,
        weight,
        bias,
        logit_scale,
        Options(label_smoothing, ignore_index, allow_half, cast(Reduction, reduction)),
        save_residual=save_residual,
        save_attention=save_attention,
        cache_bytes=cache_bytes,
    )


def _fake(
    student: Tensor,
    bank: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor,
    save_residual: bool,
    save_attention: bool,
    cache_bytes: int,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    row = logit_scale.new_empty(student.shape[0])
    matrix, nothing = logit_scale.new_empty(student.shape), logit_scale.new_empty(0)
    residual = matrix if save_residual else nothing
    attention = matrix if save_attention else nothing
    return (
        logit_scale.new_empty(row.shape if reduction == "none" else ()),
        row,
        logit_scale.new_empty(() if reduction == "mean" else 0),
        torch.empty_like(row),
        torch.empty_like(residual),
        torch.empty_like(attention),
        logit_scale.new_empty(cache_bytes, dtype=torch.uint8),
    )


def _backward_implementation(
    d_loss: Tensor | None,
    d_lse: Tensor | None,
    student: Tensor,
    bank: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    allow_half: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept, wanted = Saved(*saved), Needs(*needs)
    if d_lse is not None and (wanted.student or wanted.logit_scale) and kept.attention.dim() < 2:
        raise ValueError(
            "a gradient of lse for student or logit_scale needs what ckd::contrastive_ce keeps "
            "with save_attention=True, but it was called with False"
        )
    return backends.ORDER[backend].contrastive_ce_backward(
        d_loss,
        d_lse,
        student,
        bank,
        target,
        weight,
        bias,
        logit_scale,
        kept,
        wanted,
        Options(label_smoothing, ignore_index, allow_half, cast(Reduction, reduction)),
    )


def _backward_fake(
    d_loss: Tensor | None,
    d_lse: Tensor | None,
    student: Tensor,
    bank: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_gradients(student, weight, bias, logit_scale, needs)


_forward = Op("contrastive_ce", _implementation, _fake, tensors=6)
_backward = Op("contrastive_ce_backward", _backward_implementation, _backward_fake, tensors=8)
_plans = Plans(_examine)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        compute: Callable[..., tuple[Tensor, ...]],
        options: tuple[Any, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        output = compute(*tensors, *options)
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        _, _, _, *ctx.options = options
        return output

    @staticmethod
    def backward(
        ctx: Any, d_loss: Tensor | None, d_lse: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        student, bank, target, weight, bias, logit_scale, *saved = ctx.saved_tensors
        _, _, wants_student, _, _, wants_weight, wants_bias, wants_scale = ctx.needs_input_grad
        needs = Needs(wants_student, wants_weight, wants_bias, wants_scale)
        tensors = (student, bank, target, weight, bias, logit_scale)
        gradients = _backward(d_loss, d_lse, *tensors, saved, needs, *ctx.options)
        d_student, d_weight, d_bias, d_scale = or_none(gradients, needs)
        return None, None, d_student, None, None, d_weight, d_bias, d_scale


_forward.differentiate(_Differentiable)
_backward.refuse_derivative()
