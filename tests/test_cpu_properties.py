"""Random problems on the cpu backend in float32 against eager float64 autograd.

A seed determines sizes, options, masks, layouts and instruction sets; failures name the seed.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import ckd
from ckd.backends import cpu
from tests import oracle, tolerance
from tests.oracle import GRADIENTS, Case, make_case
from tests.quick import slow

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))

PROBLEMS = 100  # of each run
Results = dict[str, Tensor]


@dataclass
class Drawn:
    case: Case  # the bank in float32
    bank: Tensor  # the same values in the dtype and layout that the op gets
    tier: str
    threads: int
    needs: list[str]
    smoothing: float
    reduction: str
    weights: tuple[Tensor, Tensor | float]  # of the losses and of lse in the differentiated sum

    def contrastive_ce(self) -> Results:
        case = replace(self.case, bank=self.bank).requiring(*self.needs)
        loss, lse = ckd.contrastive_cross_entropy(
            *case.arguments,
            label_smoothing=self.smoothing,
            reduction=self.reduction,
            return_lse=True,
            backend="cpu",
        )
        return self._results(case, loss, lse)

    def contrastive_ce_by_oracle(self, dtype: torch.dtype) -> Results:
        case = self.case.cast(dtype).requiring(*self.needs)
        loss, lse = oracle.loss_and_lse(
            case, label_smoothing=self.smoothing, reduction=self.reduction
        )
        return self._results(case, loss, lse)

    def _results(self, case: Case, loss: Tensor, lse: Tensor) -> Results:
        by_loss, by_lse = self.weights
        total = (loss * by_loss.to(loss)).sum() + (lse * by_lse).sum()
        return {"loss": loss.detach(), "lse": lse.detach(), **oracle.gradients(case, total)}

    def similarity(self) -> Results:
        case = replace(self.case, bank=self.bank).requiring(*self.needs)
        student, bank, _, weight, bias, scale = case.arguments
        table = ckd.normalized_similarity(student, bank, weight, bias, scale, backend="cpu")
        return self._similarity_results(case, table)

    def similarity_by_oracle(self, dtype: torch.dtype) -> Results:
        case = self.case.cast(dtype).requiring(*self.needs)
        return self._similarity_results(case, oracle.logits(case))

    def _similarity_results(self, case: Case, table: Tensor) -> Results:
        total = (table * self.weights[0].to(table)[:, None]).square().sum()
        return {"table": table.detach(), **oracle.gradients(case, total)}


def draw(seed: int) -> Drawn:
    rng = random.Random(seed)

    def size(least: int, most: int) -> int:
        return int(math.exp(rng.uniform(math.log(least), math.log(most + 1))))

    # With one bank row or one dimension some exact gradients are zero, and errors relative to zero
    # mean nothing: test_cpu_backend.py has these sizes.
    batch, bank_rows, width, student_dim = size(1, 300), size(2, 700), size(2, 300), size(2, 150)
    case = make_case(
        batch,
        bank_rows,
        width,
        student_dim if rng.random() < 0.8 else None,
        bias=rng.random() < 0.7,
        tau=rng.choice([1.0, 5.0, 14.2857, 63.0, 64.5, 100.0]),
        learned=rng.choice([0.0, 0.3, 1.0, 100.0]),
        seed=seed,
    )
    g = torch.Generator().manual_seed(seed)
    if rng.random() < 0.3:
        case.target[torch.rand(batch, generator=g) < 0.3] = -100
    if rng.random() < 0.2:
        case.student[torch.rand(batch, generator=g) < 0.2] = 0
    if rng.random() < 0.2:
        case.student *= rng.choice([0.1, 1e4])
    bank = case.bank.half()
    if rng.random() < 0.3:
        bank = torch.cat([bank, bank], dim=1)[:, :width]
    needs = [n for n in GRADIENTS if case.has(n) and rng.random() < 0.8] or ["student"]
    reduction = rng.choice(["mean", "sum", "none"])
    by_loss = torch.randn(batch, generator=g) if reduction == "none" else torch.ones(1)
    return Drawn(
        case,
        bank,
        rng.choice(list(cpu.TIERS)),
        rng.choice([1, 2, 3]),
        needs,
        rng.choice([0.0, 0.0, 0.1]),
        reduction,
        (by_loss, rng.choice([0.0, 0.3])),
    )


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("run", [*range(3), *slow(range(3, 20))])
def test_random_problems_against_float64(run: int, restored_threads: None) -> None:
    for seed in range(run * PROBLEMS, (run + 1) * PROBLEMS):
        drawn = draw(seed)
        torch.set_num_threads(drawn.threads)
        op, by_oracle = (
            (Drawn.similarity, Drawn.similarity_by_oracle)
            if seed % 4 == 0
            else (Drawn.contrastive_ce, Drawn.contrastive_ce_by_oracle)
        )
        with cpu.use_tier(drawn.tier):
            result = op(drawn)
        try:
            tolerance.check_quickly(result, functools.partial(by_oracle, drawn), "cpu: random")
        except AssertionError as error:
            sizes = {n: tuple(getattr(drawn.case, n).shape) for n in ("student", "bank")}
            raise AssertionError(
                f"draw({seed}) in {drawn.tier}, {op.__name__}, {sizes}, "
                f"tau {drawn.case.logit_scale.item():g}: {error}"
            ) from None
