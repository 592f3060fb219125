"""How an op is registered with torch: schema, implementation, fake and autograd formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, chain, takewhile
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

# The records that all ops share, as parts of a schema: one argument for each field, in their order.
INPUTS = "Tensor student, Tensor bank, Tensor? weight, Tensor? bias, Tensor logit_scale"
PLAN = "str backend, bool allow_half"
NEEDS = "bool needs_student, bool needs_weight, bool needs_bias, bool needs_logit_scale"
GRADIENTS = "(Tensor d_student, Tensor d_weight, Tensor d_bias, Tensor d_logit_scale)"

_NO_FORWARD_MODE = (
    "ckd::{} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, linearize, "
    "torch.autograd.forward_ad); use reverse mode: backward, or torch.func.grad, vjp or jacrev"
)
_library = torch.library.Library("ckd", "FRAGMENT")


class Formula(NamedTuple):
    """The reverse-mode derivative of an op, as `torch.library.register_autograd` takes it."""

    setup_context: Callable[..., None]  # (ctx, inputs, output)
    backward: Callable[..., Any]  # (ctx, *gradients of the outputs)


class Op:
    """`torch.ops.ckd.<name>`.

    The schema is flat. `implementation` and `fake` take records (NamedTuples), whose fields, one
    record after another, are the arguments of the schema. The schema begins with the tensors that
    the caller passes.
    """

    def __init__(
        self,
        schema: str,
        records: Sequence[type[Any]],
        implementation: Callable[..., Any],
        fake: Callable[..., Any],
        formula: Formula | None = None,
        prepare: Callable[..., tuple[tuple[Any, ...], ...]] = lambda *records: (),
    ) -> None:
        """Without a formula, differentiating the op raises NotImplementedError.

        `prepare(*records, *options)` checks the records that a caller passes and returns the other
        records of the schema.
        """
        self.name, _, arguments = schema.partition("(")
        kinds = arguments.partition(")")[0].split(",")
        assert len(kinds) == sum(len(record._fields) for record in records), schema
        self.tensors = len(list(takewhile(_is_tensor, kinds)))
        self.implementation, self.prepare = implementation, prepare
        self.flat = _flat(implementation, records)
        formula = formula or _no_derivative(self.name)
        name = f"ckd::{self.name}"
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, _kernel(self), "CompositeExplicitAutograd")
        torch.library.register_fake(name, _flat(fake, records), lib=_library)
        torch.library.register_autograd(
            name, formula.backward, setup_context=formula.setup_context, lib=_library
        )
        self.registered = getattr(torch.ops.ckd, self.name).default
        self.function = _function(self, formula)

    def __call__(self, *arguments: Any) -> Any:
        """Call the op on the arguments of its schema."""
        if torch.compiler.is_compiling():
            if any(map(_is_dual, arguments[: self.tensors])):
                raise NotImplementedError(_NO_FORWARD_MODE.format(self.name))
            return self.registered(*arguments)
        if torch.is_inference_mode_enabled() or torch.jit.is_tracing():
            return self.registered(*arguments)
        # An autograd.Function wraps the op: with the formula that is registered with the dispatcher
        # alone, torch.func does not work, and forward mode gives zero tangents without an error.
        return self.function.apply(*arguments)

    def call(self, records: tuple[tuple[Any, ...], ...], *options: Any) -> Any:
        """Call the op on the caller's records and those that `prepare` returns."""
        return self(*self.arguments(records, *options))

    def arguments(self, records: tuple[tuple[Any, ...], ...], *options: Any) -> tuple[Any, ...]:
        """The arguments of the schema for a call."""
        return (*chain(*records, *self.prepare(*records, *options)),)


def _is_dual(x: torch.Tensor | None) -> bool:
    """Whether a tensor carries a tangent of forward-mode differentiation."""
    return x is not None and forward_ad.unpack_dual(x).tangent is not None


def _is_tensor(argument: str) -> bool:
    return argument.split()[0].rstrip("?") == "Tensor"


def _flat(function: Callable[..., Any], records: Sequence[type[Any]]) -> Callable[..., Any]:
    """`function` as a function of the records' fields, for the dispatcher."""
    ends = list(accumulate(len(record._fields) for record in records))
    parts = [(r, slice(end - len(r._fields), end)) for r, end in zip(records, ends)]
    make = tuple.__new__  # takes a third of the time of `record(*fields)`

    def call(*arguments: Any) -> Any:
        return function(*[make(record, arguments[part]) for record, part in parts])

    return call


class _ReverseModeOnly(torch.autograd.Function):
    """The base class of an op's functions: torch calls `jvp` where an argument has a tangent."""

    op: Op

    @classmethod
    def jvp(cls, ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_FORWARD_MODE.format(cls.op.name))


def _function(op: Op, formula: Formula) -> type[torch.autograd.Function]:
    class Function(_ReverseModeOnly):
        setup_context = staticmethod(formula.setup_context)
        backward = staticmethod(formula.backward)

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return op.registered(*arguments)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
            # One call after another. The rule that torch generates fails an assertion in jvp.
            if info.batch_size == 0:
                raise ValueError(f"ckd::{op.name}: vmap needs a dimension of at least 1, got 0")
            columns = [
                [x] * info.batch_size if dim is None else x.unbind(dim)
                for x, dim in zip(arguments, in_dims)
            ]
            results = [op.function.apply(*row) for row in zip(*columns)]
            if isinstance(results[0], torch.Tensor):
                return torch.stack(results), 0
            return tuple(map(torch.stack, zip(*results))), (0,) * len(results[0])

    return type(op.name, (Function,), {"op": op})  # its name is that of grad_fn


def _kernel(op: Op) -> Callable[..., Any]:
    """`op.flat` for the dispatcher, as an autograd.Function: its jvp refuses tangents in code that
    was compiled or traced without them."""

    class Kernel(_ReverseModeOnly):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            return op.flat(*arguments)

    Kernel.op = op
    return torch.no_grad()(Kernel.apply)  # it has no backward: autograd records the op


def _no_derivative(name: str) -> Formula:
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(
            f"ckd::{name} has no derivative: second derivatives of the ops of ckd are not "
            "implemented; call backward without create_graph"
        )

    return Formula(lambda ctx, inputs, output: None, backward)
