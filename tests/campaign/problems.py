"""Stage problems: random problems of the ops, extreme ones too, against float64 autograd."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ckd
from ckd.backends import cpu
from tests import oracle, tolerance
from tests.campaign.child import Result, in_child
from tests.oracle import GRADIENTS, Case, make_case

EXTREME = 1e6  # eager float32 is a measure of errors up to this scale of the inputs
RARE = 3.0  # times tolerance's limits: among 10^5 problems, errors of chance are larger
OVERFLOW = 1e19  # squares of larger norms overflow float32: NaN is right, too


@dataclass
class Problem:
    case: Case  # float32
    bank: Tensor  # the same values as the op gets them
    op: str
    backend: str
    tier: str  # of the backend cpu
    needs: list[str]
    options: dict[str, Any]  # of the loss
    weights: tuple[Tensor, float]  # of the losses and of lse in the sum that is differentiated
    scale: float
    target_weight: Tensor | None = None

    def by_op(self) -> dict[str, Tensor]:
        case = replace(self.case, bank=self.bank).requiring(*self.needs)
        student, bank, _, weight, bias, scale = case.arguments
        forced = cpu.use_tier(self.tier) if self.backend == "cpu" else contextlib.nullcontext()
        with forced:
            if self.op == "similarity":
                inputs = (student, bank, weight, bias, scale)
                return self._of_table(
                    case, ckd.normalized_similarity(*inputs, backend=self.backend)
                )
            loss, lse = ckd.contrastive_cross_entropy(
                *case.arguments,
                **self.options,
                target_weight=self.target_weight,
                return_lse=True,
                backend=self.backend,
            )
            return self._of_loss(case, loss, lse)

    def by_oracle(self, dtype: torch.dtype) -> dict[str, Tensor]:
        case = self.case.cast(dtype).requiring(*self.needs)
        if self.op == "similarity":
            return self._of_table(case, oracle.logits(case))
        options = {**self.options, "target_weight": self.target_weight}
        return self._of_loss(case, *oracle.loss_and_lse(case, **options))

    def _of_loss(self, case: Case, loss: Tensor, lse: Tensor) -> dict[str, Tensor]:
        by_loss, by_lse = self.weights
        if loss.dim() == 0:
            by_loss = by_loss[:1].squeeze()
        total = (loss * by_loss.to(loss)).sum() + (lse * by_lse).sum()
        return {"loss": loss.detach(), "lse": lse.detach(), **oracle.gradients(case, total)}

    def _of_table(self, case: Case, table: Tensor) -> dict[str, Tensor]:
        total = (table * self.weights[0].to(table)[:, None]).square().sum()
        return {"table": table.detach(), **oracle.gradients(case, total)}

    def overflows(self) -> bool:
        case = self.case.cast(torch.float64)
        z = case.bank if case.weight is None else F.linear(case.bank, case.weight, case.bias)
        norms = [torch.linalg.vector_norm(rows, dim=1).max().item() for rows in (case.student, z)]
        return not max(norms) < OVERFLOW

    def check(self) -> str:
        """The kind of outcome; raises AssertionError for a wrong result."""
        result = self.by_op()
        if any(bool(value.isnan().any()) for value in result.values()) and self.overflows():
            return "NaN by overflow"
        if self.scale <= EXTREME:
            with contextlib.suppress(AssertionError):
                tolerance.check_quickly(result, self.by_oracle, "campaign")
                return "exact"
        wanted = tolerance.expected(self.by_oracle, eager=self.scale <= EXTREME)
        wanted = {k: w._replace(limit=RARE * w.limit) for k, w in wanted.items()}
        tolerance.check(result, wanted, "campaign")
        return "exact at an extreme scale" if self.scale > EXTREME else "exact, by chance less"


def draw(chance: random.Random, seed: int) -> Problem:
    def size(most: int) -> int:
        few = chance.random() < 0.15
        return chance.randint(1, 2) if few else int(math.exp(chance.uniform(0, math.log(most))))

    batch, rows, width = size(100), size(300), size(100)
    projected = chance.random() < 0.8
    options = {"tau": chance.choice([0.01, 1.0, 14.2857, 63.0, 64.5, 100.0, 1e4]), "seed": seed}
    case = make_case(
        *(batch, rows, width, size(80) if projected else None),
        bias=chance.random() < 0.7,
        learned=chance.choice([0.0, 0.3, 1.0, 100.0]),
        **options,
    )
    g = torch.Generator().manual_seed(seed)
    dtype = chance.choice([torch.float16, torch.bfloat16, torch.float32])
    case.bank = case.bank.to(dtype).float()
    scale = 1.0
    if chance.random() < 0.4:
        scale = 10 ** chance.uniform(-5, 38 if chance.random() < 0.5 else 18)
        names = ["student", *(["weight"] if projected else [])]
        if dtype != torch.float16:
            names.append("bank")
        name = chance.choice(names)
        setattr(case, name, (getattr(case, name) * scale).to(dtype if name == "bank" else None))
        case.bank = case.bank.float()
    ignore = chance.choice([-100, -1, 0, rows - 1, rows + 7])
    if chance.random() < 0.4:
        share = chance.choice([0.3, 1.0])
        case.target[torch.rand(batch, generator=g) < share] = ignore
    if chance.random() < 0.2:
        case.student[torch.rand(batch, generator=g) < 0.2] = 0
    bank = case.bank.to(dtype)
    if chance.random() < 0.3:
        bank = torch.cat([bank, bank], dim=1)[:, :width]
    problem = Problem(
        case,
        bank,
        op=chance.choice(["loss", "loss", "loss", "similarity"]),
        backend=chance.choice(["reference", *(["cpu"] * 3 if cpu.TIERS else [])]),
        tier=chance.choice(list(cpu.TIERS) or [""]),
        needs=[n for n in GRADIENTS if case.has(n) and chance.random() < 0.8] or ["student"],
        options={
            "label_smoothing": chance.choice([0.0, 0.0, 0.1, 1.0]),
            "ignore_index": ignore,
            "reduction": chance.choice(["mean", "sum", "none"]),
        },
        weights=(torch.randn(batch, generator=g), chance.choice([0.0, 0.3])),
        scale=scale,
    )
    if problem.op == "loss" and chance.random() < 0.4:
        give_several_targets(problem, size(60), g)
    return problem


def give_several_targets(problem: Problem, count: int, g: torch.Generator) -> None:
    """With repeated rows, zero weights, ignored entries and sums other than 1; the first target is
    as before."""
    case, ignore = problem.case, problem.options["ignore_index"]
    shape = (len(case.target), count)
    rows = torch.randint(len(case.bank), shape, generator=g)
    rows[torch.rand(shape, generator=g) < 0.1] = ignore
    rows[:, 0] = case.target
    rows[case.target == ignore] = ignore
    case.target = rows
    weight = torch.rand(shape, generator=g) ** 3 * torch.randn((shape[0], 1), generator=g).exp()
    problem.target_weight = weight.masked_fill(torch.rand(shape, generator=g) < 0.1, 0)


def stage(root: Path, seed: int) -> Callable[[int], Result]:
    torch.set_num_threads(1)

    def case(number: int) -> Result:
        chance = random.Random(f"problems {seed} {number}")
        problem = draw(chance, chance.randrange(2**31))
        ended = in_child(problem.check)
        if ended.value is not None:
            return Result(ended.value)
        kind = "wrong" if "AssertionError" in str(ended.failure) else "raised"
        shapes = {n: tuple(getattr(problem.case, n).shape) for n in ("student", "bank", "target")}
        about = f"{problem.op} of {shapes} by {problem.backend} {problem.tier}, "
        about += (
            f"{problem.case.logit_scale.item():g}, {problem.options}, scale {problem.scale:.2g}"
        )
        return Result(kind, f"{about}: {ended.failure or ended.death}")

    return case
