"""The gradients that every op's backward returns: student, weight, bias, logit_scale."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ckd.backends.interface import Gradients, Inputs, Needs

BANK_GRADIENT = "bank never receives a gradient, but bank.requires_grad is True; pass bank.detach()"


def needs(ctx: Any) -> Needs:
    """Which gradients autograd asks for, of an op whose first arguments are Inputs."""
    student, bank, weight, bias, logit_scale, *_ = ctx.needs_input_grad
    if bank:  # of a transform outside of vmap: the check of the arguments does not see it
        raise ValueError(BANK_GRADIENT)
    return Needs(student, weight, bias, logit_scale)


def for_autograd(ctx: Any, gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """One gradient per argument of an op that begins with Inputs; None if it is not needed."""
    d_student, d_weight, d_bias, d_logit_scale = gradients
    student, _, weight, bias, logit_scale, *others = ctx.needs_input_grad
    return (
        d_student if student else None,
        None,
        d_weight if weight else None,
        d_bias if bias else None,
        d_logit_scale if logit_scale else None,
        *[None] * len(others),
    )


def fake(inputs: Inputs, needs: Needs) -> Gradients:
    """Uninitialised gradients, for shapes and dtypes; [0] where none is asked for."""
    student, _, weight, bias, logit_scale = inputs

    def like(x: Tensor | None, needed: bool) -> Tensor:
        x = student if x is None else x
        return x.new_empty(x.shape if needed else (0,))

    return Gradients(*map(like, (student, weight, bias, logit_scale), needs))
