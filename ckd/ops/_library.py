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
    """`ckd::name`, whose arguments are tensors first and then what else there is, its options."""

    def __init__(
        self, name: str, implementation: Callable[..., Any], fake: Callable[..., Any], tensors: int
    ) -> None:
        """The schema is read from the annotations of the implementation, whose first `tensors`
        arguments are the tensors that a gradient may be asked for."""
        schema = torch.library.infer_schema(implementation, mutates_args=())
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ckd::{name}", fake, lib=_library)
        self.name = name
        self.tensors = tensors
        self._registered = getattr(torch.ops.ckd, name).default
        self._implementation = implementation
        self._apply: Callable[..., Any] | None = None

    def differentiate(self, function: type[torch.autograd.Function]) -> None:
        """Calls that need a gradient go through `function`, whose forward gets what computes the
        op, the op's options as a tuple, and its tensors."""
        # Past the layer of torch.autograd.Function that looks for transforms: then, something
        # observes.
        self._apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

        def dispatch(*args: Any) -> Any:
            tensors, options = args[: self.tensors], args[self.tensors :]
            if _needs_gradient(tensors):
                return function.apply(self._below_autograd, options, *tensors)
            return self._below_autograd(*args)

        _library.impl(self.name, dispatch, "Autograd")

    def refuse_derivative(self) -> None:
        """A derivative is an error that says so: autograd would take the result for constant."""
        op = self

        class Refusal(torch.autograd.Function):
            @staticmethod
            def forward(
                ctx: Any, compute: Callable[..., Any], options: tuple[Any, ...], *tensors: Any
            ) -> Any:
                return compute(*tensors, *options)

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                raise NotImplementedError(
                    f"ckd::{op.name} has no derivative: second derivatives of the ops of ckd are "
                    "not implemented; call backward without create_graph"
                )

        self.differentiate(Refusal)

    def __call__(self, *args: Any) -> Any:
        tensors = args[: self.tensors]
        return self.way(tensors)(args[self.tensors :], *tensors)

    def way(self, tensors: tuple[Tensor | None, ...]) -> Callable[..., Any]:
        """How a call of these tensors is made, as a function of its options and them: `observed`,
        `differentiated` or `computed`. It is the same for tensors of the same `kind` in the same
        grad mode, as long as nothing observes."""
        if is_observed() or not all(x is None or _is_plain(x) for x in tensors):
            return self.observed
        if self._apply is not None and _needs_gradient(tensors):
            return self.differentiated
        return self.computed

    def observed(self, options: tuple[Any, ...], *tensors: Tensor | None) -> Any:
        return self._registered(*tensors, *options)

    def differentiated(self, options: tuple[Any, ...], *tensors: Tensor | None) -> Any:
        assert self._apply is not None
        return self._apply(self._implementation, options, *tensors)

    def computed(self, options: tuple[Any, ...], *tensors: Tensor | None) -> Any:
        return self._implementation(*tensors, *options)

    def _below_autograd(self, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self._registered(*args)


def _needs_gradient(tensors: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


_is_tracing = torch._C._is_tracing
_len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack
_len_torch_function_stack = torch._C._len_torch_function_stack
_peek_interpreter_stack = torch._C._functorch.peek_interpreter_stack
_profiler_enabled = torch._C._autograd._profiler_enabled


def is_observed() -> bool:
    """Whether something other than autograd has to see the ops that are called now."""
    return (
        torch.compiler.is_dynamo_compiling()  # other compilers trace, by a dispatch mode
        or _is_tracing()
        or _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0  # torch.device(...) as a context is one
        or _peek_interpreter_stack() is not None
        or _profiler_enabled()
    )


PLAIN = (Tensor, torch.nn.Parameter)
_dispatch_keys = torch._C._dispatch_keys
_dense_keys: set[int] = set()  # those of tensors that torch dispatches on their device alone


def kind(x: Tensor) -> tuple[Any, ...]:
    """What there is to know of a plain tensor but its values, its strides and where they stand."""
    return type(x), _dispatch_keys(x).raw_repr(), x.dtype, x.device, x.shape, x.requires_grad


def _is_plain(x: Tensor) -> bool:
    """Whether its memory holds its values, as the implementations take for granted. (Not so of
    subclasses, and of meta, lazily negated and batched tensors.)"""
    if type(x) not in PLAIN:
        return False
    keys = _dispatch_keys(x).raw_repr()
    if keys in _dense_keys:
        return True
    if x.is_meta:
        return False
    with torch.inference_mode(False):
        _dense_keys.add(_dispatch_keys(torch.empty(0, device=x.device)).raw_repr())
    return keys in _dense_keys
