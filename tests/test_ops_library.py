"""Calls bypass torch's dispatcher exactly where no other part of torch observes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ckd
from ckd.backends.interface import Inputs, Keep, Plan, Targets
from ckd.ops import _bypass, contrastive_ce, similarity
from tests.oracle import Case, make_case

SHORTENED = tuple(
    op for module in (contrastive_ce, similarity) for op in (module._forward, module._backward)
)
OPS = tuple(getattr(op, "op", op) for op in SHORTENED)


def step(case: Case, backend: str = "auto") -> Tensor:
    """Calls every op once; returns the gradient of the weight."""
    t = case.requiring("student", "weight", "logit_scale")
    loss = ckd.contrastive_cross_entropy(*t.arguments, backend=backend)
    inputs = (t.student, t.bank, t.weight, t.bias, t.logit_scale)
    table = ckd.normalized_similarity(*inputs, backend=backend)
    (loss + table.sum()).backward()
    assert t.weight is not None
    assert t.weight.grad is not None
    return t.weight.grad


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops that were called through torch's dispatcher."""
    names: list[str] = []

    def spy(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            names.append(name)
            return op(*args)

        return call

    for op in OPS:
        monkeypatch.setattr(op, "registered", spy(op.name, op.registered))
    return names


def test_plain_calls_go_straight_to_the_implementation(dispatched: list[str]) -> None:
    if not _bypass.is_enabled():
        pytest.skip("the bypass is off")
    step(make_case(4, 10, 8, 6))
    assert dispatched == []


def test_dispatch_modes_see_every_op() -> None:
    seen: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.add(str(func))
            return func(*args, **(kwargs or {}))

    case = make_case(4, 10, 8, 6)
    straight = step(case)
    with Watch():
        watched = step(case)
    assert {f"ckd.{op.name}.default" for op in OPS} <= seen
    assert torch.equal(straight, watched)


def test_function_modes_see_every_op() -> None:
    """And the op still computes under them: `torch.device` as a context is a function mode."""
    seen: set[str] = set()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.add(str(func))
            return func(*args, **(kwargs or {}))

    case = make_case(4, 10, 8, 6)
    with Watch():
        ckd.contrastive_cross_entropy(*case.arguments)
        ckd.normalized_similarity(case.student, case.bank, case.weight, case.bias, 2.0)
    assert {"ckd.contrastive_ce.default", "ckd.similarity.default"} <= seen


def test_the_profiler_sees_every_op() -> None:
    case = make_case(4, 10, 8, 6)
    with torch.profiler.profile() as profile:
        step(case)
    names = {event.name for event in profile.events()}
    assert {f"ckd::{op.name}" for op in OPS} <= names


def test_fake_and_meta_tensors_are_not_computed_with() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    case = make_case(4, 10, 8, 6)
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss = ckd.contrastive_cross_entropy(*case.arguments)
    assert isinstance(loss, FakeTensor)
    meta = [None if x is None else x.to("meta") for x in case.arguments]
    assert ckd.contrastive_cross_entropy(*meta).is_meta  # type: ignore[arg-type]


def test_tensor_subclasses_see_the_op() -> None:
    seen: list[str] = []

    class Wrapped(Tensor):
        inner: Tensor

        @staticmethod
        def __new__(cls, inner: Tensor) -> Wrapped:
            wrapped = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
            wrapped.inner = inner
            return wrapped

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            plain = [x.inner if isinstance(x, Wrapped) else x for x in args]
            return func(*plain, **(kwargs or {}))

    case = make_case(4, 10, 8, 6)
    others = (case.bank, case.weight, case.bias, case.logit_scale)
    logits = ckd.normalized_similarity(Wrapped(case.student), *others)
    assert "ckd.similarity.default" in seen
    assert torch.equal(logits, ckd.normalized_similarity(case.student, *others))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_torchs_defaults_change_nothing(backend: str, dtype: torch.dtype) -> None:
    case = make_case(4, 10, 8, 6)
    expected = step(case, backend)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = step(case, backend)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found, expected)


def test_lazily_negated_rows_are_resolved(backend: str) -> None:
    case = make_case(4, 10, 8, 6)
    lazy = torch._neg_view(-case.student)
    assert lazy.is_neg()
    found = ckd.contrastive_cross_entropy(lazy, *case.arguments[1:], backend=backend)
    assert torch.equal(found, ckd.contrastive_cross_entropy(*case.arguments, backend=backend))


def test_batched_gradients_are_refused_or_right(backend: str) -> None:
    """With is_grads_batched, autograd passes batched tensors, which have no memory of their own."""
    case = make_case(4, 10, 8, 6).requiring("student")
    losses = ckd.contrastive_cross_entropy(*case.arguments, reduction="none", backend=backend)
    try:
        (rows,) = torch.autograd.grad(
            losses, case.student, torch.eye(4), is_grads_batched=True, retain_graph=True
        )
    except RuntimeError as error:
        assert "atching rule" in str(error)  # noqa: PT017  # torch's message
        return
    for i, row in enumerate(rows):
        (one,) = torch.autograd.grad(losses[i], case.student, retain_graph=True)
        torch.testing.assert_close(row, one)


def test_vmap_sees_the_op() -> None:
    """The dispatcher has no batching rule for the ops, so they run once for each row. They must
    not compute on the batched tensors themselves, as the bypass would."""
    case = make_case(4, 10, 8, 6)

    def loss(student: Tensor) -> Tensor:
        return ckd.contrastive_cross_entropy(student, *case.arguments[1:])

    students = torch.stack([case.student, case.student.flip(0), 2 * case.student.flip(1)])
    losses = torch.vmap(loss)(students)
    torch.testing.assert_close(losses, torch.stack([loss(x) for x in students]))


def test_the_registered_op_refuses_a_gradient_of_lse_without_attention(backend: str) -> None:
    case = make_case(4, 10, 8, 6).requiring("student")
    inputs = Inputs(
        case.student, case.bank, case.weight, case.bias, torch.as_tensor(case.logit_scale)
    )
    targets, keep = Targets(case.target, None, None, 0.0, -100, "mean"), Keep(True, False, 0)
    arguments = (*inputs, *targets, *Plan(backend, False), *keep)
    _, lse, *others = torch.ops.ckd.contrastive_ce(*arguments)
    assert not any(x.requires_grad for x in others)
    with pytest.raises(ValueError, match="save_attention=True"):
        lse.sum().backward()
    arguments = (*arguments[: -len(keep)], *keep._replace(residual=False))
    with pytest.raises(ValueError, match="save_residual=True"):
        torch.ops.ckd.contrastive_ce(*arguments)[0].backward()
