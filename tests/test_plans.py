"""The cache of plans: a call with a cached key is not checked again, any other call is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ckd
from ckd.backends import cpu
from ckd.ops import _bypass, contrastive_ce, similarity
from tests.oracle import Case, make_case


def case() -> Case:
    return make_case(4, 10, 8, 6).requiring("student", "weight", "bias", "logit_scale")


def call(of: Case, **options: Any) -> Tensor:
    result = ckd.contrastive_cross_entropy(*of.arguments, **options)
    return result[0] if isinstance(result, tuple) else result


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `prepare` returned for each examined call, with the targets' options. The loss's cache
    is empty at first."""
    if not _bypass.is_enabled():
        pytest.skip("without the bypass every call is examined")
    found: list[tuple[Any, ...]] = []
    op = contrastive_ce._forward.op
    prepare = op.prepare

    def watch(*args: Any) -> Any:
        prepared = prepare(*args)
        _, _, _, label_smoothing, ignore_index, reduction = args[1]
        found.append((*prepared, label_smoothing, ignore_index, reduction))
        return prepared

    monkeypatch.setattr(op, "prepare", watch)
    contrastive_ce._forward._plans.clear()
    return found


def test_calls_alike_are_examined_once(examined: list[Any]) -> None:
    first = call(case())
    other = case()
    with torch.no_grad():
        other.student.mul_(2).add_(1)
    assert other.target is not None
    second = call(replace(other, target=other.target.flip(0), logit_scale=torch.tensor(3.0)))
    assert len(examined) == 2  # whether the scale needs a gradient is part of the key
    call(other)
    call(other)
    assert len(examined) == 2
    assert first != second


CHANGES: dict[str, Callable[[Case], Case]] = {
    "rows": lambda c: replace(c, student=c.student[:3], target=c.target[:3]),
    "bank rows": lambda c: replace(c, bank=torch.cat([c.bank, c.bank])),
    "student dtype": lambda c: replace(c, student=c.student.detach().bfloat16().requires_grad_()),
    "bank dtype": lambda c: replace(c, bank=c.bank.bfloat16()),
    "frozen student": lambda c: replace(c, student=c.student.detach()),
    "frozen weight": lambda c: replace(c, weight=c.weight.detach()),
    "frozen bias": lambda c: replace(c, bias=c.bias.detach()),
    "fixed scale": lambda c: replace(c, logit_scale=c.logit_scale.detach()),
    "no bias": lambda c: replace(c, bias=None),
    "float64": lambda c: replace(
        c, **{n: getattr(c, n).detach().double() for n in ("student", "weight", "bias", "bank")}
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_tensors_are_examined_anew(change: str, examined: list[Any]) -> None:
    call(case())
    changed = CHANGES[change](case())
    found = call(changed)
    assert len(examined) == 2
    contrastive_ce._forward._plans.clear()
    expected = call(changed)
    assert torch.equal(found, expected)
    assert found.requires_grad == expected.requires_grad
    assert found.dtype == expected.dtype
    assert examined[1] == examined[2]


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1},
        {"ignore_index": 3},
        {"reduction": "sum"},
        {"return_lse": True},
        {"backend": "reference"},
    ],
    ids=str,
)
def test_other_options_are_examined_anew(options: dict[str, Any], examined: list[Any]) -> None:
    call(case())
    call(case(), **options)
    assert len(examined) == 2
    assert examined[0] != examined[1]


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_other_contexts_are_examined_anew(context: str, examined: list[Any]) -> None:
    for around in (nullcontext, CONTEXTS[context], nullcontext):
        with around():
            call(case())
    assert len(examined) == 2
    assert examined[0] != examined[1]


@pytest.mark.parametrize("scale", [2.0, torch.tensor(2.0)], ids=["float", "tensor"])
def test_inference_mode_does_not_use_the_plan_of_a_plain_call(scale: float | Tensor) -> None:
    """A float scale becomes an inference tensor there, which autograd may not save for a backward;
    and with a tensor nothing is recorded either."""
    of = replace(case(), logit_scale=scale)
    plain = call(of)
    with torch.inference_mode(), torch.enable_grad():
        found = call(of)
    assert torch.equal(found, plain)
    assert not found.requires_grad


def test_settings_are_examined_anew(examined: list[Any]) -> None:
    if "cpu" not in ckd.backends.available():
        pytest.skip("needs the compiled CPU backend")
    call(case())
    ckd.backends.set_cache_limit(0)
    call(case())
    assert examined[0][1].cache_bytes > examined[1][1].cache_bytes
    for tier in cpu.TIERS:
        with cpu.use_tier(tier):
            call(case())
    call(case())
    assert len(examined) == 3 + len(cpu.TIERS)


def test_observers_are_seen_after_plain_calls(examined: list[Any]) -> None:
    plain = call(case())
    with torch.profiler.profile() as profile:
        call(case())
    assert "ckd::contrastive_ce" in {event.name for event in profile.events()}
    meta = [None if x is None else x.detach().to("meta") for x in case().arguments]
    assert ckd.contrastive_cross_entropy(*meta).is_meta  # type: ignore[arg-type]
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert torch.equal(compiled(case()), plain)
    assert torch.equal(call(case()), plain)


BAD: dict[str, tuple[type[Exception], Callable[[Case], Any]]] = {
    "width": (ValueError, lambda c: call(replace(c, student=c.student[:, :5]))),
    "list": (TypeError, lambda c: call(replace(c, bank=c.bank.tolist()))),
    "bank gradient": (ValueError, lambda c: call(replace(c, bank=c.bank.clone().requires_grad_()))),
    "target dtype": (ValueError, lambda c: call(replace(c, target=c.target.int()))),
    "target range": (IndexError, lambda c: call(replace(c, target=c.target + 10))),
    "scale": (ValueError, lambda c: call(replace(c, logit_scale=-1.0))),
    "numpy scale": (ValueError, lambda c: call(replace(c, logit_scale=np.float32("nan")))),
    "scale type": (TypeError, lambda c: call(replace(c, logit_scale="2"))),
    "student": (TypeError, lambda c: call(replace(c, student=None))),
    "scale tensor": (ValueError, lambda c: call(replace(c, logit_scale=torch.tensor(0.0)))),
    "int as float": (TypeError, lambda c: call(c, ignore_index=-100.0)),
    "smoothing": (ValueError, lambda c: call(c, label_smoothing=float("nan"))),
    "reduction": (ValueError, lambda c: call(c, reduction="avg")),
    "unhashable": (ValueError, lambda c: call(c, reduction=["mean"])),
    "backend": (ValueError, lambda c: call(c, backend="gpu")),
}


# Of errors that later code would raise too.
MESSAGES = {"int as float": "ignore_index must be an int"}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_found_after_good_calls(name: str) -> None:
    error, make = BAD[name]
    call(case())
    call(replace(case(), logit_scale=2.0))
    call(replace(case(), logit_scale=np.float32(2.0)))
    for _ in range(2):
        with pytest.raises(error, match=MESSAGES.get(name)):
            make(case())


def test_similarity_has_plans_of_its_own() -> None:
    of = case()
    others = (of.student, of.bank, of.weight, of.bias)
    one, two = (ckd.normalized_similarity(*others, scale) for scale in (1.0, 2.0))
    torch.testing.assert_close(2 * one, two)
    known = len(similarity._forward._plans)
    ckd.normalized_similarity(*others, 3.0)
    assert len(similarity._forward._plans) == known
    with pytest.raises(ValueError, match="logit_scale"):
        ckd.normalized_similarity(*others, -3.0)


def test_few_plans_are_kept() -> None:
    bank = torch.randn(5, 6)
    for rows in range(1, 2 * _bypass.MOST):
        ckd.normalized_similarity(torch.randn(rows, 6), bank)
    assert len(similarity._forward._plans) <= _bypass.MOST
