"""Several weighted targets a student in every tier of the cpu backend, where its blocks matter.

tests/test_weighted_targets.py tests the cpu backend in its best tier, in float32.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import ckd
from ckd.backends import cpu
from tests import oracle, tolerance
from tests.oracle import GRADIENTS, Case, make_case, relative_error
from tests.test_cpu_backend import half_tier, threads, tier  # noqa: F401
from tests.test_weighted_targets import by_op, by_oracle, make, oracle_rows

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))

# (B, K, D, W, M). A bank of one panel; students beside an edge of their blocks and chunks of the
# bank; fewer entries than panels, so that a bucket of entries has several; all entries in one row.
SHAPES = [
    (70, 40, 12, 17, 9),
    (257, 130, 8, 6, 32),
    (9, 2500, 7, 33, 5),
    (3, 5000, 5, 4, 3),
    (130, 300, 33, None, 4),
]


@functools.cache  # shared by the tiers
def expected_of(shape: tuple[int, ...], tau: float) -> dict[str, tolerance.Expected]:
    case, weight = make(*shape[:-1], targets=shape[-1], tau=tau, learned=0.3)
    return tolerance.expected(lambda dtype: by_oracle(case, weight, dtype))


@pytest.mark.parametrize("tau", [5.0, 100.0])  # without a shift of the exponents, and with one
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_matches_float64(
    shape: tuple[int, ...],
    tau: float,
    tier: str,  # noqa: F811
) -> None:
    case, weight = make(*shape[:-1], targets=shape[-1], tau=tau, learned=0.3)
    tolerance.check(by_op(case, weight, "cpu"), expected_of(shape, tau), f"cpu: {tier}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_is_right_at_every_edge(shape: tuple[int, ...], half_tier: str) -> None:  # noqa: F811
    case, weight = make(*shape[:-1], targets=shape[-1], tau=5.0, learned=0.3)
    exact = by_oracle(case, weight, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = by_op(case, weight, "cpu")
    for name, value in exact.items():
        error = torch.linalg.vector_norm(result[name].double() - value).item()
        limit = 0.04 * torch.linalg.vector_norm(value).item() + 1e-2
        tolerance.within(error, limit, f"{name}, weights, edges", f"cpu: {half_tier}")


def test_bfloat16_rounds_no_logit_of_a_target(half_tier: str) -> None:  # noqa: F811
    """Its error would be the loss's. Here bfloat16 has the operands of the projection, and the lse
    is the first target's logit, so that the loss is a difference of logits."""
    rows = torch.randn(12, 64).bfloat16().float()
    student = 0.7 * rows + 0.3 * rows.roll(1, 0)
    target = torch.stack([torch.arange(12), torch.arange(12).roll(1)], 1)
    case = Case(student, rows, target, torch.eye(64), None, torch.tensor(100.0))
    weight = torch.tensor([0.6, 0.4]).expand(12, 2)
    exact = oracle_rows(case.cast(torch.float64), weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ckd.contrastive_cross_entropy(
            *case.arguments, target_weight=weight, reduction="none", backend="cpu"
        )
    tolerance.within(relative_error(loss, exact), 2e-6, "loss, weights", f"cpu: {half_tier}")


@pytest.mark.parametrize("scale", [1e3, 2.5e9, 1e30])  # the two forms of logits, and the limit
def test_copies_of_the_target_are_the_target(scale: float, tier: str) -> None:  # noqa: F811
    """Any weights of equal bank rows, in several chunks, give the loss of one of them."""
    case = make_case(40, 1000, 12, 16, tau=scale, learned=100.0)
    case = replace(case, bank=case.bank.repeat(3, 1))
    target = case.target.unsqueeze(1) + torch.tensor([0, 1000, 2000, 1000])
    weight = torch.rand(40, 4).softmax(1)
    one, several = (
        ckd.contrastive_cross_entropy(
            *replace(case, target=y).arguments, target_weight=w, reduction="none", backend="cpu"
        )
        for y, w in ((case.target, None), (target, weight))
    )
    torch.testing.assert_close(several, one, rtol=3e-7, atol=0)
    torch.testing.assert_close(one, torch.full_like(one, math.log(3)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_same_bits_on_any_number_of_threads(half: bool, tier: str, threads: None) -> None:  # noqa: F811
    for shape, tau in (((70, 4500, 40, 33, 12), 14.0), ((300, 150, 30, 70, 5), 5e3)):
        case, weight = make(*shape[:-1], targets=shape[-1], tau=tau)
        results = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                results.append(by_op(case, weight, "cpu", label_smoothing=0.1))
        for other in results[1:]:
            for name, value in results[0].items():
                assert torch.equal(value, other[name]), (shape, name)


def test_each_gradient_can_be_asked_for_alone(tier: str) -> None:  # noqa: F811
    case, weight = make(20, 130, 30, 24, targets=6)
    expected = by_op(case, weight, "cpu")
    for name in (*GRADIENTS, None):
        alone = case if name is None else case.requiring(name)
        loss: Tensor = ckd.contrastive_cross_entropy(
            *alone.arguments, target_weight=weight, backend="cpu"
        )
        assert torch.equal(loss.detach(), expected["loss"]), name
        if name is not None:
            assert torch.equal(oracle.gradients(alone, loss)[name], expected[name]), name
