"""Contrastive cross-entropy of student rows against a bank of teacher embeddings, as one op."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from ckd import backends
from ckd.backends.interface import (
    BackendName,
    Forward,
    Gradients,
    Inputs,
    Keep,
    Needs,
    Plan,
    Problem,
    Reduction,
    Saved,
    Targets,
    Upstream,
)
from ckd.backends.targets import split_targets
from ckd.ops import _arguments, _gradients
from ckd.ops._bypass import is_direct, shorten
from ckd.ops._op import GRADIENTS, INPUTS, NEEDS, PLAN, Formula, Op

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Options(TypedDict, total=False):
    target_weight: Tensor | None
    label_smoothing: float
    ignore_index: int
    reduction: Reduction
    backend: BackendName


@overload
def contrastive_cross_entropy(
    student: Tensor,
    bank: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_Options],
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
    return_lse: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...


def contrastive_cross_entropy(
    student: Tensor,
    bank: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    *,
    target_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    return_lse: bool = False,
    backend: BackendName = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Cross-entropy over scaled cosine similarities to every row of the bank.

        u_i = s_i / |s_i|          n_k = z_k / |z_k|,  z_k = P t_k + b
        l_ik = logit_scale u_i.n_k
        nll_i = log sum_k exp l_ik - l_{i, target_i}

    With several targets a student, nll_i = -sum_m w_im log p_{i, target_im}, where p is the softmax
    of l over the bank and w is `target_weight`.

    This is the objective of CLIP-Embed-KD (arXiv 2404.06170), in which stored teacher embeddings
    take the place of a running teacher. With the teacher embeddings of the batch as bank and
    `arange(B)` as target it is the image-to-text half of CLIP's loss (arXiv 2103.00020). The
    [B, K] logits are never held in memory.

    Args:
        student: [B, W] float32, float16 or bfloat16 (float64 for gradient checks).
        bank: [K, D] float16, bfloat16 or float32 teacher embeddings of any norm.
        target: [B] int64, a row of the bank for each student row, or `ignore_index`; or [B, M],
            several rows for each.
        weight: P [W, D], the projection from teacher to student width; None when D == W.
        bias: b [W], or None.
        logit_scale: inverse temperature, a float or 0-dim tensor, > 0, at most 2^100 (1.27e30) and
            already exponentiated.
        target_weight: the weight of each target, in the shape of `target`: floating point, >= 0,
            without a gradient. The sum of a student's weights, 1 for a distribution, multiplies its
            loss. None: equal weights that sum to 1.
        label_smoothing: probability in [0, 1] spread evenly over the bank, as in
            `torch.nn.functional.cross_entropy`.
        ignore_index: targets of this value have weight 0; rows with no other have loss 0 and no
            gradient.
        reduction: "mean" over the rows that are not ignored (0 if there are none), "sum", "none".
        return_lse: also return lse_i = log sum_k exp l_ik, for every row, differentiable.
        backend: "auto", or a name from `ckd.backends.available()`; named, it never falls back.

    Returns:
        The loss: 0-dim, or [B] for reduction "none"; with `return_lse` also lse [B]. Both are
        float32 (float64 for a float64 student), under autocast too: autocast lets the backend use
        half-precision operands with float32 accumulation.

    Differentiable in student, weight, bias and logit_scale, with gradients in their dtypes; the
    bank never receives a gradient. Second derivatives are not implemented.

    Results are right at every scale. A float32 cosine has an error of some 1e-7, which changes a
    logit by 1e-7 logit_scale: from about 1e7 on, bank rows with closer cosines are told apart by
    rounding. Equal bank rows share the softmax at every scale.

    A student or projected bank row with norm below 1e-6 has zero logits and zero gradient. A
    student row with NaN or inf, or whose norm is not finite, has a NaN loss.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, device, shape or value.
        IndexError: a target out of range, on the CPU. On a GPU, where reading targets would
            synchronise, that row's loss is NaN and its gradient zero. A negative or non-finite
            weight is a ValueError on the CPU, and the same as this on a GPU.
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
    inputs = Inputs(student, bank, weight, bias, scale)
    targets = Targets(target, None, None, label_smoothing, ignore_index, reduction)
    if target_weight is not None or (isinstance(target, Tensor) and target.dim() == 2):
        loss, lse = _weighted(inputs, targets, target_weight, return_lse, backend)
    else:
        loss, lse, *_ = _forward.call((inputs, targets), return_lse, backend)
    return (loss, lse) if return_lse else loss


def _weighted(
    inputs: Inputs,
    targets: Targets,
    weight: Tensor | None,
    return_lse: bool,
    backend: BackendName,
) -> tuple[Tensor, Tensor]:
    """Loss and lse of weighted targets: the op takes distributions, and each student's loss is then
    multiplied by the sum of its weights."""
    target, _, _, label_smoothing, ignore_index, reduction = targets
    _arguments.check_inputs(inputs)
    _arguments.check_options(label_smoothing, ignore_index, reduction)
    _arguments.check_weighted_targets(target, weight, inputs.student)
    if target.dim() == 1 and weight is not None:
        target, weight = target.unsqueeze(1), weight.unsqueeze(1)
    # The order of a GPU's sums, and so their last bit, depends on the strides.
    target, weight = target.contiguous(), None if weight is None else weight.contiguous()
    dtype = inputs.logit_scale.dtype
    split = split_targets
    if is_direct(target, weight):
        problem = Problem.of("contrastive_ce", *inputs[:3], targets=target.shape[1])
        split = backends.ORDER[backends.resolve(backend, problem)].split_targets
    parts = split(target, weight, len(inputs.bank), ignore_index, label_smoothing, dtype)
    one = (parts.target, parts.shift_rows, parts.shift)
    targets = Targets(*one, label_smoothing, ignore_index, "none")
    loss, lse, *_ = _forward.call((inputs, targets), return_lse, backend)
    loss = loss * parts.total
    if reduction != "none":
        # In float64, as in the backends: float32 would round a sum of 100 losses by 1e-7.
        loss = loss.sum(dtype=torch.float64)
        loss = (loss / parts.kept if reduction == "mean" else loss).to(lse.dtype)
    return loss, lse


def _prepare(
    inputs: Inputs, targets: Targets, return_lse: bool, backend: BackendName
) -> tuple[Plan, Keep]:
    _arguments.check_inputs(inputs)
    _arguments.check_targets(targets, inputs)

    shifted = 0 if targets.shift is None else targets.shift.shape[1]
    problem = Problem.of("contrastive_ce", inputs.student, inputs.bank, inputs.weight, shifted)
    name = backends.resolve(backend, problem)
    learned = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    student, _, weight, bias, logit_scale = learned
    # Without a gradient for student or scale the forward need not accumulate sum_k p_k n_k.
    residual = student or logit_scale
    cache_bytes = 0
    if weight or bias:
        cache_bytes = backends.ORDER[name].contrastive_ce_cache_bytes(problem)
    return Plan(name, problem.allow_half), Keep(residual, residual and return_lse, cache_bytes)


def _compute(inputs: Inputs, targets: Targets, plan: Plan, keep: Keep) -> Forward:
    _arguments.check_scale(inputs.logit_scale)
    return backends.ORDER[plan.backend].contrastive_ce_forward(inputs, targets, plan, keep)


def _fake(inputs: Inputs, targets: Targets, plan: Plan, keep: Keep) -> Forward:
    new = inputs.logit_scale.new_empty
    batch, width = inputs.student.shape
    return Forward(
        loss=new(batch if targets.reduction == "none" else ()),
        lse=new(batch),
        kept=new(() if targets.reduction == "mean" else 0),
        p_other=new(batch),
        residual=new((batch, width) if keep.residual else 0),
        attention=new((batch, width) if keep.attention else 0),
        cache=new(keep.cache_bytes, dtype=torch.uint8),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    tensors, ctx.options = inputs[: _forward.tensors], inputs[_forward.tensors :]
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_loss: Tensor | None, d_lse: Tensor | None, *_: None) -> Any:
    tensors = ctx.saved_tensors
    tensors, saved = tensors[: _forward.tensors], tensors[_forward.tensors :]
    needs = _gradients.needs(ctx)
    if needs.student or needs.logit_scale:
        *_, save_residual, save_attention, _ = ctx.options
        _check_kept("residual", save_residual or d_loss is None)
        _check_kept("attention", save_attention or d_lse is None)
    gradients = _backward(d_loss, d_lse, *tensors, *ctx.options, *saved, *needs)
    return _gradients.for_autograd(ctx, gradients)


def _check_kept(output: str, suffices: bool) -> None:
    if not suffices:
        raise ValueError(
            f"a gradient for student or logit_scale needs the output `{output}` of "
            f"ckd::contrastive_ce: call it with save_{output}=True, not False. (Under torch.vmap "
            "the op cannot see that a gradient is taken outside: take vmap of grad, not grad of "
            "vmap.)"
        )


def _compute_backward(
    upstream: Upstream,
    inputs: Inputs,
    targets: Targets,
    plan: Plan,
    keep: Keep,
    saved: Saved,
    needs: Needs,
) -> Gradients:
    backend = backends.ORDER[plan.backend]
    return backend.contrastive_ce_backward(upstream, inputs, targets, plan, saved, needs)


def _fake_backward(upstream: Upstream, inputs: Inputs, *others: Any) -> Gradients:
    return _gradients.fake(inputs, others[-1])


_TARGETS = (
    "Tensor target, Tensor? shift_rows, Tensor? shift, "
    "float label_smoothing, SymInt ignore_index, str reduction"
)
_KEEP = "bool save_residual, bool save_attention, SymInt cache_bytes"
_SAVED = "Tensor lse, Tensor kept, Tensor p_other, Tensor residual, Tensor attention, Tensor cache"
_ARGUMENTS = f"{INPUTS}, {_TARGETS}, {PLAN}, {_KEEP}"
_RECORDS = (Inputs, Targets, Plan, Keep)

_backward = shorten(
    Op(
        "contrastive_ce_backward(Tensor? d_loss, Tensor? d_lse, "
        f"{_ARGUMENTS}, {_SAVED}, {NEEDS}) -> {GRADIENTS}",
        (Upstream, *_RECORDS, Saved, Needs),
        _compute_backward,
        _fake_backward,
    )
)
_forward = shorten(
    Op(
        f"contrastive_ce({_ARGUMENTS}) -> (Tensor loss, {_SAVED})",
        _RECORDS,
        _compute,
        _fake,
        Formula(_setup_context, _differentiate),
        _prepare,
    )
)
