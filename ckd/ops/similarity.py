"""Scaled cosine similarity of student rows to every (projected) row of a bank, as one op."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ckd import backends
from ckd.backends.interface import BackendName, Gradients, Inputs, Needs, Plan, Problem
from ckd.ops import _arguments, _gradients
from ckd.ops._bypass import shorten
from ckd.ops._op import GRADIENTS, INPUTS, NEEDS, PLAN, Formula, Op


def normalized_similarity(
    student: Tensor,
    bank: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    *,
    backend: BackendName = "auto",
) -> Tensor:
    """logit_scale u_i.n_k for every pair, with u = s/|s| and n = z/|z|, z = P t + b.

    These are the logits of `contrastive_cross_entropy`, held in memory: for retrieval, evaluation
    and small banks. Arguments, derivatives, zero and non-finite rows, and errors are as documented
    there.

    Returns:
        [B, K] float32 (float64 for a float64 student).
    """
    scale = _arguments.scale_tensor(logit_scale, student)
    return _forward.call((Inputs(student, bank, weight, bias, scale),), backend)


def _prepare(inputs: Inputs, backend: BackendName) -> tuple[Plan]:
    _arguments.check_inputs(inputs)
    problem = Problem.of("similarity", inputs.student, inputs.bank, inputs.weight)
    return (Plan(backends.resolve(backend, problem), problem.allow_half),)


def _compute(inputs: Inputs, plan: Plan) -> Tensor:
    _arguments.check_scale(inputs.logit_scale)
    return backends.ORDER[plan.backend].similarity_forward(inputs, plan)


def _fake(inputs: Inputs, plan: Plan) -> Tensor:
    return inputs.logit_scale.new_empty(inputs.student.shape[0], inputs.bank.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[: _forward.tensors])
    ctx.options = inputs[_forward.tensors :]


def _differentiate(ctx: Any, d_logits: Tensor) -> Any:
    needs = _gradients.needs(ctx)
    return _gradients.for_autograd(
        ctx, _backward(d_logits, *ctx.saved_tensors, *ctx.options, *needs)
    )


class _Upstream(NamedTuple):
    d_logits: Tensor


def _compute_backward(upstream: _Upstream, inputs: Inputs, plan: Plan, needs: Needs) -> Gradients:
    backend = backends.ORDER[plan.backend]
    return backend.similarity_backward(upstream.d_logits, inputs, plan, needs)


def _fake_backward(upstream: _Upstream, inputs: Inputs, plan: Plan, needs: Needs) -> Gradients:
    return _gradients.fake(inputs, needs)


_backward = shorten(
    Op(
        f"similarity_backward(Tensor d_logits, {INPUTS}, {PLAN}, {NEEDS}) -> {GRADIENTS}",
        (_Upstream, Inputs, Plan, Needs),
        _compute_backward,
        _fake_backward,
    )
)
_forward = shorten(
    Op(
        f"similarity({INPUTS}, {PLAN}) -> Tensor",
        (Inputs, Plan),
        _compute,
        _fake,
        Formula(_setup_context, _differentiate),
        _prepare,
    )
)
