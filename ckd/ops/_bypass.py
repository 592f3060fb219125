"""Bypasses torch's dispatcher for calls that no other part of torch has to observe.

`Op` checks the arguments of every call and goes through `torch.autograd.Function.apply` and the
dispatcher: together these take longer than the loss against a small bank. A `Shortcut` caches the
checks and the choice of a backend, and calls the implementation itself. It does so only where no
compiler, tracer, transform, mode, profiler or tensor subclass observes the op; results are equal.

In ckd/ops, only this module uses names that are private to torch. If torch lacks one of them, every
call takes the public path of `Op`; so it does if this module, its `shorten` and its `is_direct` are
deleted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ckd.backends import interface
from ckd.ops._op import Op

try:
    from torch._C import (
        _dispatch_keys,
        _is_any_autocast_enabled,
        _is_tracing,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
    )
    from torch._C._autograd import _profiler_enabled
    from torch._C._functorch import (
        TransformType,
        get_interpreter_stack,
        peek_interpreter_stack,
    )
    from torch.autograd import forward_ad

    _enabled = forward_ad._current_level < 0
except (ImportError, AttributeError):
    _enabled = False

MOST = 256  # plans that an op caches at most
PLAIN = (Tensor, torch.nn.Parameter)  # other subclasses may override operators
_VALUES = (float, int, str, bool, type(None))
_dense_keys: set[int] = set()  # dispatch key sets of ordinary tensors, one for each device


def shorten(op: Op) -> Op | Shortcut:
    """The op with a shortcut; the op itself where torch lacks a name that the shortcut needs."""
    return Shortcut(op) if _enabled else op


def is_enabled() -> bool:
    return _enabled


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Every call inside takes the public path: for tests. Not thread-safe."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


class Shortcut:
    """Has the interface of `Op`: `shortcut(*arguments)` and `shortcut.call(records, *options)`."""

    def __init__(self, op: Op) -> None:
        self.op, self.tensors = op, op.tensors
        # `apply` of the C++ base class: torch.autograd.Function's own first checks for functorch
        # transforms, and calls under a transform never reach it.
        self._apply = super(torch.autograd.Function, _direct(op)).apply  # type: ignore[misc]
        self._plans: dict[tuple[Any, ...], _Plan] = {}

    def __call__(self, *arguments: Any) -> Any:
        tensors = arguments[: self.tensors]
        if not is_direct(*tensors):
            return self._observed(*arguments)
        if _needs_gradient(tensors):
            return self._apply(*arguments, partial(self.op.flat, *arguments))
        return self.op.flat(*arguments)

    def call(self, records: tuple[tuple[Any, ...], ...], *options: Any) -> Any:
        if is_observed():
            return self._observed(*self.op.arguments(records, *options))
        key = _key(records, options)
        plan = self._plans.get(key) if key is not None else None
        if plan is None:
            prepared = self.op.prepare(*records, *options)
            arguments = tuple(chain(*records))
            tensors = arguments[: self.tensors]
            if key is None or not _are_plain(tensors):
                return self._observed(*arguments, *chain(*prepared))
            if len(self._plans) >= MOST:
                self._plans.clear()
            plan = _Plan(_needs_gradient(tensors), prepared, tuple(chain(*prepared)))
            self._plans[key] = plan
        if not plan.recorded:
            return self.op.implementation(*records, *plan.prepared)
        compute = partial(self.op.implementation, *records, *plan.prepared)
        return self._apply(*chain(*records), *plan.flat, compute)

    def _observed(self, *arguments: Any) -> Any:
        if _is_functionalized():  # for which torch has no rule of an autograd.Function
            return self.op.registered(*arguments)
        return self.op(*arguments)


def _direct(op: Op) -> type[torch.autograd.Function]:
    """`op.function` without the dispatcher: its last argument is a function that computes."""
    setup_context = op.function.setup_context

    class Direct(torch.autograd.Function):
        backward = op.function.backward

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = arguments[-1]()
            setup_context(ctx, arguments[:-1], output)
            return output

    return type(op.name, (Direct,), {})


class _Plan(NamedTuple):
    """The cached result of `Op.prepare` for all calls with one key."""

    recorded: bool  # whether autograd records the call
    prepared: tuple[tuple[Any, ...], ...]  # the records that Op.prepare returned
    flat: tuple[Any, ...]  # the fields of these records, one after another


def is_observed() -> bool:
    """Whether anything but reverse-mode autograd observes the ops that are called now."""
    return (
        torch.compiler.is_dynamo_compiling()  # other compilers trace with a dispatch mode
        or not _enabled
        or _is_tracing()
        or _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0  # torch.device(...) as a context is one
        or peek_interpreter_stack() is not None  # torch.func
        or forward_ad._current_level >= 0
        or _profiler_enabled()
    )


def is_direct(*tensors: Tensor | None) -> bool:
    """Whether an implementation may read the tensors' memory, and nothing observes the call."""
    return not is_observed() and _are_plain(tensors)


def _is_functionalized() -> bool:
    """Whether the innermost transform of torch.func is functionalize, and none is forward mode:
    the dispatcher has no rule for that, and would give zero tangents."""
    if torch.compiler.is_compiling() or not _enabled:
        return False
    keys = [transform.key() for transform in get_interpreter_stack() or ()]
    return keys[-1:] == [TransformType.Functionalize] and TransformType.Jvp not in keys


def _needs_gradient(tensors: tuple[Tensor | None, ...]) -> bool:
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return False
    return any(x is not None and x.requires_grad for x in tensors)


def _key(records: tuple[tuple[Any, ...], ...], options: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The cache key of a plan: everything that a plan may depend on. Of a tensor this is all
    metadata except strides and address. None: the call is not cached."""
    student = records[0][0]
    if type(student) not in PLAIN or student.is_meta:
        return None
    key: list[Any] = [
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        _is_any_autocast_enabled() and torch.is_autocast_enabled(student.device.type),
        interface.settings_version,
    ]
    for x in chain(*records, options):
        kind = type(x)
        if kind in PLAIN:
            keys = _dispatch_keys(x).raw_repr()
            key += (kind, keys, x.dtype, x.device, x.shape, x.requires_grad)
        elif kind in _VALUES:
            key += (kind, x)  # with the type: 1, 1.0 and True are equal
        else:
            return None
    return tuple(key)


def _are_plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether an implementation may read the tensors' memory. It may not for subclasses, nor for
    meta, lazily negated and batched tensors, whose memory does not hold their values."""
    for x in tensors:
        if x is None:
            continue
        if type(x) not in PLAIN:
            return False
        if _dispatch_keys(x).raw_repr() not in _dense_keys and not _is_dense(x):
            return False
    return True


def _is_dense(x: Tensor) -> bool:
    """Whether x has the dispatch keys of a new tensor on its device, and no others."""
    if x.is_meta:
        return False
    with torch.inference_mode(False):
        _dense_keys.add(_dispatch_keys(torch.empty(0, device=x.device)).raw_repr())
    return _dispatch_keys(x).raw_repr() in _dense_keys
