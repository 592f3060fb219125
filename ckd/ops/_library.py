"""How the ops are registered with torch: a schema, an implementation for every device, a fake for
tracing, and an autograd function.

What `torch.library.custom_op` and `register_autograd` do, without their Python layers: those cost
some 40 us a call, as much as the whole loss against a small bank. For the same reason a call that
nothing has to see (no compiler, tracer, transform, mode, profiler or tensor subclass) goes straight
to the implementation, past torch's dispatcher, which costs as much again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("ckd", "FRAGMENT")


class Op:
    """`ckd::name`, to be called with the arguments of its implementation in their order."""

    def __init__(
        self, name: str, implementation: Callable[..., Any], fake: Callable[..., Any]
    ) -> None:
        """The schema is read from the annotations of the implementation."""
        schema = torch.library.infer_schema(implementation, mutates_args=())
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ckd::{name}", fake, lib=_library)
        self.name = name
        self._registered = getattr(torch.ops.ckd, name).default
        self._implementation = implementation
        self._function: type[torch.autograd.Function] | None = None

    def differentiate(self, function: type[torch.autograd.Function]) -> None:
        """Calls that need a gradient go through `function`, whose forward gets what computes the
        op and the op's arguments."""
        self._function = function

        def dispatch(*args: Any) -> Any:
            if _needs_gradient(args):
                return function.apply(self._below_autograd, *args)
            return self._below_autograd(*args)

        _library.impl(self.name, dispatch, "Autograd")

    def refuse_derivative(self) -> None:
        """A derivative is an error that says so: autograd would take the result for constant."""
        op = self

        class Refusal(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, compute: Callable[..., Any], *args: Any) -> Any:
                return compute(*args)

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                raise NotImplementedError(
                    f"ckd::{op.name} has no derivative: second derivatives of the ops of ckd are "
                    "not implemented; call backward without create_graph"
                )

        self.differentiate(Refusal)

    def __call__(self, *args: Any) -> Any:
        if not _is_unobserved(args):
            return self._registered(*args)
        if self._function is not None and _needs_gradient(args):
            return self._function.apply(self._implementation, *args)
        return self._implementation(*args)

    def _below_autograd(self, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self._registered(*args)


def _needs_gradient(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)


_PLAIN = (Tensor, torch.nn.Parameter)
_dispatch_keys = torch._C._dispatch_keys
_dense_keys: set[int] = set()  # those of tensors that torch dispatches on their device alone


def _is_unobserved(args: tuple[Any, ...]) -> bool:
    """Whether only autograd has to do with a call of these arguments."""
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0  # torch.device(...) as a context is one
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    for x in args:
        if isinstance(x, Tensor):
            if type(x) not in _PLAIN:
                return False
            if _dispatch_keys(x).raw_repr() not in _dense_keys and not _is_dense(x):
                return False
    return True


def _is_dense(x: Tensor) -> bool:
    """Whether its memory holds its values, as the implementations take for granted. (Not so of
    meta, lazily negated and batched tensors.)"""
    if x.is_meta:
        return False
    with torch.inference_mode(False):
        _dense_keys.add(_dispatch_keys(torch.empty(0, device=x.device)).raw_repr())
    return _dispatch_keys(x).raw_repr() in _dense_keys
