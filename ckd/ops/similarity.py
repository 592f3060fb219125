"""Scaled cosine similarity of student rows to every (projected) row of a bank, as one op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ckd import backends
from ckd.backends.interface import Needs, Problem
from ckd.ops import _arguments
from ckd.ops._gradients import fake_gradients, or_none
from ckd.ops._library import Op
from ckd.ops._plans import Plan, Plans


def normalized_similarity(
    student: Tensor,
    bank: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """logit_scale u_i.n_k for every pair, with u = s/|s| and n = z/|z|, z = P t + b.

    The logits of `contrastive_cross_entropy`, materialised: for retrieval, evaluation and small
    banks. Arguments, zero and non-finite rows, and errors as there; differentiable in student,
    weight, bias and logit_scale.

    Returns:
        [B, K] float32 (float64 for a float64 student).
    """
    tensors = (student, bank, weight, bias, _arguments.scale_tensor(logit_scale, student))
    plan = _plans(tensors, (backend,))
    return plan.way(plan.options, *tensors)


def _examine(
    student: Tensor,
    bank: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor,
    backend: str,
) -> Plan:
    _arguments.check_matrices(student, bank, weight, bias)
    problem = Problem.of("similarity", student, bank, weight)
    name = backends.resolve(backend, problem)
    way = _forward.way((student, bank, weight, bias, logit_scale))
    return Plan(way, (problem.allow_half, name))


def _implementation(
    student: Tensor,
    bank: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor,
    allow_half: bool,
    backend: str,
) -> Tensor:
    _arguments.check_scale(logit_scale)
    return backends.ORDER[backend].similarity_forward(
        student, bank, weight, bias, logit_scale, allow_half
    )


def _fake(
    student: Tensor,
    bank: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor,
    *options: Any,
) -> Tensor:
    return logit_scale.new_empty(student.shape[0], bank.shape[0])


def _backward_implementation(
    d_logits: Tensor,
    student: Tensor,
    bank: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor,
    needs: Sequence[bool],
    allow_half: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backends.ORDER[backend].similarity_backward(
        d_logits, student, bank, weight, bias, logit_scale, Needs(*needs), allow_half
    )


def _backward_fake(
    d_logits: Tensor,
    student: Tensor,
    bank: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor,
    needs: Sequence[bool],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_gradients(student, weight, bias, logit_scale, needs)


_forward = Op("similarity", _implementation, _fake, tensors=5)
_backward = Op("similarity_backward", _backward_implementation, _backward_fake, tensors=6)
_plans = Plans(_examine)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        compute: Callable[..., Tensor],
        options: tuple[Any, ...],
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.options = options
        ctx.save_for_backward(*tensors)
        return compute(*tensors, *options)

    @staticmethod
    def backward(ctx: Any, d_logits: Tensor) -> tuple[Tensor | None, ...]:
        _, _, wants_student, _, wants_weight, wants_bias, wants_scale = ctx.needs_input_grad
        needs = Needs(wants_student, wants_weight, wants_bias, wants_scale)
        gradients = _backward(d_logits, *ctx.saved_tensors, needs, *ctx.options)
        d_student, d_weight, d_bias, d_scale = or_none(gradients, needs)
        return None, None, d_student, None, d_weight, d_bias, d_scale


_forward.differentiate(_Differentiable)
_backward.refuse_derivative()
