"""The contrastive cross-entropy op against eager float64 autograd."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import ckd
from ckd.backends import reference
from ckd.ops import _arguments
from tests import oracle
from tests.oracle import GRADIENTS, Case, make_case, relative_error
from tests.quick import slow
from tests.scales import OTHER_SCALES, check_at_scale, make_cases
from tests.tolerance import Expected, Results, check, expected, within

# (B, K, D, W); W None: no projection. One student, one bank row, primes, powers of two and their
# neighbours, B < K and B > K: sizes just below, at and above each edge of a tile, for the batch,
# the bank and both widths.
SHAPES = [
    (1, 1, 1, 1),
    (1, 10, 8, 4),
    (7, 1, 5, 3),
    (2, 3, 17, 16),
    (64, 10, 64, 32),
    (63, 65, 33, 31),
    (5, 300, 24, None),
    (33, 31, 64, None),
]
LARGE = [(65, 127, 128, 64), (128, 1000, 96, 48), (13, 517, 7, 129)]
NEAR_UNIFORM, MIXED, PEAKED = 0.0, 0.5, 100.0  # how much students resemble their targets
GRID = [
    *itertools.product(SHAPES, (NEAR_UNIFORM, PEAKED), (1.0, 100.0)),
    *slow(itertools.product(SHAPES, (MIXED,), (1.0, 14.2857, 100.0))),
    *slow(itertools.product(SHAPES, (NEAR_UNIFORM, PEAKED), (14.2857,))),
    # Each value once: the whole grid of them takes minutes on interpreted and emulated kernels.
    *slow((s, *x) for s in LARGE for x in ((NEAR_UNIFORM, 14.2857), (MIXED, 1.0), (PEAKED, 100.0))),
]


def run(case: Case, backend: str, **options: object) -> torch.Tensor:
    return ckd.contrastive_cross_entropy(*case.arguments, backend=backend, **options)


def by_oracle(case: Case, dtype: torch.dtype, **options: object) -> Results:
    case = case.cast(dtype).requiring(*GRADIENTS)
    loss, _ = oracle.loss_and_lse(case, **options)
    return {"loss": loss.detach(), **oracle.gradients(case, loss)}


def by_op(case: Case, backend: str, **options: object) -> Results:
    case = case.requiring(*GRADIENTS)
    loss = run(case, backend, **options)
    return {"loss": loss.detach(), **oracle.gradients(case, loss)}


def check_against_float64(case: Case, backend: str, **options: object) -> None:
    wanted = expected(lambda dtype: by_oracle(case, dtype, **options))
    check(by_op(case, backend, **options), wanted, backend)


@pytest.mark.parametrize("problem", GRID, ids=str)
def test_loss_and_gradients_match_float64(
    problem: tuple[tuple[int, ...], float, float], backend: str
) -> None:
    shape, learned, tau = problem
    case = make_case(*shape, tau=tau, learned=learned)
    device = str(torch.get_default_device())
    check(by_op(case, backend), expected_of(shape, learned, tau, device), backend)


@functools.cache  # shared by the backends
def expected_of(
    shape: tuple[int, ...], learned: float, tau: float, device: str
) -> dict[str, Expected]:
    case = make_case(*shape, tau=tau, learned=learned)
    if learned == 100.0 and shape[1] > 1:
        return expected_if_peaked(case)
    return expected(lambda dtype: by_oracle(case, dtype))


def expected_if_peaked(case: Case) -> dict[str, Expected]:
    """Limits for losses near zero, from the roundings of the log-odds alone: eager float32 has no
    correct digit there."""

    def by_log_odds(dtype: torch.dtype) -> Results:
        exact = case.cast(dtype).requiring(*GRADIENTS)
        loss = torch.logaddexp(torch.zeros((), dtype=dtype), _log_odds(exact)).sum() / len(
            case.student
        )
        return {"loss": loss.detach(), **oracle.gradients(exact, loss)}

    return expected(by_log_odds, eager=False)


def _log_odds(case: Case) -> torch.Tensor:
    table = oracle.logits(case)
    own = table.gather(1, case.target.unsqueeze(1)).squeeze(1)
    others = table.scatter(1, case.target.unsqueeze(1), -math.inf).logsumexp(1)
    return others - own


def test_gradients_hold_at_a_loss_of_1e_minus_10(backend: str) -> None:
    bank = torch.eye(8, 16).half().float()
    angle = torch.linspace(0.05, 0.3, 6)
    student = torch.zeros(6, 16)
    student[:, 0], student[:, 1] = angle.cos(), angle.sin()
    target = torch.zeros(6, dtype=torch.int64)
    for tau in (23.0, 30.0, 60.0, 100.0):
        case = Case(student, bank, target, None, None, torch.tensor(tau))
        exact = case.cast(torch.float64).requiring("student", "logit_scale")
        true_loss = torch.logaddexp(torch.zeros(()), _log_odds(exact)).mean()
        case = case.requiring("student", "logit_scale")
        loss = run(case, backend)
        limit = max(2e-5, 3e-7 * tau)  # five roundings of the logits
        within(relative_error(loss, true_loss), limit, "loss, loss of 1e-10", backend)
        truth = oracle.gradients(exact, true_loss)
        for name, value in oracle.gradients(case, loss).items():
            within(relative_error(value, truth[name]), limit, f"{name}, loss of 1e-10", backend)


@pytest.mark.parametrize("tile_rows", [1, 2, 7, 64])
def test_result_does_not_depend_on_the_tile(
    tile_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 0)
    monkeypatch.setattr(reference, "MIN_TILE_ROWS", tile_rows)
    for shape in [(5, 64, 12, 9), (5, 65, 12, 9), (3, 13, 12, None), (4, 1, 12, 9)]:
        case = make_case(*shape)
        case.target[0] = 0
        case.target[-1] = shape[1] - 1
        check_against_float64(case, "reference", label_smoothing=0.1)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_options_match_float64(reduction: str, label_smoothing: float, backend: str) -> None:
    case = make_case(12, 40, 24, 16)
    case.target[3] = case.target[7] = -1
    options = {"label_smoothing": label_smoothing, "ignore_index": -1, "reduction": reduction}
    exact = case.cast(torch.float64).requiring(*GRADIENTS)
    truth, _ = oracle.loss_and_lse(exact, **options)
    case = case.requiring(*GRADIENTS)
    loss = run(case, backend, **options)
    torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=2e-6)
    # A different weight for every row, so that a gradient without its row's weight fails.
    factor = torch.linspace(-1, 2, 12, dtype=torch.float64) if reduction == "none" else 1.0
    true_gradients = oracle.gradients(exact, (truth * factor).sum())
    for name, value in oracle.gradients(case, (loss * factor).sum()).items():
        # 2e-5, since d_logit_scale is a sum that cancels with weights of both signs.
        within(relative_error(value, true_gradients[name]), 2e-5, f"{name}, options", backend)


def test_ignore_index_inside_the_bank_ignores_that_row(backend: str) -> None:
    case = make_case(20, 4, 8, 8)
    loss = run(case, backend, ignore_index=2, reduction="none")
    assert (loss[case.target == 2] == 0).all()
    assert (loss[case.target != 2] > 0).all()


def test_lse_has_a_gradient_and_covers_ignored_rows(backend: str) -> None:
    case = make_case(9, 30, 12, 10)
    case.target[4] = -100
    exact = case.cast(torch.float64).requiring(*GRADIENTS)
    case = case.requiring(*GRADIENTS)
    factor = torch.linspace(-2, 1, 9, dtype=torch.float64)
    true_loss, true_lse = oracle.loss_and_lse(exact)
    loss, lse = run(case, backend, return_lse=True)
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-6, atol=1e-6)
    for mix in (0.0, 1.0):  # the lse alone, then together with the loss
        truth = oracle.gradients(exact, (factor * true_lse).sum() + mix * true_loss)
        result = oracle.gradients(case, (factor * lse).sum() + mix * loss)
        for name, value in result.items():
            within(relative_error(value, truth[name]), 5e-6, f"{name}, lse", backend)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_and_all_rows_ignored_give_zero(reduction: str, backend: str) -> None:
    empty = make_case(3, 5, 8, 4)
    empty = replace(empty, student=empty.student[:0], target=empty.target[:0])
    ignored = make_case(3, 5, 8, 4)
    ignored.target[:] = -100
    for case in (empty, ignored):
        case = case.requiring(*GRADIENTS)
        loss = run(case, backend, reduction=reduction)
        assert loss.shape == (case.student.shape[:1] if reduction == "none" else ())
        assert (loss == 0).all()
        for name, value in oracle.gradients(case, loss.sum()).items():
            assert (value == 0).all(), name


def test_one_bank_row_has_loss_zero_and_no_gradient(backend: str) -> None:
    case = make_case(4, 1, 6, 5, tau=100.0).requiring(*GRADIENTS)
    loss = run(case, backend)
    assert loss.item() == 0.0
    assert all((v == 0).all() for v in oracle.gradients(case, loss).values())


def test_rows_of_norm_zero_have_zero_logits_and_zero_gradient(backend: str) -> None:
    case = make_case(6, 9, 12, None)
    case.student[2] = 0
    case.student[3] = 1e-8
    case.bank[5] = 0
    case.target[0], case.target[1] = 5, 4
    exact = case.cast(torch.float64).requiring("student", "logit_scale")
    truth, _ = oracle.loss_and_lse(exact)
    case = case.requiring("student", "logit_scale")
    loss = run(case, backend)
    assert relative_error(loss, truth) < 1e-6
    true_gradients = oracle.gradients(exact, truth)
    for name, value in oracle.gradients(case, loss).items():
        assert relative_error(value, true_gradients[name]) < 3e-6
    assert (torch.autograd.grad(loss, case.student)[0][2:4] == 0).all()


def test_projected_row_of_norm_zero_moves_nothing(backend: str) -> None:
    case = make_case(6, 9, 12, 8, bias=False)
    case.bank[5] = 0
    case.target[0] = 5
    check_against_float64(case, backend)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_non_finite_student_row_has_nan_loss_and_others_do_not(bad: float, backend: str) -> None:
    case = make_case(4, 10, 8, 6)
    case.student[1, 2:4] = bad  # 3e38: finite, but its norm is not
    loss, lse = run(case, backend, reduction="none", return_lse=True)
    assert loss.isnan().tolist() == [False, True, False, False]
    assert lse.isnan().tolist() == [False, True, False, False]
    assert run(case, backend).isnan()


@pytest.mark.parametrize("bank_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_half_inputs_give_float32_loss_and_gradients_in_their_dtype(
    dtype: torch.dtype, bank_dtype: torch.dtype, backend: str
) -> None:
    case = make_case(16, 50, 24, 12).cast(dtype, bank_dtype)
    exact = case.cast(torch.float64).requiring(*GRADIENTS)
    truth, _ = oracle.loss_and_lse(exact)
    case = case.requiring(*GRADIENTS)
    loss = run(case, backend)
    assert loss.dtype == torch.float32
    within(relative_error(loss, truth), 1e-3, "loss, half inputs", backend)
    # Operands are bfloat16 on the cpu backend for students in either half precision, and on GPU
    # backends for a bank that is not float16.
    on_gpu = backend in ("triton", "cuda")
    by_bfloat16 = backend == "cpu" or (on_gpu and bank_dtype != torch.float16)
    half = dtype != torch.float32
    eps = torch.finfo(torch.bfloat16 if half and by_bfloat16 else dtype).eps
    true_gradients = oracle.gradients(exact, truth)
    for name, value in oracle.gradients(case, loss).items():
        assert value.dtype == dtype
        error = relative_error(value, true_gradients[name])
        within(error, max(2.5 * eps, 1e-5), f"{name}, half inputs", backend)


def test_mixed_parameter_dtypes_keep_their_own(backend: str) -> None:
    case = make_case(8, 20, 16, 8)
    case = replace(case, student=case.student.bfloat16(), bank=case.bank.half())
    case = case.requiring(*GRADIENTS)
    grads = oracle.gradients(case, run(case, backend))
    assert {n: g.dtype for n, g in grads.items()} == {
        "student": torch.bfloat16,
        "weight": torch.float32,
        "bias": torch.float32,
        "logit_scale": torch.float32,
    }


def test_autocast_keeps_loss_and_parameter_gradients_float32(backend: str) -> None:
    case = make_case(16, 50, 24, 12).requiring(*GRADIENTS)
    with torch.autocast(case.student.device.type, dtype=torch.bfloat16):
        loss, lse = run(case, backend, return_lse=True)
    assert loss.dtype == lse.dtype == torch.float32
    exact = case.cast(torch.float64).requiring(*GRADIENTS)
    truth, _ = oracle.loss_and_lse(exact)
    within(relative_error(loss, truth), 5e-3, "loss, autocast", backend)
    true_gradients = oracle.gradients(exact, truth)
    for name, value in oracle.gradients(case, loss).items():
        assert value.dtype == torch.float32
        error = relative_error(value, true_gradients[name])
        within(error, 2e-2, f"{name}, autocast", backend)


def test_reference_is_exact_under_autocast() -> None:
    case = make_case(16, 50, 24, 12).requiring(*GRADIENTS)
    plain = run(case, "reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(case, "reference")
        cast_gradients = oracle.gradients(case, cast)
    assert torch.equal(plain, cast)
    for name, value in oracle.gradients(case, plain).items():
        assert torch.equal(value, cast_gradients[name]), name


def test_non_contiguous_inputs_give_the_same_result(backend: str) -> None:
    case = make_case(8, 20, 16, 12)
    strided = Case(
        student=case.student.T.contiguous().T,
        bank=torch.stack([case.bank, case.bank], dim=1)[:, 0],
        target=torch.stack([case.target, case.target], dim=1)[:, 0],
        weight=case.weight.T.contiguous().T,
        bias=torch.stack([case.bias, case.bias], dim=1)[:, 0],
        logit_scale=case.logit_scale,
    )
    assert not any(t.is_contiguous() for t in strided.arguments[:5])
    a, b = case.requiring(*GRADIENTS), strided
    for name in GRADIENTS:
        getattr(b, name).requires_grad_()
    loss_a, loss_b = run(a, backend), run(b, backend)
    torch.testing.assert_close(loss_a, loss_b, rtol=1e-6, atol=0)
    grads_b = oracle.gradients(b, loss_b)
    for name, value in oracle.gradients(a, loss_a).items():
        torch.testing.assert_close(value, grads_b[name], rtol=1e-5, atol=1e-7)


def test_matches_the_eager_lines_it_replaces(backend: str) -> None:
    case = make_case(32, 100, 48, 24)
    z = F.linear(case.bank, case.weight, case.bias)
    table = case.logit_scale * F.normalize(case.student, dim=1) @ F.normalize(z, dim=1).T
    torch.testing.assert_close(run(case, backend), F.cross_entropy(table, case.target))


def test_a_target_among_300_000_rows_is_found(backend: str) -> None:
    bank = torch.zeros(300_000, 4, dtype=torch.float16)
    bank[:, 0] = 1
    bank[299_999] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    student = torch.tensor([[0.0, 2.0, 0.0, 0.0]])
    loss = ckd.contrastive_cross_entropy(
        student, bank, torch.tensor([299_999]), logit_scale=20.0, backend=backend
    )
    assert loss.item() == pytest.approx(math.log1p(299_999 * math.exp(-20.0)), rel=1e-5)


@pytest.mark.parametrize("copies", [3, *slow([1])])
@pytest.mark.parametrize("shape", [(40, 24, 16), *slow([(70, 24, None), (50, 24, 100)])], ids=str)
@pytest.mark.parametrize("scale", [1e4, 2.5e9, 1e30, *slow(OTHER_SCALES)])
def test_any_scale(scale: float, shape: tuple[int, ...], copies: int, backend: str) -> None:
    case, once = make_cases(shape, copies)
    check_at_scale(scale, case, once, backend, extra=math.log(copies))


@pytest.mark.parametrize(
    "options", [{"label_smoothing": 0.1, "reduction": "none"}, {"reduction": "sum"}], ids=str
)
def test_any_scale_with_options(options: dict[str, Any], backend: str) -> None:
    case, once = make_cases((40, 24, 16), 3)
    check_at_scale(1e10, case, once, backend, extra=math.log(3), **options)


@pytest.mark.parametrize("scale", [2.5e9, *slow([1.0, 1e4, 2.0**31, 1e15, 1e30])])
@pytest.mark.parametrize("half", [False, True])
def test_any_scale_with_rows_of_equal_cosines(scale: float, half: bool, backend: str) -> None:
    """Rows of +-1: unit rows and cosines are multiples of 1/8, which even half precision has. Many
    rows have the same cosine."""
    bank = torch.randint(2, (70, 16)) * 2.0 - 1
    student = torch.cat([bank[:10], torch.randint(2, (10, 16)) * 2.0 - 1])
    target = torch.randint(70, (20,))
    target[:5] = torch.arange(5)
    case = Case(student, bank.half(), target, torch.eye(16), torch.zeros(16), torch.tensor(1.0))
    with torch.autocast(student.device.type, dtype=torch.bfloat16, enabled=half):
        check_at_scale(scale, case, case, backend, limit=4e-3 if half else 6e-6)


@pytest.mark.parametrize("scale", [1.3e30, 1e38, torch.tensor(1e38)])
def test_scales_beyond_the_bound_are_refused(
    scale: float | torch.Tensor, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(3, 4, 5, 6)
    tensors = [x.cpu() for x in case.arguments[:5]]
    for op in (ckd.contrastive_cross_entropy, ckd.normalized_similarity):
        arguments = [
            x for x in tensors if op is ckd.contrastive_cross_entropy or x.is_floating_point()
        ]
        with pytest.raises(ValueError, match=r"logit_scale must be .* at most 2\^100"):
            op(*arguments, logit_scale=scale, backend="reference")
    if backend == "cpu":  # it needs the scale's value, and so never sees one that is refused
        return
    monkeypatch.setattr(_arguments, "check_scale", lambda scale: None)
    for value, refused in ((2.0**100, False), (scale, True)):
        at = replace(case, logit_scale=torch.as_tensor(value, dtype=torch.float32))
        loss = ckd.contrastive_cross_entropy(*at.arguments, backend=backend)
        assert loss.isnan().item() == refused


@pytest.mark.parametrize("student_dim", [1, None])
def test_rows_of_one_element_have_no_gradient(student_dim: int | None, backend: str) -> None:
    """Their unit rows are exactly +-1: an error in them would be multiplied by the scale."""
    case = make_case(64, 100, 24 if student_dim else 1, student_dim)
    case = replace(case, student=case.student.abs(), bank=case.bank.abs())
    if case.weight is not None:
        case = replace(case, weight=case.weight.abs(), bias=case.bias.abs())
    result = by_op(case, backend)
    assert result.pop("loss").item() == pytest.approx(math.log(100), rel=1e-6)
    for name in result.keys() - {"logit_scale"}:
        size = torch.linalg.vector_norm(result[name]).item()
        within(size, 1e-8, f"{name}, rows of one element", backend)


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("width", [8, 64])
def test_rows_on_one_line_have_no_gradient(width: int, same: bool, backend: str) -> None:
    """All rows are multiples of one vector, of one sign or of both. (The loss of equal logits has
    one rounding error in all its terms: the model's are independent.)"""
    line = torch.randn(width)
    student, bank = torch.randn(64, 1) * line, torch.randn(100, 1) * line
    if same:
        student, bank = student.sign() * student, bank.sign() * bank
    case = Case(student, bank, torch.randint(100, (64,)), None, None, torch.tensor(14.0))
    wanted = expected(lambda dtype: by_oracle(case, dtype))
    check({"student": by_op(case, backend)["student"]}, {"student": wanted["student"]}, backend)
