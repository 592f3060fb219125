"""The KL of softmaxes over a bank against its definition in float64, over the dense [B, K]."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ckd.losses import SoftDistillationLoss, TopSoftDistillationLoss

TEMPERATURE = 0.2
BANK = torch.randn(40, 12, generator=torch.Generator().manual_seed(0)).half()
UNIT = F.normalize(BANK.double(), dim=1)
OWN = torch.tensor([3, 0, 39, 17, 17])


def student(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(OWN), 12, generator=generator).to(dtype).requires_grad_()


def similarities(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=1) @ UNIT.T / TEMPERATURE


TEACHER = similarities(BANK[OWN].double()).softmax(1)
LSE = similarities(BANK[OWN].double()).logsumexp(1).float()
MEAN = TEACHER @ UNIT


def divergence(z: Tensor, q: Tensor = TEACHER) -> Tensor:
    return (torch.xlogy(q, q) - q * similarities(z).log_softmax(1)).sum(1)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_exact_form_is_the_kl_over_the_whole_bank(backend: str, reduction: str) -> None:
    z = student()
    exact = z.detach().double().requires_grad_()
    expected = divergence(exact)
    expected = expected if reduction == "none" else getattr(expected, reduction)()
    criterion = SoftDistillationLoss(TEMPERATURE, reduction=reduction, backend=backend)
    loss = criterion(z, BANK, BANK[OWN], MEAN.float(), LSE)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    upstream = torch.arange(1.0, 6.0) if reduction == "none" else torch.tensor(2.0)
    loss.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_exact_form_of_the_teacher_itself_is_zero_with_mean_rows_in_half_precision() -> None:
    z = BANK[OWN].float().requires_grad_()
    loss = SoftDistillationLoss(TEMPERATURE)(z, BANK, BANK[OWN], MEAN.half(), LSE)
    loss.backward()
    assert abs(loss.item()) < 1e-6  # the rounding of m cancels where z = t
    assert z.grad.abs().max() < 1e-3


def test_top_form_of_all_rows_is_the_kl_over_the_whole_bank(backend: str) -> None:
    z = student()
    every = torch.arange(40, dtype=torch.int32).expand(len(OWN), -1)
    loss = TopSoftDistillationLoss(TEMPERATURE, backend=backend)(z, BANK, every, TEACHER.float())
    assert loss.item() == pytest.approx(divergence(z.detach().double()).mean().item(), rel=1e-5)


def test_top_form_scales_the_weights_that_are_left_to_a_sum_of_one(backend: str) -> None:
    weights, rows = TEACHER.topk(4, dim=1)
    cut = torch.zeros_like(TEACHER).scatter(1, rows, weights / weights.sum(1, keepdim=True))
    z = student()
    exact = z.detach().double().requires_grad_()
    criterion = TopSoftDistillationLoss(TEMPERATURE, reduction="none", backend=backend)
    loss = criterion(z, BANK, rows.int(), weights.half())
    expected = divergence(exact, cut)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=1e-5)  # float16 weights
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=2e-3, atol=1e-3)


def test_a_weight_that_float16_rounded_to_zero_adds_nothing(backend: str) -> None:
    rows, weights = torch.tensor([[3, 5]]), torch.tensor([[1.0, 0.0]]).half()
    z = student()[:1]
    loss = TopSoftDistillationLoss(TEMPERATURE, backend=backend)(z, BANK, rows, weights)
    expected = -similarities(z.detach().double()).log_softmax(1)[0, 3]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_rows_without_a_direction_follow_the_op() -> None:
    z = student().detach()
    z[1] = 0
    z[3, 2] = torch.nan
    z.requires_grad_()
    criterion = SoftDistillationLoss(TEMPERATURE, reduction="none")
    losses = criterion(z, BANK, BANK[OWN], MEAN.float(), LSE)
    uniform = (torch.xlogy(TEACHER, TEACHER).sum(1) + torch.tensor(40.0).log())[1]
    assert losses[1].item() == pytest.approx(uniform.item(), rel=1e-5)
    assert losses.isnan().tolist() == [False, False, False, True, False]
    losses[[0, 1, 2, 4]].sum().backward()
    assert z.grad[1].abs().max() == 0


def test_an_empty_batch_has_a_loss_of_zero() -> None:
    z = torch.empty(0, 12, requires_grad=True)
    loss = SoftDistillationLoss(TEMPERATURE)(z, BANK, BANK[:0], MEAN[:0].float(), LSE[:0])
    loss.backward()
    assert loss.item() == 0
    assert z.grad.shape == (0, 12)


@pytest.mark.parametrize("temperature", [0.0, float("nan")])
def test_wrong_arguments_are_named(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        SoftDistillationLoss(temperature)
    with pytest.raises(ValueError, match=r"mean must be \[5, 12\] and lse \[5\], got"):
        SoftDistillationLoss(0.1)(student(), BANK, BANK[OWN], MEAN, LSE[:4])
    with pytest.raises(ValueError, match=r"both be \[5, M\], got \[5, 3\] and \[5, 2\]"):
        TopSoftDistillationLoss(0.1)(student(), BANK, torch.zeros(5, 3).int(), torch.ones(5, 2))


@pytest.mark.parametrize(
    ("rows", "weights", "says"),
    [
        ([[3, 5]], [[-1.0, -3.0]], "target_weight must be finite and at least 0"),
        ([[3, -100]], [[1.0, 3.0]], r"target\[0\] = -100 is out of range"),
        ([[3.0, 5.0]], [[1.0, 3.0]], "rows must be integers, got torch.float32"),
    ],
)
def test_what_is_no_row_or_no_weight_is_refused(rows: list, weights: list, says: str) -> None:
    criterion = TopSoftDistillationLoss(TEMPERATURE, backend="reference")
    with pytest.raises((ValueError, IndexError), match=says):
        criterion(student()[:1], BANK, torch.tensor(rows), torch.tensor(weights))
