"""Several weighted targets a student, against eager float64 autograd."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ckd
from ckd.backends import triton
from ckd.backends.interface import INVALID_WEIGHT, Keep, Plan, Targets
from ckd.backends.targets import split_targets
from tests import oracle
from tests.oracle import GRADIENTS, Case, make_case, relative_error
from tests.quick import slow
from tests.tolerance import Results, check, expected, within

# (B, K, D, W, M); W None: no projection. One student, one target, one bank row, primes, and the
# neighbours of powers of two; M = K, and M > K, where rows repeat.
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 10, 8, 4, 3),
    (7, 1, 5, 3, 4),
    (3, 5, 17, 16, 5),
    (64, 10, 64, 32, 32),
    (63, 65, 33, 31, 2),
    (5, 300, 24, None, 7),
]
LARGE = [(65, 127, 128, 64, 33), (13, 517, 7, 129, 64), (33, 31, 64, None, 9)]
NEAR_UNIFORM, MIXED, PEAKED = 0.0, 0.5, 100.0  # how much students resemble their first targets
GRID = [
    *itertools.product(SHAPES, (NEAR_UNIFORM, PEAKED), (14.2857,)),
    *slow((s, *x) for s in SHAPES for x in ((MIXED, 1.0), (NEAR_UNIFORM, 100.0), (PEAKED, 100.0))),
    *slow((s, *x) for s in LARGE for x in ((NEAR_UNIFORM, 14.2857), (MIXED, 1.0), (PEAKED, 100.0))),
]


def make(
    batch: int, bank_rows: int, *dims: int | None, targets: int, **options: Any
) -> tuple[Case, Tensor]:
    """A case whose targets are [B, M] rows of the bank, the first of which the student resembles;
    and weights that sum to one, some of them zero."""
    case = make_case(batch, bank_rows, *dims, **options)  # type: ignore[arg-type]
    g = torch.Generator("cpu").manual_seed(1)
    rows = torch.randint(bank_rows, (batch, targets), generator=g, device="cpu")
    rows[:, 0] = case.target.cpu()
    weight = torch.rand(batch, targets, generator=g, device="cpu") ** 3
    weight[:, 1:][torch.rand(batch, targets - 1, generator=g, device="cpu") < 0.1] = 0
    case.target = rows.to(case.bank.device)
    return case, (weight / weight.sum(1, keepdim=True)).to(case.bank.device)


def oracle_rows(case: Case, weight: Tensor, **options: Any) -> Tensor:
    return oracle.weighted_rows(oracle.logits(case), case.target, weight, **options)


def by_oracle(case: Case, weight: Tensor, dtype: torch.dtype, **options: Any) -> Results:
    case = case.cast(dtype).requiring(*GRADIENTS)
    loss = oracle_rows(case, weight, **options).mean()
    return {"loss": loss.detach(), **oracle.gradients(case, loss)}


def run(case: Case, weight: Tensor | None, backend: str, **options: Any) -> Any:
    return ckd.contrastive_cross_entropy(
        *case.arguments, target_weight=weight, backend=backend, **options
    )


def by_op(case: Case, weight: Tensor | None, backend: str, **options: Any) -> Results:
    case = case.requiring(*GRADIENTS)
    loss = run(case, weight, backend, **options)
    return {"loss": loss.detach(), **oracle.gradients(case, loss)}


@pytest.mark.parametrize("problem", GRID, ids=str)
def test_loss_and_gradients_match_float64(
    problem: tuple[tuple[int, ...], float, float], backend: str
) -> None:
    shape, learned, tau = problem
    case, weight = make(*shape[:-1], targets=shape[-1], tau=tau, learned=learned)
    wanted = expected(lambda dtype: by_oracle(case, weight, dtype))
    result = by_op(case, weight, backend)
    if shape[1] == 1:
        assert all((value.abs() <= 1e-5).all() for value in result.values())
    else:
        check(result, wanted, backend)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_options_match_float64(reduction: str, label_smoothing: float, backend: str) -> None:
    """With weights of any sum, an entry that is ignored, a student without targets and one whose
    weights are all zero."""
    case, weight = make(12, 40, 24, 16, targets=5)
    weight *= torch.linspace(0.2, 3, 12).unsqueeze(1)
    case.target[2, 1] = case.target[5, 0] = -1
    case.target[7] = -1
    weight[8] = 0
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "ignore_index": -1}
    exact = case.cast(torch.float64).requiring(*GRADIENTS)
    rows = oracle_rows(exact, weight, **options)
    truth = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / 11}[reduction]
    case = case.requiring(*GRADIENTS)
    loss = run(case, weight, backend, reduction=reduction, **options)
    torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=2e-6)
    if reduction == "none":
        assert loss[7] == 0
        assert loss[8] == 0
    factor = torch.linspace(-1, 2, 12, dtype=torch.float64) if reduction == "none" else 1.0
    true_gradients = oracle.gradients(exact, (truth * factor).sum())
    for name, value in oracle.gradients(case, (loss * factor).sum()).items():
        limit = 2e-5
        within(relative_error(value, true_gradients[name]), limit, f"{name}, weights", backend)


def test_lse_and_loss_together(backend: str) -> None:
    case, weight = make(9, 30, 12, 10, targets=4)
    case.target[4] = -100
    exact = case.cast(torch.float64).requiring(*GRADIENTS)
    case = case.requiring(*GRADIENTS)
    factor = torch.linspace(-2, 1, 9, dtype=torch.float64)
    true_lse = oracle.logits(exact).logsumexp(1)
    true_loss = oracle_rows(exact, weight).sum() / 8
    loss, lse = run(case, weight, backend, return_lse=True)
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-6, atol=1e-6)
    for mix in (0.0, 1.0):
        truth = oracle.gradients(exact, (factor * true_lse).sum() + mix * true_loss)
        result = oracle.gradients(case, (factor * lse).sum() + mix * loss)
        for name, value in result.items():
            within(relative_error(value, truth[name]), 5e-6, f"{name}, weights, lse", backend)


def test_one_target_is_as_exact_as_without_weights(backend: str) -> None:
    """Also as one of several whose weights are zero, or that are ignored."""
    case = make_case(20, 70, 24, 16, tau=100.0, learned=100.0)
    plain = by_op(case, None, backend)
    assert plain["loss"] < 1e-3
    several = torch.full((20, 3), -100)
    several[:, 1] = case.target
    zeros = torch.stack([case.target.flip(0), case.target, case.target.roll(1)], dim=1)
    own = torch.tensor([0.0, 1.0, 0.0]).expand(20, 3)
    for target, weight in (
        (case.target.unsqueeze(1), torch.ones(20, 1)),
        (case.target, torch.ones(20)),
        (case.target.unsqueeze(1), None),
        (several, None),
        (zeros, own),
        (zeros, own.bfloat16()),
    ):
        result = by_op(Case(**{**vars(case), "target": target}), weight, backend)
        for name, value in plain.items():
            within(relative_error(result[name], value), 1e-6, f"{name}, one target", backend)


def test_weights_may_be_omitted_and_rows_may_repeat(backend: str) -> None:
    case, _ = make(10, 30, 12, 8, targets=4)
    case.target[:, 2] = case.target[:, 1]
    case.target[3, 3] = -100
    equal = torch.full((10, 4), 0.25)
    equal[3, :3] = 1 / 3
    wanted = expected(lambda dtype: by_oracle(case, equal, dtype))
    check(by_op(case, None, backend), wanted, backend)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_entries_of_one_row_are_one_target(label_smoothing: float, backend: str) -> None:
    """Exactly: at this scale, a sum of their shifts that is 1e-8 off changes the loss by 10^22.
    (Triton compiles kernels with and without a shift to roundings of their own.)"""
    case = make_case(20, 70, 24, 16, tau=1e30, learned=100.0)
    target = case.target
    weight = torch.randint(1, 64, (20, 7)) / 64  # whose sums are exact in any order
    case.target = target.unsqueeze(1).expand(20, 7)
    split = split_targets(case.target, weight, 70, -100, label_smoothing, torch.float32)
    assert split.shift is not None
    assert (split.shift == 0).all()
    several = by_op(case, weight, backend, label_smoothing=label_smoothing)
    case.target = target
    one = by_op(case, weight.sum(1), backend, label_smoothing=label_smoothing)
    compiled = backend == "triton" and not triton.interpreted()
    for name, value in one.items():
        if compiled and label_smoothing:
            within(relative_error(several[name], value), 1e-6, f"{name}, one row", backend)
        else:
            torch.testing.assert_close(several[name], value, rtol=0, atol=0)


def test_targets_and_weights_of_any_strides(backend: str) -> None:
    case, weight = make(6, 9, 12, 8, targets=4)
    expected = by_op(case, weight, backend)
    for spread in (
        lambda x: x.T.contiguous().T,
        lambda x: torch.cat([x, x], 1)[:, 4:],
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
    ):
        moved = Case(**{**vars(case), "target": spread(case.target)})
        result = by_op(moved, spread(weight), backend)
        for name, value in expected.items():
            assert torch.equal(result[name], value), name
    case.target, weight = case.target[:1].expand(6, 4), weight[:1].expand(6, 4)
    expected = by_op(Case(**{**vars(case), "target": case.target.clone()}), weight.clone(), backend)
    for name, value in by_op(case, weight, backend).items():
        assert torch.equal(value, expected[name]), name


def test_each_gradient_alone(backend: str) -> None:
    case, weight = make(20, 70, 24, 16, targets=6)
    expected = by_op(case, weight, backend)
    for name in GRADIENTS:
        alone = case.requiring(name)
        result = oracle.gradients(alone, run(alone, weight, backend))
        torch.testing.assert_close(result[name], expected[name], rtol=1e-6, atol=1e-9)


def test_the_shift_is_as_the_kernels_expect_it(backend: str) -> None:
    """See `Targets`: for students with an ignored entry, a repeated row, no target, zero weights, a
    target out of range and an invalid weight."""
    split = ckd.backends.ORDER[backend].split_targets
    target = torch.tensor([[3, 1, -100], [2, 2, 5], [-100] * 3, [4, 4, 0], [0, 9, 1], [1, 2, 3]])
    weight = torch.tensor([[1.0, 3, 7], [2, 3, 1], [1, 1, 1], [0, 0, 0], [1, 1, 1], [2, -1, 2]])
    parts = split(target, weight, 9, -100, 0.5, torch.float32)
    assert parts.shift_rows is not None
    assert parts.shift is not None
    assert parts.target.tolist() == [1, 2, -100, 4, 9, INVALID_WEIGHT]
    assert parts.total.tolist() == [4, 6, 0, 0, 1, 1]
    assert parts.kept == 5
    assert ((parts.shift_rows >= 0) & (parts.shift_rows < 9)).all()
    wanted = [[0.125, -0.125, 0], [0, -1 / 12, 1 / 12], *[[0, 0, 0]] * 4]
    torch.testing.assert_close(parts.shift, torch.tensor(wanted))


@pytest.mark.parametrize("each", [1, 2, 16, 17, 256, 300])
@pytest.mark.parametrize("kind", [None, torch.float32, torch.float16], ids=str)
def test_backends_split_targets_alike(each: int, kind: torch.dtype | None, backend: str) -> None:
    """With every kind of entry, in any place: ignored, out of range, repeated, and weights that are
    0, tied, negative, infinite or NaN."""
    g = torch.Generator("cpu").manual_seed(each)
    target = torch.randint(-2, 12, (64, each), generator=g, device="cpu")
    target[:40].clamp_(0, 9)
    target[torch.rand(target.shape, generator=g, device="cpu") < 0.2] = -100
    weight = torch.randint(0, 4, target.shape, generator=g, device="cpu").float()
    for row, value in enumerate((-1.0, torch.inf, torch.nan, 1e30)):
        weight[row, torch.randint(each, (1,), generator=g, device="cpu")] = value
    given = (target, None if kind is None else weight.to(kind))
    wanted = split_targets(*given, 10, -100, 0.25, torch.float32)
    target, *others = (None if x is None else x.to(torch.zeros(0).device) for x in given)
    parts = ckd.backends.ORDER[backend].split_targets(
        target, *others, 10, -100, 0.25, torch.float32
    )
    for name, x in parts._asdict().items():
        y = getattr(wanted, name)
        if y is None:
            assert x is None, name
        else:
            torch.testing.assert_close(x.cpu(), y, rtol=1e-6, atol=1e-7, msg=f"{name}")


def test_invalid_weights_and_targets_out_of_range_are_split_alike(backend: str) -> None:
    """Every pair of entries: a weight is of no account where its target is ignored or refused."""
    values = itertools.product((0, 3, 9, -7, -100), (0.5, 0.0, -1.0, torch.nan, torch.inf))
    pairs = torch.tensor(list(itertools.product(values, repeat=2)), device="cpu")
    given = pairs[:, :, 0].long(), pairs[:, :, 1].contiguous()
    wanted = split_targets(*given, 5, -100, 0.0, torch.float32)
    target, weight = (x.to(torch.zeros(0).device) for x in given)
    parts = ckd.backends.ORDER[backend].split_targets(target, weight, 5, -100, 0.0, torch.float32)
    for name, x, y in zip(wanted._fields, parts, wanted):
        torch.testing.assert_close(x.cpu(), y, msg=name)


def test_a_distribution_over_the_whole_bank_is_the_cross_entropy_with_probabilities(
    backend: str,
) -> None:
    case = make_case(8, 20, 12, 8)
    q = torch.randn(8, 20).softmax(1)
    case.target = torch.arange(20).expand(8, 20)
    truth = F.cross_entropy(oracle.logits(case.cast(torch.float64)), q.double())
    torch.testing.assert_close(run(case, q, backend).double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1e4, 2.5e9, 1e30])
def test_any_scale(scale: float, backend: str) -> None:
    case, weight = make(20, 70, 24, 16, targets=3, tau=scale)
    exact = case.cast(torch.float64).requiring(*GRADIENTS)
    truth = oracle_rows(exact, weight).mean()
    true_gradients = oracle.gradients(exact, truth)
    for name, value in by_op(case, weight, backend).items():
        error = relative_error(value, truth if name == "loss" else true_gradients[name])
        within(error, 1e-5, f"{name}, weights, any scale", backend)


@pytest.mark.parametrize("half_bank", [True, False])
def test_half_precision(half_bank: bool, backend: str) -> None:
    case, weight = make(16, 50, 24, 12, targets=6)
    case = case.cast(torch.bfloat16, torch.float16 if half_bank else torch.bfloat16)
    exact = case.cast(torch.float64).requiring(*GRADIENTS)
    truth = oracle_rows(exact, weight).mean()
    case = case.requiring(*GRADIENTS)
    loss = run(case, weight.half(), backend)
    assert loss.dtype == torch.float32
    within(relative_error(loss, truth), 2e-3, "loss, weights, half", backend)
    true_gradients = oracle.gradients(exact, truth)
    for name, value in oracle.gradients(case, loss).items():
        assert value.dtype == torch.bfloat16
        error = relative_error(value, true_gradients[name])
        within(error, 2.5 * torch.finfo(torch.bfloat16).eps, f"{name}, weights, half", backend)


@pytest.mark.parametrize("cached", [True, False])
def test_banks_of_several_chunks(cached: bool, backend: str) -> None:
    """Targets lie in every chunk, and some bank rows are those of many students."""
    if not cached:
        ckd.backends.set_cache_limit(0)
    case, weight = make(40, 5000, 16, 24, targets=9)
    case.target[:, 1] = 4999
    case.target[::2, 2] = 0
    wanted = expected(lambda dtype: by_oracle(case, weight, dtype), eager=False)
    check(by_op(case, weight, backend), wanted, backend)


def test_rows_of_norm_zero_and_non_finite_students(backend: str) -> None:
    case, weight = make(6, 9, 12, None, targets=3)
    case.student[2] = 0
    case.bank[5] = 0
    case.target[0], case.target[1, 1] = 5, 5
    exact = case.cast(torch.float64).requiring("student", "logit_scale")
    truth = oracle_rows(exact, weight).mean()
    true_gradients = oracle.gradients(exact, truth)
    case = case.requiring("student", "logit_scale")
    loss = run(case, weight, backend)
    within(relative_error(loss, truth), 1e-6, "loss, weights, zero rows", backend)
    for name, value in oracle.gradients(case, loss).items():
        within(relative_error(value, true_gradients[name]), 5e-6, f"{name}, zero rows", backend)
    student = case.student.detach().clone()
    student[1, 2:4] = math.nan
    bad = Case(**{**vars(case), "student": student})
    loss = run(bad, weight, backend, reduction="none")
    assert loss.isnan().tolist() == [False, True, False, False, False, False]


def test_a_row_without_gradient_may_hold_nan(backend: str) -> None:
    case, weight = make(6, 9, 12, 8, targets=3)
    case.target[1] = -100
    case.student[1] = math.nan
    result = by_op(case, weight, backend)
    assert all(value.isfinite().all() for value in result.values())


def test_an_ignored_student_has_no_gradient_whatever_its_upstream_gradient(backend: str) -> None:
    case, weight = make(6, 9, 12, 8, targets=3)
    case.target[0] = -100
    case.student[0] = math.nan
    case = case.requiring(*GRADIENTS)
    loss = run(case, weight, backend, reduction="none")
    for bad in (math.nan, math.inf):
        upstream = torch.tensor([bad, 1, 1, 1, 1, 1])
        student, *others = torch.autograd.grad(
            loss, [getattr(case, name) for name in GRADIENTS], upstream, retain_graph=True
        )
        assert (student[0] == 0).all()
        assert all(value.isfinite().all() for value in (student, *others))


@pytest.mark.parametrize("bad", [-1, 9, 1 << 40])
def test_targets_out_of_range(bad: int, backend: str) -> None:
    case, weight = make(4, 9, 12, 8, targets=3)
    case.target[2, 1] = bad
    if case.student.is_cpu:
        with pytest.raises(IndexError, match=rf"target\[2\] = {bad} is out of range"):
            run(case, weight, backend)
        return
    case = case.requiring(*GRADIENTS)
    loss = run(case, weight, backend, reduction="none")
    assert loss.isnan().tolist() == [False, False, True, False]
    assert (torch.autograd.grad(loss[2], case.student)[0] == 0).all()


@pytest.mark.parametrize("bad", [-0.5, math.nan, math.inf])
def test_invalid_weights(bad: float, backend: str) -> None:
    case, weight = make(4, 9, 12, 8, targets=3)
    weight[2, 1] = bad
    for target, w in ((case.target, weight), (case.target[:, 1], weight[:, 1])):
        one = Case(**{**vars(case), "target": target})
        if case.student.is_cpu:
            with pytest.raises(ValueError, match=r"target_weight\[2\] is not"):
                run(one, w, backend)
        else:
            loss = run(one, w, backend, reduction="none")
            assert loss.isnan().tolist() == [False, False, True, False]


def test_no_students(backend: str) -> None:
    case, weight = make(3, 9, 12, 8, targets=2)
    case = Case(**{**vars(case), "student": case.student[:0], "target": case.target[:0]})
    result = by_op(case, weight[:0], backend)
    assert all((value == 0).all() for value in result.values())


def test_compiled_code_gives_the_same(backend: str) -> None:
    case, weight = make(12, 40, 24, 16, targets=5)
    case.target[3] = -100

    def loss(*arguments: Tensor) -> Tensor:
        *others, w = arguments
        return ckd.contrastive_cross_entropy(
            *others, target_weight=w, label_smoothing=0.1, backend=backend
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    plain = by_op(case, weight, backend, label_smoothing=0.1)
    case = case.requiring(*GRADIENTS)
    result = compiled(*case.arguments, weight)
    torch.testing.assert_close(result.detach(), plain.pop("loss"), rtol=1e-6, atol=0)
    for name, value in oracle.gradients(case, result).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-7)


def test_opcheck(backend: str) -> None:
    case, weight = make(6, 11, 9, 5, targets=3)
    case.target[2, 1] = -100
    case = case.requiring(*GRADIENTS)
    parts = split_targets(case.target, weight, 11, -100, 0.1, torch.float32)
    inputs = (case.student, case.bank, case.weight, case.bias, case.logit_scale)
    targets = Targets(*parts[:3], 0.1, -100, "none")
    arguments = (*inputs, *targets, *Plan(backend, False), *Keep(True, True, 0))
    torch.library.opcheck(torch.ops.ckd.contrastive_ce.default, arguments)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_targets_and_weights(backend: str) -> None:
    case, weight = make(5, 11, 9, 5, targets=3)
    targets = torch.stack([case.target, case.target.flip(0)])
    weights = torch.stack([weight, weight.roll(1, 0)])

    def loss(student: Tensor, target: Tensor, w: Tensor) -> Tensor:
        moved = Case(**{**vars(case), "student": student, "target": target})
        return run(moved, w, backend)

    found = torch.vmap(torch.func.grad(loss), (None, 0, 0))(case.student, targets, weights)
    for i in range(2):
        own = torch.func.grad(loss)(case.student, targets[i], weights[i])
        torch.testing.assert_close(found[i], own)


def test_gradients_of_float64_students_pass_gradcheck() -> None:
    case, weight = make(3, 6, 5, 4, targets=3)
    exact = case.cast(torch.float64).requiring(*GRADIENTS)

    def loss(*tensors: Tensor) -> Tensor:
        student, w, b, scale = tensors
        return ckd.contrastive_cross_entropy(
            student,
            exact.bank,
            exact.target,
            w,
            b,
            scale,
            target_weight=weight.double(),
            reduction="none",
            backend="reference",
        )

    assert torch.autograd.gradcheck(loss, [getattr(exact, name) for name in GRADIENTS])
