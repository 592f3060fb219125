"""The cpu backend in every tier (instruction set) that runs here, against eager float64 autograd.

tests/test_contrastive_ce.py and tests/test_similarity.py test it in its best tier. This file tests
the edges of its blocks, and guarantees that no other backend gives.
"""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import ckd
from ckd.backends import cpu
from tests import oracle, tolerance
from tests.oracle import GRADIENTS, Case, make_case, relative_error
from tests.quick import slow
from tests.rounding import Bfloat16Operands
from tests.scales import SCALES, check_at_scale, make_cases

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))

ALL_TIERS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")

# (B, K, D, W); W None: no projection. Sizes just below and above the edges of all blocks, with the
# other sizes small or odd: panels of 64 bank rows and 64 students, tiles and student blocks of 256,
# chunks of 2048 bank rows, blocks of 256 (bfloat16: 512) of D, blocks of 128 x 64 of d_weight,
# register blocks of 6 rows.
SHAPES = [
    (1, 1, 1, 1),
    (1, 2, 1, 5),
    (5, 63, 6, 7),
    (64, 64, 64, 64),
    (65, 65, 66, 65),
    (3, 255, 12, 17),
    (6, 256, 13, 18),
    (7, 257, 5, 16),
    (255, 20, 9, 33),
    (257, 31, 8, 6),
    (2, 2047, 4, 3),
    (3, 2049, 5, 4),
    (70, 2500, 7, 9),
    (9, 70, 255, 127),
    (4, 33, 257, 129),
    (5, 40, 513, 130),
    (12, 100, 130, None),
    (33, 300, 47, None),
]


@pytest.fixture(params=ALL_TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in cpu.TIERS:
        pytest.skip(f"this machine or compiler has no {request.param}")
    with cpu.use_tier(request.param):
        yield request.param


@pytest.fixture
def half_tier(tier: str) -> str:
    if not cpu.TIERS[tier]:
        pytest.skip(f"{tier} has no bfloat16 arithmetic")
    return tier


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def gradients_of(case: Case, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"loss": loss.detach(), **oracle.gradients(case, loss)}


def ours(
    case: Case, bank: torch.Tensor | None = None, **options: object
) -> dict[str, torch.Tensor]:
    """The loss and all gradients, by the cpu backend."""
    case = case.requiring(*GRADIENTS)
    if bank is not None:
        case = replace(case, bank=bank)
    loss = ckd.contrastive_cross_entropy(*case.arguments, backend="cpu", **options)
    return gradients_of(case, loss)


def eager(
    case: Case, dtype: torch.dtype = torch.float32, **options: object
) -> dict[str, torch.Tensor]:
    case = case.cast(dtype).requiring(*GRADIENTS)
    return gradients_of(case, oracle.loss_and_lse(case, **options)[0])


def truth(case: Case, **options: object) -> dict[str, torch.Tensor]:
    return eager(case, torch.float64, **options)


@functools.cache  # shared by the tiers
def expected_of(shape: tuple[int, ...], tau: float) -> dict[str, tolerance.Expected]:
    case = make_case(*shape, tau=tau, learned=0.3)
    return tolerance.expected(functools.partial(eager, case))


@pytest.mark.parametrize("tau", [1.0, *slow([14.2857]), 100.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_is_as_exact_as_eager(shape: tuple[int, ...], tau: float, tier: str) -> None:
    case = make_case(*shape, tau=tau, learned=0.3)
    tolerance.check(ours(case), expected_of(shape, tau), f"cpu: {tier}")


@functools.cache
def problems_and_model(
    shape: tuple[int, ...], tau: float, seeds: int
) -> tuple[list[tuple[Case, dict[str, torch.Tensor]]], dict[str, float]]:
    """Cases with their exact results, and for each quantity the root mean square error over them of
    a rounding model with partial sums of 128 terms."""
    problems, errors = [], []
    for seed in range(seeds):
        case = make_case(*shape, tau=tau, learned=0.3, seed=seed)
        problems.append((case, truth(case)))
        compute = functools.partial(eager, case)
        errors.append(tolerance.model_errors(compute, problems[-1][1], draws=2, chunk=128))
    return problems, {name: rms([e[name] for e in errors]) for name in errors[0]}


def rms(numbers: list[float]) -> float:
    return torch.tensor(numbers, dtype=torch.float64).square().mean().sqrt().item()


def check_over_seeds(
    shape: tuple[int, ...],
    tau: float,
    seeds: int,
    *,
    slack: float,
    tier: str,
    about: str,
    names: tuple[str, ...] = ("loss", *GRADIENTS),
) -> None:
    problems, model = problems_and_model(shape, tau, seeds)
    errors: dict[str, list[float]] = {name: [] for name in model}
    for case, exact in problems:
        for name, value in ours(case).items():
            errors[name].append(tolerance.distance(value, exact[name]))
    for name in names:
        mine = errors[name]
        tolerance.within(rms(mine), slack * model[name], f"{name}, {about}", f"cpu: {tier}")


@pytest.mark.parametrize("tau", [1.0, *slow([14.2857, 100.0])])
def test_float32_is_as_exact_as_the_model_over_many_problems(tau: float, tier: str) -> None:
    """A mean over seeds varies little by chance. Eager's errors are half of the model's here."""
    check_over_seeds((24, 200, 48, 32), tau, 15, slack=1.0, tier=tier, about="many problems")


@pytest.mark.parametrize("shape", [(256, 256, 256, 64), (300, 520, 400, 260)], ids=str)
def test_sums_are_added_128_terms_at_a_time(shape: tuple[int, ...], tier: str) -> None:
    """The error of d_weight is 0.57 of the model's, and would be 0.75 to 0.80 of it with sums of
    256 terms. A tier gives the same result on every machine, so nothing here varies by chance."""
    options = {"slack": 0.67, "tier": tier, "about": "sums of 128", "names": ("weight",)}
    check_over_seeds(shape, 1.0, 3, **options)


# Thousands of terms along the teacher's dimension, the students and the bank.
LONG = [(16, 48, 4096, 16), (2048, 32, 24, 16), (32, 2048, 24, 16)]


@pytest.mark.parametrize("shape", LONG, ids=str)
def test_long_sums_are_partial_sums(shape: tuple[int, ...], tier: str) -> None:
    """Errors are 0.4 to 0.7 of the model's; those of plain sums would be several times as large."""
    check_over_seeds(shape, 1.0, 5, slack=1.2, tier=tier, about="long sums")


def test_peaked_softmax_keeps_its_digits_at_a_loss_below_1e_6(tier: str) -> None:
    """The loss and its gradients come from p_other, which is accurate when it is tiny."""
    case = make_case(8, 40, 32, 24, tau=100.0, learned=0.0)
    n = oracle.unit_rows(torch.nn.functional.linear(case.bank, case.weight, case.bias))
    # The loss of these students is small, but not so small that it cancels in float64.
    mixed = n[case.target] + 1.05 * torch.nn.functional.normalize(case.student, dim=1)
    case = replace(case, student=mixed)
    exact, result, plain = truth(case), ours(case), eager(case)
    assert exact["loss"] < 1e-6
    for name, value in exact.items():
        error = relative_error(result[name], value)
        tolerance.within(error, 2e-4, f"{name}, loss of 1e-7", f"cpu: {tier}")
    assert relative_error(plain["loss"], exact["loss"]) > 1e-3  # it cancels in eager float32


def test_a_loss_that_float64_rounds_to_zero_is_next_to_zero(tier: str) -> None:
    case = make_case(4, 30, 16, 12, tau=100.0, learned=1000.0)
    result = ours(case)
    assert 0 <= result["loss"] < 1e-12
    for name in GRADIENTS:
        assert torch.linalg.vector_norm(result[name]) < 1e-8, name


@pytest.mark.parametrize("best", ["first", "last"])
@pytest.mark.parametrize("tau", [63.9, 64.0, 64.1, 100.0, 300.0])
def test_shift_follows_the_largest_logit_anywhere_in_the_bank(
    tau: float, best: str, tier: str
) -> None:
    case = make_case(6, 1500, 8, None, tau=tau, learned=0.0)
    direction = torch.linspace(-4, 4, 1500)[:, None] * (1 if best == "last" else -1)
    bank = (torch.randn(1500, 8) + direction).half().float()
    case = replace(case, bank=bank, student=torch.ones(6, 8) + 0.1 * case.student)
    wanted = tolerance.expected(functools.partial(eager, case))
    tolerance.check(ours(case), wanted, f"cpu: {tier}")


# A batch and a bank of one panel; and of several, the bank in several chunks and splits.
@pytest.mark.parametrize("shape", [(40, 24, 16), (1500, 9, 33)], ids=str)
def test_any_scale(shape: tuple[int, ...], tier: str) -> None:
    case, once = make_cases(shape, copies=2)
    for scale in [1023.0, 1025.0, *SCALES]:
        check_at_scale(scale, case, once, "cpu", extra=math.log(2), tested=f"cpu: {tier}")


def test_any_scale_in_bfloat16(half_tier: str) -> None:
    """Rows of +-1, whose unit rows bfloat16 has: the ten best rows share the softmax."""
    rows = torch.randint(2, (40, 16)) * 2.0 - 1
    target = torch.randint(400, (40,))
    case = Case(rows, rows.repeat(10, 1), target, torch.eye(16), None, torch.tensor(1.0))
    once = replace(case, bank=rows, target=target % 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for scale in (1e4, 2.5e9, 1e30):
            options = {"extra": math.log(10), "limit": 8e-3, "tested": f"cpu: {half_tier}"}
            check_at_scale(scale, case, once, "cpu", **options)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_same_bits_on_any_number_of_threads(half: bool, tier: str, threads: None) -> None:
    for shape in [(70, 4500, 40, 33), (5, 3000, 33, None), (300, 150, 300, 70)]:
        case = make_case(*shape)
        table = torch.randn(shape[0], shape[1])
        results = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                result = ours(case, label_smoothing=0.1)
                moved = case.requiring(*GRADIENTS)
                logits = ckd.normalized_similarity(*similarity_arguments(moved), backend="cpu")
                result["logits"] = logits.detach()
                for name, value in oracle.gradients(moved, (logits * table).sum()).items():
                    result[f"similarity {name}"] = value
            results.append(result)
        for other in results[1:]:
            for name, value in results[0].items():
                assert torch.equal(value, other[name]), (shape, name)


def similarity_arguments(case: Case) -> tuple[torch.Tensor | None, ...]:
    return case.student, case.bank, case.weight, case.bias, case.logit_scale


def eager_autocast(case: Case) -> dict[str, torch.Tensor]:
    case = case.requiring(*GRADIENTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = torch.nn.functional.linear(case.bank.bfloat16(), case.weight, case.bias)
        n = torch.nn.functional.normalize(z, dim=1)
        cosines = torch.nn.functional.normalize(case.student, dim=1) @ n.T
    loss = torch.nn.functional.cross_entropy(case.logit_scale * cosines.float(), case.target)
    return gradients_of(case, loss)


@pytest.mark.parametrize("tau", [14.2857, 100.0])
def test_bfloat16_is_more_exact_than_eager_autocast(tau: float, half_tier: str) -> None:
    """And nearly as exact as eager float64 with operands rounded to bfloat16: the kernels round
    nothing else to bfloat16."""
    errors: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(10):
        case = make_case(128, 1000, 128, 96, tau=tau, learned=0.25, seed=seed)
        exact, plain = truth(case), eager_autocast(case)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = ours(case)
        with Bfloat16Operands():
            best = eager(case, torch.float64)
        for name, value in exact.items():
            three = (relative_error(r[name], value) for r in (result, plain, best))
            errors.setdefault(name, []).append(tuple(three))
    for name, rows in errors.items():
        mine, theirs, best = torch.tensor(rows).square().mean(0).sqrt().tolist()
        tolerance.within(mine, 1.6 * best, f"{name}, bfloat16 operands", f"cpu: {half_tier}")
        # Eager rounds every result to bfloat16, and tau magnifies these errors. At a small tau most
        # of the error of d_student and d_weight comes from rounding bank and weight (for d_weight,
        # the gradient of z): the kernels' error is 1.5 to 1.9 times smaller than eager's.
        least = 1.0 if tau < 50 and name in ("student", "weight") else 1.3
        tolerance.within(mine, theirs / least, f"{name}, bfloat16", f"cpu: {half_tier}")


def test_the_three_ways_to_allow_bfloat16_give_equal_results(tier: str) -> None:
    case = make_case(20, 90, 70, 40)
    case = replace(case, student=case.student.bfloat16().float())
    exact = ours(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = ours(case)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        medium = ours(case)
    finally:
        torch.set_float32_matmul_precision(before)
    half = ours(replace(case, student=case.student.bfloat16()))
    for name, value in autocast.items():
        assert torch.equal(value, medium[name]), name
        assert torch.equal(value.to(half[name].dtype), half[name]), name
        assert torch.equal(value, exact[name]) != cpu.TIERS[tier], name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_is_right_at_every_edge(shape: tuple[int, ...], half_tier: str) -> None:
    case = make_case(*shape, tau=5.0, learned=0.3)
    exact = truth(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = ours(case)
    for name, value in exact.items():
        size = torch.linalg.vector_norm(value).item()
        difference = torch.linalg.vector_norm(result[name].double() - value).item()
        tolerance.within(difference, 0.04 * size + 1e-2, f"{name}, edges", f"cpu: {half_tier}")


def test_bank_is_read_in_place_whatever_its_dtype_and_strides(tier: str) -> None:
    case = make_case(20, 130, 40, 24)
    wide = torch.randn(260, 100).half()
    wide[::2, 30:70] = case.bank.half()
    expected = ours(case)
    views = [wide[::2, 30:70], case.bank.half().T.contiguous().T, case.bank.half()]
    for view in views:
        for name, value in ours(case, view).items():
            assert torch.equal(value, expected[name]), name
    for dtype in (torch.bfloat16, torch.float32):
        bank = case.bank.to(dtype)
        rounded = ours(replace(case, bank=bank.float()))
        for name, value in ours(case, bank).items():
            assert torch.equal(value, rounded[name]), name
    same_row = case.bank[:1].half().expand(130, 40)
    uniform = ours(case, same_row)
    assert uniform["loss"].item() == pytest.approx(torch.tensor(130.0).log().item(), rel=1e-6)


def test_other_arguments_may_be_strided(tier: str) -> None:
    case = make_case(20, 50, 30, 24)
    expected = ours(case)
    strided = Case(
        torch.stack([case.student, case.student], 2)[:, :, 0],
        case.bank,
        torch.stack([case.target, case.target], 1)[:, 0],
        case.weight.T.contiguous().T,
        torch.stack([case.bias, case.bias], 1)[:, 0],
        case.logit_scale,
    )
    for name, value in ours(strided).items():
        assert torch.equal(value, expected[name]), name


def test_float16_is_widened_exactly(tier: str) -> None:
    """The bank holds every finite float16, subnormals included, in rows of eight."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    bank = bits[bits.isfinite()].reshape(-1, 8)
    student = torch.eye(8)
    exact = oracle.unit_rows(bank.double()).T
    result = ckd.normalized_similarity(student, bank, backend="cpu")
    torch.testing.assert_close(result.double(), exact, rtol=3e-7, atol=1e-7)


def test_every_result_is_written(monkeypatch: pytest.MonkeyPatch, tier: str) -> None:
    real = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        out = real(*args, **kwargs)  # type: ignore[call-overload]
        return out.fill_(torch.nan if out.is_floating_point() else 255)

    expected = {shape: ours(make_case(*shape, learned=0.3)) for shape in SHAPES}
    monkeypatch.setattr(torch, "empty", poisoned)
    for shape in SHAPES:
        for name, value in ours(make_case(*shape, learned=0.3)).items():
            assert torch.equal(value, expected[shape][name]), (shape, name)


def test_nan_of_an_earlier_call_does_not_come_back(tier: str) -> None:
    """Kernels reuse workspaces without clearing them."""
    case = make_case(70, 90, 50, 40)
    expected = ours(case)
    poison = replace(case, student=case.student * torch.nan)
    assert ours(poison)["loss"].isnan()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = ours(case)
        assert ours(poison)["loss"].isnan()
        second = ours(case)
    for name, value in ours(case).items():
        assert torch.equal(value, expected[name]), name
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("room", [0, 64, 3])
def test_results_do_not_depend_on_the_cache(room: int, tier: str) -> None:
    case = make_case(30, 400, 20, 17)
    expected = ours(case)
    # Room for nothing, for some bytes, for three panels.
    ckd.backends.set_cache_limit(room if room != 3 else 3 * 256 * 18)
    for name, value in ours(case).items():
        assert torch.equal(value, expected[name]), name


def test_backward_in_another_tier_ignores_the_cache(half_tier: str) -> None:
    case = make_case(10, 100, 20, 17).requiring(*GRADIENTS)
    exact = truth(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ckd.contrastive_cross_entropy(*case.arguments, backend="cpu")
    with cpu.use_tier("portable"):
        for name, value in oracle.gradients(case, loss).items():
            error = relative_error(value, exact[name])
            tolerance.within(error, 0.03, f"{name}, other tier", f"cpu: {half_tier}")


def test_non_finite_bank_row_makes_every_loss_nan_as_in_the_reference(tier: str) -> None:
    for bad in (float("nan"), float("inf")):
        case = make_case(5, 70, 9, 8)
        case.bank[66, 3] = bad
        for backend in ("cpu", "reference"):
            loss = ckd.contrastive_cross_entropy(*case.arguments, reduction="none", backend=backend)
            assert loss.isnan().all(), backend


def test_each_gradient_can_be_asked_for_alone(tier: str) -> None:
    case = make_case(20, 130, 30, 24)
    expected = ours(case)
    for name in GRADIENTS:
        alone = case.requiring(name)
        loss = ckd.contrastive_cross_entropy(*alone.arguments, backend="cpu")
        assert torch.equal(oracle.gradients(alone, loss)[name], expected[name]), name


def test_empty_batch(tier: str) -> None:
    case = make_case(0, 10, 8, 6)
    result = ours(case)
    assert result["loss"] == 0
    assert all((result[name] == 0).all() for name in GRADIENTS)


def test_memory_beyond_the_cache_does_not_grow_with_the_bank() -> None:
    """300,000 rows of width 64: the cached projected bank has 75 MiB, the logits would have 73."""
    code = """
import torch, ckd
def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith(key)) // 1024
bank = torch.randn(1, 64).half().expand(300_000, 64).contiguous()
student = torch.randn(64, 64, requires_grad=True)
weight = torch.randn(64, 64, requires_grad=True)
target = torch.arange(64)
ckd.contrastive_cross_entropy(student, bank[:100], target, weight, backend="cpu").backward()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
ckd.contrastive_cross_entropy(student, bank, target, weight, backend="cpu").backward()
print(status("VmHWM") - before)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # The cache, and a few MiB that do not depend on the bank.
    assert int(done.stdout) < 64 + 16


def test_unknown_tier_is_an_error_that_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="portable"), cpu.use_tier("mmx"):
        pass


def test_float64_student_is_left_to_the_reference() -> None:
    case = make_case(3, 4, 5, 6).cast(torch.float64)
    with pytest.raises(ckd.backends.BackendError, match="float64"):
        ckd.contrastive_cross_entropy(*case.arguments, backend="cpu")
    assert ckd.backends.explain(case.student, case.bank, case.weight).chosen == "reference"


def similarity_results(case: Case, table: torch.Tensor) -> dict[str, torch.Tensor]:
    """`table`, and the gradients of its product with random numbers that depend on its shape
    alone."""
    factor = torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
    total = (table * factor.to(table.dtype)).sum()
    return {"table": table.detach(), **oracle.gradients(case, total)}


@functools.cache  # shared by the tiers
def expected_similarity(shape: tuple[int, ...]) -> dict[str, tolerance.Expected]:
    def by_oracle(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        case = make_case(*shape, learned=0.3).cast(dtype).requiring(*GRADIENTS)
        return similarity_results(case, oracle.logits(case))

    return tolerance.expected(by_oracle)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_similarity_and_its_gradients_match_float64(shape: tuple[int, ...], tier: str) -> None:
    case = make_case(*shape, learned=0.3).requiring(*GRADIENTS)
    table = ckd.normalized_similarity(*similarity_arguments(case), backend="cpu")
    tolerance.check(similarity_results(case, table), expected_similarity(shape), f"cpu: {tier}")
