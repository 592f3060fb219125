"""The losses of two matrices of rows (cosine, mse, logits) against their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ckd.losses import (
    CosineDistillationLoss,
    LogitDistillationLoss,
    MSEDistillationLoss,
)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    lengths = student.square().sum(1).sqrt() * teacher.square().sum(1).sqrt()
    return 1 - (student * teacher).sum(1) / lengths


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().sum(1) / student.shape[1]


def logits(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    return 9 * (p * (p / q).log()).sum(1)


PAIRS: dict[str, tuple[Callable[..., nn.Module], Callable[[Tensor, Tensor], Tensor]]] = {
    "cosine": (CosineDistillationLoss, cosine),
    "mse": (MSEDistillationLoss, mse),
    "logits": (lambda **options: LogitDistillationLoss(3.0, **options), logits),
}
every_loss = pytest.mark.parametrize("name", PAIRS)


def rows(batch: int = 6, dim: int = 5, **options: object) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    student, teacher = torch.randn(2, batch, dim, generator=generator, dtype=torch.float64)
    return student.to(**options).requires_grad_(), (3 * teacher).to(**options)


@every_loss
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_value_and_gradient_are_those_of_the_formula(name: str, reduction: str) -> None:
    make, formula = PAIRS[name]
    student, teacher = rows(dtype=torch.float32)
    exact = student.detach().double().requires_grad_()
    expected = formula(exact, teacher.double())
    expected = expected if reduction == "none" else getattr(expected, reduction)()
    loss = make(reduction=reduction)(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.arange(1.0, 7.0) if reduction == "none" else torch.tensor(2.0)
    loss.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


@every_loss
def test_float64_rows_are_computed_in_float64(name: str) -> None:
    make, formula = PAIRS[name]
    student, teacher = rows()
    torch.testing.assert_close(make()(student, teacher), formula(student, teacher).mean())
    assert torch.autograd.gradcheck(lambda s: make()(s, teacher), student)


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_lose_nothing_but_the_inputs_digits(
    name: str, dtype: torch.dtype
) -> None:
    make, formula = PAIRS[name]
    student, teacher = rows(dtype=dtype)
    expected = formula(student.detach().double(), teacher.double()).mean()
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = make()(student, teacher)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@every_loss
def test_an_empty_batch_has_a_loss_of_zero_that_trains_nothing(name: str) -> None:
    make, _ = PAIRS[name]
    student = torch.empty(0, 5, requires_grad=True)
    loss = make()(student, torch.empty(0, 5))
    assert loss.item() == 0
    loss.backward()
    assert student.grad.shape == (0, 5)
    assert make(reduction="none")(student, torch.empty(0, 5)).shape == (0,)


@every_loss
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_not_hidden(name: str, side: int, value: float) -> None:
    make, _ = PAIRS[name]
    pair = [x.detach().clone() for x in rows(dtype=torch.float32)]
    pair[side][2, 1] = value
    losses = make(reduction="none")(*pair)
    assert losses.isfinite().tolist() == [True, True, False, True, True, True]
    assert not make()(*pair).isfinite()


def test_rows_without_a_direction_have_cosine_0_and_no_gradient() -> None:
    student, teacher = rows(dtype=torch.float32)
    with torch.no_grad():
        student[1] = 0
        student[2] = 1e-8
        student[4] = 1e30  # whose norm overflows: an error that is to be seen
        teacher[3] = 0
    losses = CosineDistillationLoss(reduction="none")(student, teacher)
    assert losses[[1, 2, 3]].tolist() == [1, 1, 1]
    assert losses[4].isnan()
    losses[[0, 1, 2, 3, 5]].sum().backward()
    assert student.grad[[1, 2, 3]].abs().max() == 0
    assert student.grad[[0, 5]].abs().min() > 0


@every_loss
def test_the_teacher_gets_no_gradient(name: str) -> None:
    make, _ = PAIRS[name]
    student, teacher = rows()
    teacher.requires_grad_()
    make()(student, teacher).backward()
    assert teacher.grad is None


@every_loss
def test_module_compiles_as_one_graph(name: str) -> None:
    make, _ = PAIRS[name]
    student, teacher = rows(dtype=torch.float32)
    compiled = torch.compile(make(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teacher), make()(student, teacher))


@every_loss
def test_wrong_arguments_are_named(name: str) -> None:
    make, _ = PAIRS[name]
    with pytest.raises(ValueError, match=r"both be \[B, .\], got \[6, 5\] and \[6, 1\]"):
        make()(torch.zeros(6, 5), torch.zeros(6, 1))  # which torch would broadcast
    with pytest.raises(ValueError, match="unknown reduction 'avg'"):
        make(reduction="avg")


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperatures_that_are_none_are_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        LogitDistillationLoss(temperature)
