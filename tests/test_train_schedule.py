"""The learning rate as a function of the step, and which parameters decay."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from ckd.train.schedule import learning_rate, parameter_groups


def rates(count: int, **settings) -> list[float]:
    return [learning_rate(step, peak=2.0, **settings) for step in range(count)]


def test_without_warm_up_equals_torchs_cosine_stepped_per_step():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    expected = []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(12, steps_per_epoch=4, epochs=3) == pytest.approx(expected, abs=1e-12)


def test_per_epoch_equals_torchs_cosine_stepped_per_epoch():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    expected = []
    for _ in range(5):
        expected += 3 * [optimizer.param_groups[0]["lr"]]
        optimizer.step()
        scheduler.step()
    assert rates(15, steps_per_epoch=3, epochs=5, per_epoch=True) == pytest.approx(
        expected, abs=1e-12
    )


def test_warm_up_rises_in_equal_steps_to_the_peak_and_falls_from_there():
    found = rates(40, steps_per_epoch=10, epochs=4, warmup_epochs=0.5)
    assert found[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert found[5] == 2.0
    assert all(a > b for a, b in itertools.pairwise(found[5:]))
    assert 0 < found[-1] < 0.01


def test_warm_up_of_a_fraction_of_a_step_never_exceeds_the_peak():
    assert max(rates(4, steps_per_epoch=2, epochs=2, warmup_epochs=0.3)) == 2.0


def test_a_run_that_only_warms_up_is_defined():
    assert rates(4, steps_per_epoch=2, epochs=2, warmup_epochs=2.0) == [0.5, 1.0, 1.5, 2.0]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position_embedding = nn.Parameter(torch.zeros(1, 5, 4))
        self.class_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)


def test_only_matrices_decay():
    model = Model()
    decay, rest = parameter_groups([model], 0.1)
    assert decay["weight_decay"] == 0.1
    assert [id(p) for p in decay["params"]] == [id(model.linear.weight)]
    assert rest["weight_decay"] == 0.0
    assert len(rest["params"]) == 6


def test_all_decay_as_in_the_paper_but_what_is_frozen():
    groups = parameter_groups([Model()], 0.1, decay_all=True)
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(7, 0.1)]
