"""The limits themselves: the model is what float32 does, and what is wrong is outside."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from tests import margins, oracle, tolerance
from tests.oracle import GRADIENTS, Case, make_case
from tests.rounding import OtherOrder, Rounded


def by_oracle(case: Case, dtype: torch.dtype) -> tolerance.Results:
    case = case.cast(dtype).requiring(*GRADIENTS)
    loss, _ = oracle.loss_and_lse(case)
    return {"loss": loss.detach(), **oracle.gradients(case, loss)}


CASE = make_case(33, 70, 40, 24)
EXPECTED = functools.cache(lambda: tolerance.expected(functools.partial(by_oracle, CASE)))


@pytest.mark.parametrize("shift", [0.0, 1.0], ids=["terms of both signs", "of one sign"])
@pytest.mark.parametrize("terms", [10, 100, 1000, 10_000])
def test_model_is_what_summing_term_by_term_does(terms: int, shift: float) -> None:
    numbers = torch.randn(terms, 400) + shift
    exact = numbers.double().sum(0)
    total = torch.zeros(400)
    for row in numbers:
        total += row
    with Rounded(0):
        modelled = numbers.double().sum(0)
    ratio = tolerance.distance(total, exact) / tolerance.distance(modelled, exact)
    assert 0.5 < ratio < 1.5


def test_model_of_chunks_is_what_summing_in_chunks_does() -> None:
    numbers = torch.randn(8192, 400)
    exact = numbers.double().sum(0)
    parts = torch.zeros(64, 400)
    for i in range(128):
        parts += numbers.view(64, 128, 400)[:, i]
    total = torch.zeros(400)
    for part in parts:
        total += part
    with Rounded(0, chunk=128):
        modelled = numbers.double().sum(0)
    ratio = tolerance.distance(total, exact) / tolerance.distance(modelled, exact)
    assert 0.5 < ratio < 1.5


def test_orders_are_the_same_sums_rounded_otherwise() -> None:
    wanted = EXPECTED()
    results = []
    for seed in range(tolerance.DRAWS):
        with OtherOrder(seed):
            results.append(by_oracle(CASE, torch.float32))
    for name, (exact, limit) in wanted.items():
        errors = [tolerance.distance(result[name], exact) for result in results]
        assert all(0 < error <= limit for error in errors), name
        assert len(set(errors)) > 1, name


def test_limits_are_a_few_roundings() -> None:
    for name, (exact, limit) in EXPECTED().items():
        relative = limit / torch.linalg.vector_norm(exact).item()
        assert 1e-7 < relative < 1e-5, (name, relative)


@pytest.mark.parametrize("wrong", ["a row of the bank", "a student", "a term", "a bias", "half"])
def test_what_is_wrong_is_outside(wrong: str) -> None:
    bank, student = CASE.bank.clone(), CASE.student.clone()
    changed = CASE
    if wrong == "a row of the bank":
        bank[5] = bank[6]
        changed = replace(CASE, bank=bank)
    elif wrong == "a student":
        student[3] *= 1 + 1e-3
        student[3, 0] += 1e-3
        changed = replace(CASE, student=student)
    elif wrong == "a term":
        bank[:, 7] = 0
        changed = replace(CASE, bank=bank)
    elif wrong == "a bias":
        changed = replace(CASE, bias=CASE.bias + 1e-4)
    else:
        changed = CASE.cast(torch.bfloat16).cast(torch.float32)
    result = by_oracle(changed, torch.float32)
    errors = {name: tolerance.distance(result[name], EXPECTED()[name].exact) for name in GRADIENTS}
    assert [name for name, error in errors.items() if error > 10 * EXPECTED()[name].limit]


def test_a_result_that_is_not_a_number_is_outside() -> None:
    result = {name: value * torch.nan for name, value in by_oracle(CASE, torch.float32).items()}
    with pytest.raises(AssertionError, match="error inf"):
        tolerance.check(result, EXPECTED(), "planted")


@pytest.fixture(autouse=True)
def _no_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is planted here is not in the table."""
    monkeypatch.setattr(margins, "record", lambda *arguments: None)
