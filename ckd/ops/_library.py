"""How the ops are registered with torch: a schema, an implementation for every device, a fake for
tracing, and an autograd function.

What `torch.library.custom_op` and `register_autograd` do, without their Python layers: those cost
some 40 us a call, as much as the whole loss against a small bank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("ckd", "FRAGMENT")


def define(name: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register `ckd::name`, its schema read from the annotations; returns the op."""
    schema = torch.library.infer_schema(implementation, mutates_args=())
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ckd::{name}", fake, lib=_library)
    return getattr(torch.ops.ckd, name).default


def differentiate(name: str, function: type[torch.autograd.Function]) -> None:
    """Calls of `ckd::name` that need a gradient go through `function`, whose forward is
    `below_autograd` and what it saves."""
    op = getattr(torch.ops.ckd, name).default

    def dispatch(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            return function.apply(*args)
        return below_autograd(op, *args)

    _library.impl(name, dispatch, "Autograd")


def below_autograd(op: Any, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def refuse_derivative(name: str) -> None:
    """A derivative of `ckd::name` is an error that says so: autograd would take it for constant."""
    op = getattr(torch.ops.ckd, name).default

    class Refusal(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            return below_autograd(op, *args)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise NotImplementedError(
                f"ckd::{name} has no derivative: second derivatives of the ops of ckd are not "
                "implemented; call backward without create_graph"
            )

    differentiate(name, Refusal)
