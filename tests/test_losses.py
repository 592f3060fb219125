"""The loss module: its parameters, its limit on the scale, and that it trains."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

import ckd


def test_forward_is_the_op_with_its_own_parameters(backend: str) -> None:
    criterion = ckd.EmbeddingDistillationLoss(8, 12, backend=backend, label_smoothing=0.1)
    student, bank = torch.randn(5, 8), torch.randn(9, 12).half()
    target = torch.arange(5)
    expected = ckd.contrastive_cross_entropy(
        student,
        bank,
        target,
        criterion.weight,
        criterion.bias,
        14.2857,
        label_smoothing=0.1,
        backend=backend,
    )
    torch.testing.assert_close(criterion(student, bank, target), expected)


def test_forward_takes_weighted_targets() -> None:
    criterion = ckd.EmbeddingDistillationLoss(8, 12)
    student, bank = torch.randn(5, 8), torch.randn(9, 12).half()
    target, weight = torch.randint(9, (5, 3)), torch.rand(5, 3)
    own = (criterion.weight, criterion.bias, criterion.logit_scale)
    expected = ckd.contrastive_cross_entropy(student, bank, target, *own, target_weight=weight)
    torch.testing.assert_close(criterion(student, bank, target, weight), expected)


def test_state_dict_round_trips() -> None:
    one, two = (ckd.EmbeddingDistillationLoss(8, 12) for _ in range(2))
    assert set(one.state_dict()) == {"weight", "bias", "log_logit_scale"}
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.weight, two.weight)


def test_parameters_follow_the_options() -> None:
    def names(**options: bool) -> set[str]:
        module = ckd.EmbeddingDistillationLoss(8, 8, **options)
        return {name for name, _ in module.named_parameters()}

    assert names() == {"weight", "bias", "log_logit_scale"}
    assert names(bias=False) == {"weight", "log_logit_scale"}
    assert names(projection=False) == {"log_logit_scale"}
    assert names(projection=False, learn_logit_scale=False) == set()


def test_learned_scale_stops_at_its_maximum_and_can_come_back() -> None:
    criterion = ckd.EmbeddingDistillationLoss(4, 4, projection=False, logit_scale=99.0)
    optimizer = torch.optim.SGD(criterion.parameters(), lr=1.0)
    bank, target = torch.eye(4), torch.arange(4)

    def step(student: torch.Tensor) -> float:
        optimizer.zero_grad()
        criterion(student, bank, target).backward()
        optimizer.step()
        criterion(student, bank, target)
        return criterion.logit_scale.item()

    with torch.no_grad():
        criterion.log_logit_scale.fill_(math.log(1e4))
    aligned = torch.eye(4) + 0.9  # right by a small margin: a larger scale is better
    assert step(aligned) == pytest.approx(100.0, rel=1e-5)
    assert step(aligned.roll(1, 0)) < 99.0  # wrong: a smaller scale is better


def test_learning_aligns_student_and_bank(backend: str) -> None:
    torch.manual_seed(1)
    bank, target = torch.randn(6, 16).half(), torch.arange(6).repeat(4)
    student = torch.nn.Embedding(24, 8)
    criterion = ckd.EmbeddingDistillationLoss(8, 16, backend=backend)
    optimizer = torch.optim.Adam([*student.parameters(), *criterion.parameters()], lr=0.05)
    losses = []
    for _ in range(60):
        loss = criterion(student.weight, bank, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.0
    assert losses[-1] < 0.01
    table = ckd.normalized_similarity(student.weight, bank, criterion.weight, criterion.bias)
    assert (table.argmax(1) == target).all()


def test_module_compiles_as_one_graph() -> None:
    criterion = ckd.EmbeddingDistillationLoss(8, 12)
    student = torch.randn(5, 8, requires_grad=True)
    arguments = (student, torch.randn(9, 12).half(), torch.arange(5))
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), criterion(*arguments))
    compiled(*arguments).backward()
    assert criterion.weight.grad is not None


def test_a_module_made_on_meta_is_whole_after_reset() -> None:
    with torch.device("meta"):
        criterion = ckd.EmbeddingDistillationLoss(8, 12, logit_scale=20.0)
    criterion = criterion.to_empty(device="cpu")
    criterion.reset_parameters()
    assert criterion.logit_scale.item() == pytest.approx(20.0)
    assert criterion(torch.randn(5, 8), torch.randn(9, 12), torch.arange(5)).isfinite()


@pytest.mark.parametrize("learned", [True, False])
def test_fully_shard_takes_it_as_documented(learned: bool) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if "ignored_params" not in inspect.signature(fsdp.fully_shard).parameters:
        pytest.skip("this torch cannot leave parameters out")
    dist = torch.distributed
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        criterion = ckd.EmbeddingDistillationLoss(6, 8, learn_logit_scale=learned)
        inputs = torch.randn(4, 6), torch.randn(9, 8), torch.arange(4)
        expected = criterion(*inputs)
        mesh = dist.init_device_mesh("cpu", (1,))
        left_out = {criterion.log_logit_scale} if learned else None
        fsdp.fully_shard(criterion, mesh=mesh, ignored_params=left_out)
        loss = criterion(*inputs)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        assert criterion.weight.grad is not None
        assert (criterion.log_logit_scale.grad is not None) == learned
    finally:
        dist.destroy_process_group()
