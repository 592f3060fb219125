"""The four gradients that every op's backward returns: student, weight, bias, logit_scale."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def fake_gradients(
    student: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes alone; [0] where no gradient is asked for."""

    def like(x: Tensor | None, needed: bool) -> Tensor:
        x = student if x is None else x
        return x.new_empty(x.shape if needed else (0,))

    return (
        like(student, needs[0]),
        like(weight, needs[1]),
        like(bias, needs[2]),
        like(logit_scale, needs[3]),
    )


def or_none(gradients: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """What autograd wants: None where no gradient was asked for."""
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, needs))
