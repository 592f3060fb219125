"""The GPU backends: results do not depend on chunks, splits and blocks, and survive float16.

Runs on a GPU. Without one, tests/test_triton_interpreter.py runs it for triton in Triton's
interpreter, and tests/test_cuda_emulated.py for cuda on emulated kernels.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import pytest
import torch

import ckd
from ckd.backends import cuda, triton
from ckd.backends.device import Simulated
from tests import oracle, tolerance
from tests import test_weighted_targets as weighted
from tests.oracle import GRADIENTS, Case, make_case, relative_error
from tests.quick import slow

Results = dict[str, torch.Tensor]
T = TypeVar("T")

# (B, K, D, W); W None: no projection. Tiles have 32 (triton in the interpreter) or 64 students and
# bank rows, and blocks of 32 or 64 of the width. There are several of each, with sizes just above
# and below their multiples, and widths that are no multiple of 16.
SHAPES = [
    (33, 65, 31, 33), (31, 64, 40, 32), (64, 97, 17, 65), (5, 200, 33, None), (70, 131, 50, 2),
]  # fmt: skip
WIDE = [(65, 129, 40, 130), (20, 70, 24, 300)]  # several blocks of 128 and of 256


class Gpu:
    """A GPU backend and its device: a GPU, or the CPU that simulates one."""

    def __init__(self, name: str) -> None:
        self.name = name
        if name == "cuda":
            self.module, self.call = cuda, cuda._Call
        else:
            from ckd.backends.triton import call

            self.module, self.call = triton, call.Call
        self.device = self.module.gpu.type

    def in_several_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Chunks of 48 or 64 bank rows, and no cache, so that the backward projects them again. In
        triton also three programs for the students' gradients, whose partial sums are read two at
        a time."""
        ckd.backends.set_cache_limit(0)
        small = type(self.module.gpu)(chunk_rows=64 if self.name == "cuda" else 48)
        monkeypatch.setattr(self.module, "gpu", small)
        if self.name == "triton":
            from ckd.backends.triton import students

            monkeypatch.setattr(students, "STUDENT_PROGRAMS", 3)
            monkeypatch.setattr(students, "BLOCK_PARTS", 2)

    def autocast(self, enabled: bool = True) -> torch.autocast:
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=enabled)


AVAILABLE = [name for name in ("triton", "cuda") if ckd.backends.ORDER[name].missing() is None]


@pytest.fixture(params=AVAILABLE)
def gpu(request: pytest.FixtureRequest) -> Gpu:
    return Gpu(request.param)


def on_device(gpu: Gpu, case: Case) -> Case:
    moved = {n: x.to(gpu.device) for n, x in vars(case).items() if x is not None}
    return replace(case, **moved)


def ours(gpu: Gpu, case: Case, half: bool = False, **options: object) -> Results:
    case = on_device(gpu, case).requiring(*GRADIENTS)
    with gpu.autocast(half):
        loss = ckd.contrastive_cross_entropy(*case.arguments, backend=gpu.name, **options)
    return {"loss": loss.detach().cpu()} | {
        n: x.cpu() for n, x in oracle.gradients(case, loss).items()
    }


def eager(case: Case, dtype: torch.dtype = torch.float64) -> Results:
    case = case.cast(dtype).requiring(*GRADIENTS)
    loss = oracle.loss_and_lse(case)[0]
    return {"loss": loss.detach(), **oracle.gradients(case, loss)}


def eager_autocast(case: Case) -> Results:
    case = case.requiring(*GRADIENTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = torch.nn.functional.linear(case.bank.bfloat16(), case.weight, case.bias)
        n = torch.nn.functional.normalize(z, dim=1)
        cosines = torch.nn.functional.normalize(case.student, dim=1) @ n.T
    loss = torch.nn.functional.cross_entropy(case.logit_scale * cosines.float(), case.target)
    return {"loss": loss.detach(), **oracle.gradients(case, loss)}


@pytest.fixture(params=["one chunk", "several chunks"])
def chunks(request: pytest.FixtureRequest, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> int:
    if request.param == "one chunk":
        return 1
    gpu.in_several_chunks(monkeypatch)
    return 2


@functools.cache  # shared by one chunk and several
def expected_of(shape: tuple[int, ...], tau: float) -> dict[str, tolerance.Expected]:
    return tolerance.expected(functools.partial(eager, make_case(*shape, tau=tau)))


@pytest.mark.parametrize("tau", [*slow([1.0]), 14.2857, *slow([100.0])])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_at_every_edge(gpu: Gpu, shape: tuple[int, ...], tau: float, chunks: int) -> None:
    case = make_case(*shape, tau=tau)
    tolerance.check(ours(gpu, case), expected_of(shape, tau), gpu.name)


@pytest.mark.parametrize("tau", [5.0, *slow([100.0])])
@pytest.mark.parametrize("shape", [*SHAPES, *slow(WIDE[:1]), *WIDE[1:]], ids=str)
def test_half_precision_at_every_edge(
    gpu: Gpu, shape: tuple[int, ...], tau: float, chunks: int
) -> None:
    case = make_case(*shape, tau=tau, learned=0.3)
    case = replace(case, bank=case.bank.half())
    exact, result = eager(case), ours(gpu, case, half=True)
    for name, value in exact.items():
        size = torch.linalg.vector_norm(value).item()
        error = torch.linalg.vector_norm(result[name].double() - value).item()
        tolerance.within(error, 1e-3 * tau * size + 2e-3, f"{name}, half", gpu.name)


def test_half_precision_is_far_more_exact_than_eager_autocast(gpu: Gpu) -> None:
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(4):
        case = make_case(64, 300, 96, 48, tau=14.2857, learned=0.25, seed=seed)
        exact, plain = eager(case), eager_autocast(case)
        result = ours(gpu, replace(case, bank=case.bank.half()), half=True)
        for name, value in exact.items():
            pair = (relative_error(result[name], value), relative_error(plain[name], value))
            errors.setdefault(name, []).append(pair)
    for name, pairs in errors.items():
        mine, theirs = torch.tensor(pairs).square().mean(0).sqrt().tolist()
        tolerance.within(mine, theirs / 4, f"{name}, half against autocast", gpu.name)


def test_small_probabilities_and_gradients_survive_float16(gpu: Gpu) -> None:
    """A loss weight of 1e-6 over a flat softmax of 500 rows: products far below float16's range."""
    case = make_case(32, 500, 24, 16, tau=1.0, learned=0.0)
    case = replace(case, bank=case.bank.half())
    exact = eager(case)
    case = on_device(gpu, case).requiring(*GRADIENTS)
    with gpu.autocast():
        loss = ckd.contrastive_cross_entropy(*case.arguments, backend=gpu.name)
    for name, value in oracle.gradients(case, 1e-6 * loss).items():
        error = relative_error(1e6 * value.cpu(), exact[name])
        tolerance.within(error, 4e-3, f"{name}, small gradients", gpu.name)


def test_opposite_rows_survive_float16(gpu: Gpu) -> None:
    """All other rows are opposite to the target: their probabilities are e^-2tau of its own."""
    case = make_case(1, 4, 16, None, tau=30.0)
    case.bank[:] = -case.bank[0] + 0.1 * case.bank
    case = replace(case, student=-case.bank[:1].clone(), target=torch.tensor([1]))
    case = replace(case, bank=case.bank.half())
    exact, result = eager(case), ours(gpu, case, half=True)
    for name, value in exact.items():
        # d_logit_scale is a difference of cosines near -1, which float16 rounds by up to 2^-12.
        error = torch.linalg.vector_norm(result[name].double() - value).item()
        size = torch.linalg.vector_norm(value).item()
        limit = 2e-2 * size + (2**-12 if name == "logit_scale" else 0)
        tolerance.within(error, limit, f"{name}, opposite rows", gpu.name)


@pytest.mark.parametrize("blocks", ["one block", *slow(["several blocks"])])  # of the width
def test_any_scale_in_half_precision(gpu: Gpu, blocks: str, chunks: int) -> None:
    """Rows of +-1, whose unit rows are exact in float16: copies of the best row share the softmax,
    wherever they are, and a cosine has the same bits in every block, forward and backward."""
    several = 1024 if gpu.name == "cuda" else 256
    width = 16 if blocks == "one block" else several
    rows = torch.randint(2, (10, width)) * 2.0 - 1
    bank = rows.repeat(7, 1)  # each row in every chunk
    target = torch.randint(70, (10,))
    target[:5] = torch.arange(5) + 10 * torch.arange(5)
    weight = torch.eye(width)
    for scale in (1e4, 2.5e9, 1e30):
        case = Case(rows, bank.half(), target, weight, torch.zeros(width), torch.tensor(scale))
        once = replace(case, bank=rows, target=target % 10)
        exact, result = eager(once), ours(gpu, case, half=True)
        exact["loss"] += math.log(7)
        for name, value in exact.items():
            error = torch.linalg.vector_norm(result[name].double() - value).item()
            size = torch.linalg.vector_norm(value).item()
            tolerance.within(error, 2e-3 * size, f"{name}, any scale, half", gpu.name)


@pytest.mark.slow
def test_sums_do_not_overflow_where_cosines_differ_by_their_last_bits(gpu: Gpu) -> None:
    """All unit rows are the same but for rounding, and one last bit of a cosine is 1 to 8 units of
    the logits: a maximum that lags behind by more than intended overflows float16."""
    case = Case(
        torch.randn(40, 130), torch.rand(129, 1) + 1, torch.randint(129, (40,)),
        torch.randn(130, 1), None, torch.tensor(1.0),
    )  # fmt: skip
    for scale in torch.logspace(8.5, 10, 10).tolist():
        result = ours(gpu, replace(case, logit_scale=torch.tensor(scale)))
        for name, value in result.items():
            assert value.isfinite().all(), (name, scale)


def test_half_precision_has_no_gradient_along_the_rows(gpu: Gpu, chunks: int) -> None:
    """All projected rows are multiples of one vector. Rounded, they are not of norm 1."""
    line = torch.randn(8)
    weight = torch.outer(line, torch.randn(24))
    case = Case(
        torch.randn(16, 1) * line, torch.randn(40, 24).half(), torch.randint(40, (16,)),
        weight, torch.zeros(8), torch.tensor(14.0),
    )  # fmt: skip
    gradient = ours(gpu, case, half=True)["weight"]
    along = torch.linalg.vector_norm(line / torch.linalg.vector_norm(line) @ gradient).item()
    across = torch.linalg.vector_norm(gradient).item()  # of rounding the rows' direction
    tolerance.within(along, 0.02 * across, "weight, along the rows", gpu.name)


@pytest.fixture
def tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("shape", [*slow([(64, 400, 96, 256)]), (33, 70, 24, 48)], ids=str)
def test_tf32_is_rounded_and_not_truncated(gpu: Gpu, shape: tuple[int, ...], tf32: None) -> None:
    """The largest other logit is close to the target's, so that the loss depends on their
    difference. Truncated operands shrink one logit more than the other, which changes the loss by
    some per cent."""
    case = make_case(*shape, tau=100.0)
    n = oracle.unit_rows(case.bank.half().float() @ case.weight.T + case.bias)
    rival = n[(case.target + 1) % len(n)]
    case = replace(case, bank=case.bank.half(), student=0.95 * rival + n[case.target])
    exact, result = eager(case), ours(gpu, case)
    assert relative_error(result["loss"], exact["loss"]) < 5e-3
    for name in ("student", "weight", "bias"):
        assert relative_error(result[name], exact[name]) < 2e-2, name


def poison_memory(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill all memory of later calls with NaN."""
    original = gpu.call.empty

    def poisoned(self: gpu.call, *shape: object, **options: object) -> torch.Tensor:
        tensor = original(self, *shape, **options)
        poison = {torch.uint8: 255, torch.int32: -7, torch.bool: True}
        return tensor.fill_(poison.get(tensor.dtype, torch.nan))

    monkeypatch.setattr(gpu.call, "empty", poisoned)


def test_nothing_unwritten_is_read(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, chunks: int) -> None:
    case = make_case(33, 100, 24, 20)
    case.target[3] = -100
    clean = ours(gpu, case, label_smoothing=0.1)
    poison_memory(gpu, monkeypatch)
    for name, value in ours(gpu, case, label_smoothing=0.1).items():
        assert torch.equal(value, clean[name]), name


def test_results_are_the_same_bits_every_time(gpu: Gpu, chunks: int) -> None:
    case = make_case(40, 300, 24, 20)
    first, again = ours(gpu, case), ours(gpu, case)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name


def test_bank_is_read_in_place_whatever_its_strides(gpu: Gpu, chunks: int) -> None:
    case = make_case(20, 70, 24, 16)
    wide = torch.randn(140, 60).half()
    wide[::2, 9:33] = case.bank.half()
    expected = ours(gpu, replace(case, bank=case.bank.half()))
    for bank in (wide[::2, 9:33], case.bank.half().T.contiguous().T):
        for name, value in ours(gpu, replace(case, bank=bank)).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


def test_weight_may_begin_anywhere(gpu: Gpu) -> None:
    """A view into one buffer of all parameters, in the operands' dtype, not aligned to 16 bytes."""
    case = make_case(20, 70, 24, 16).cast(torch.float16)
    wide = torch.empty(24 * 16 + 1, dtype=torch.float16)
    view = wide[1:].view(16, 24).copy_(case.weight)
    expected = ours(gpu, case, half=True)
    moved = {n: x.to(gpu.device) for n, x in vars(case).items()}
    moved["weight"] = wide.to(gpu.device)[1:].view(16, 24)
    assert torch.equal(moved["weight"].cpu(), view)
    student = moved["student"].requires_grad_()
    with gpu.autocast():
        loss = ckd.contrastive_cross_entropy(*Case(**moved).arguments, backend=gpu.name)
    assert torch.equal(loss.detach().cpu(), expected["loss"])
    assert torch.equal(torch.autograd.grad(loss, student)[0].cpu(), expected["student"])


def test_one_row_of_weight_may_have_any_stride(gpu: Gpu) -> None:
    """torch calls one row contiguous whatever its stride; kernels align rows by it."""
    case = make_case(6, 70, 16, 1).cast(torch.float16)
    expected = ours(gpu, case, half=True)
    moved = {n: x.to(gpu.device) for n, x in vars(case).items()}
    wide = torch.zeros(1, 25, dtype=torch.float16, device=gpu.device)
    moved["weight"] = wide[:, 8:24].copy_(moved["weight"])
    assert moved["weight"].stride() == (25, 1)
    with gpu.autocast():
        loss = ckd.contrastive_cross_entropy(*Case(**moved).arguments, backend=gpu.name)
    assert torch.equal(loss.cpu(), expected["loss"])


def test_cache_is_used_and_bounded(gpu: Gpu) -> None:
    case = on_device(gpu, make_case(8, 100, 24, 16)).requiring(*GRADIENTS)

    def weight_gradient_after_the_bank_is_lost() -> torch.Tensor:
        bank = case.bank.half()
        moved = replace(case, bank=bank)
        loss = ckd.contrastive_cross_entropy(*moved.arguments, backend=gpu.name)
        bank.data[:, 1:] = 0  # a backward that projects the bank again gets another result
        return torch.autograd.grad(loss, case.bias)[0]

    size = 100 * ((16 if gpu.name == "triton" else 24) * 4 + 4)  # float32, or three float16
    ckd.backends.set_cache_limit(size)
    kept = weight_gradient_after_the_bank_is_lost()
    ckd.backends.set_cache_limit(size - 1)
    lost = weight_gradient_after_the_bank_is_lost()
    expected = ours(gpu, replace(case, bank=case.bank.half()))["bias"].to(kept.device)
    torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-6)
    assert relative_error(lost, expected) > 0.1


def test_targets_out_of_range_give_nan_and_no_gradient(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With check_targets off, as on a GPU, where it does not read the targets."""
    case = make_case(6, 40, 24, 20)
    case.target[:3] = torch.tensor([-100, 40, -1])
    kept = replace(case, student=case.student[3:], target=case.target[3:])
    monkeypatch.setattr(ckd.backends.ORDER[gpu.name], "check_targets", lambda *arguments: None)
    case = on_device(gpu, case).requiring(*GRADIENTS)
    nll, lse = ckd.contrastive_cross_entropy(
        *case.arguments, label_smoothing=0.1, reduction="none", return_lse=True, backend=gpu.name
    )
    assert nll.isnan().tolist() == [False, True, True, False, False, False]
    assert nll[0] == 0
    assert lse.isfinite().all()
    exact = kept.cast(torch.float64).requiring(*GRADIENTS)
    truth = oracle.gradients(exact, oracle.loss_and_lse(exact, label_smoothing=0.1)[0] * 3)
    result = {n: x.cpu() for n, x in oracle.gradients(case, nll.sum()).items()}
    assert (result["student"][:3] == 0).all()
    result["student"] = result["student"][3:]
    for name, value in truth.items():
        error = relative_error(result[name], value)
        tolerance.within(error, 1e-5, f"{name}, bad targets", gpu.name)


def test_huge_and_tiny_loss_weights(gpu: Gpu, chunks: int) -> None:
    """Loss scales of AMP, and weights beyond float16's range."""
    case = make_case(20, 70, 24, 20)
    case = replace(case, bank=case.bank.half())
    exact = eager(case)
    for weight in (1e-35, 2.0**-40, 65536.0, -1.0):
        moved = on_device(gpu, case).requiring(*GRADIENTS)
        with gpu.autocast():
            loss = ckd.contrastive_cross_entropy(*moved.arguments, backend=gpu.name)
        for name, value in oracle.gradients(moved, weight * loss).items():
            error = relative_error(value.cpu() / weight, exact[name])
            tolerance.within(error, 4e-3, f"{name}, loss weights", gpu.name)
        for value in oracle.gradients(moved, 1e-39 * loss).values():
            assert value.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "place"), [((70, 7, 9, 8), 0), ((70, 7, 9, 8), -1), ((5, 1100, 16, 16), 0)], ids=str
)
def test_one_student_outweighs_all_others(
    gpu: Gpu, shape: tuple[int, ...], place: int, chunks: int
) -> None:
    """Its gradient determines the scale of half-precision operands, at any place in the batch."""
    case = make_case(*shape, tau=5.0, learned=0.3)
    case = replace(case, bank=case.bank.half())
    weights = torch.full((shape[0],), 1e-6)
    weights[place] = 1e4
    double = case.cast(torch.float64).requiring(*GRADIENTS)
    rows = oracle.loss_and_lse(double, reduction="none")[0]
    exact = oracle.gradients(double, weights.double() @ rows)
    moved = on_device(gpu, case).requiring(*GRADIENTS)
    with gpu.autocast():
        rows = ckd.contrastive_cross_entropy(*moved.arguments, reduction="none", backend=gpu.name)
    for name, value in oracle.gradients(moved, weights.to(gpu.device) @ rows).items():
        error = relative_error(value.cpu(), exact[name])
        tolerance.within(error, 6e-3, f"{name}, one student", gpu.name)


def test_projection_gradients_hold_where_every_row_is_confident(gpu: Gpu, chunks: int) -> None:
    """G, the gradient of the logits, is as small as the loss, 1e-12: far below float16's range."""
    case = make_case(24, 60, 96, 64, tau=50.0, learned=3.0)
    case = replace(case, bank=case.bank.half())
    exact = eager(case)
    assert 1e-13 < exact["loss"] < 1e-11
    result = ours(gpu, case, half=True)
    for name in ("weight", "bias"):
        error = relative_error(result[name], exact[name])
        tolerance.within(error, 2e-2, f"{name}, confident rows", gpu.name)


@pytest.mark.parametrize(("half", "tau"), [(True, 14.3), (True, 100.0), (False, 100.0)])
def test_padding_rows_of_the_bank_reach_no_gradient(gpu: Gpu, half: bool, tau: float) -> None:
    """All cosines are near -1, but 0 in the padding rows of the last tile: unmasked, these would
    weigh e^tau times as much as a row of the bank."""
    g = torch.Generator().manual_seed(0)
    bank = torch.randn(24, generator=g) + 0.1 * torch.randn(20, 24, generator=g)
    weight, bias = torch.randn(20, 24, generator=g) / 5, 0.1 * torch.randn(20, generator=g)
    student = -(bank @ weight.T + bias)[:8] + 0.1 * torch.randn(8, 20, generator=g)
    target, scale = torch.arange(8), torch.tensor(tau)
    case = Case(student, bank.half(), target, weight, bias, scale)
    exact, result = eager(case), ours(gpu, case, half=half)
    for name in ("weight", "bias"):
        assert relative_error(result[name], exact[name]) < (2e-2 if half else 2e-5), name


def test_nan_in_the_gradient_of_lse_is_not_lost(gpu: Gpu) -> None:
    """In a row without a target, for which no logit is computed separately."""
    case = make_case(6, 40, 24, 20)
    case.target[2] = -100
    case = on_device(gpu, case).requiring("weight", "bias")
    _, lse = ckd.contrastive_cross_entropy(*case.arguments, return_lse=True, backend=gpu.name)
    slope = torch.ones_like(lse)
    slope[2] = torch.nan
    for name, value in oracle.gradients(case, (lse * slope).sum()).items():
        assert value.isnan().all(), name


def test_every_candidate_gives_the_same(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tf32: None
) -> None:
    """Tuning takes the last candidate for a Hopper GPU: some of these tiles hold whole rows."""
    if gpu.name != "triton":
        pytest.skip("cuda has no candidates to choose from")
    from ckd._triton import tuning

    def last(key: object, candidates: Sequence[T], launch: Callable[[T], None]) -> T:
        launch(candidates[-1])
        return candidates[-1]

    case = make_case(20, 70, 24, 144)
    case = replace(case, bank=case.bank.half())
    exact = eager(case)
    if triton.interpreted():
        monkeypatch.setattr(triton, "gpu", Simulated(family="hopper"))
    monkeypatch.setattr(tuning, "choose", last)
    for name, value in ours(gpu, case).items():
        assert relative_error(value, exact[name]) < 5e-3, name


@pytest.mark.parametrize("form", ["matrix", "entries"])
@pytest.mark.parametrize(
    ("half", "width"),
    [(True, 20), *(pytest.param(*x, marks=pytest.mark.slow) for x in [(True, 300), (False, 70)])],
)
def test_every_form_of_a_shift_gives_the_same(
    gpu: Gpu, half: bool, width: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rows that repeat, a row of every student, weights of zero and an entry to ignore."""
    if gpu.name != "triton":
        pytest.skip("cuda has one form")
    from ckd.backends.triton import targets

    gpu.in_several_chunks(monkeypatch)
    monkeypatch.setattr(targets, "MATRIX_ELEMENTS", 1 << 22 if form == "matrix" else 0)
    case, share = weighted.make(35, 131, 24, width, targets=9)
    case = replace(case, bank=case.bank.half())
    case.target[:, 4], case.target[::3, 5] = 130, case.target[::3, 6]
    case.target[7, 3] = -100
    exact = weighted.by_oracle(case, share, torch.float64)
    result = ours(gpu, case, half, target_weight=share.to(gpu.device))
    for name, value in exact.items():
        error = relative_error(result[name], value)
        tolerance.within(error, 4e-3 if half else 1e-5, f"{name}, forms of a shift", gpu.name)


def test_solved_rows_with_tiny_weights_survive_float16(gpu: Gpu) -> None:
    """G is as small as the weights, far below float16's range and far above p_other."""
    case, share = weighted.make(24, 60, 96, 64, targets=3, tau=50.0, learned=3.0)
    share = torch.tensor([1.0, 1e-10, 3e-10]).expand(24, 3)
    case = replace(case, bank=case.bank.half())
    exact = weighted.by_oracle(case, share, torch.float64)
    result = ours(gpu, case, True, target_weight=share.to(gpu.device))
    for name in ("weight", "bias"):
        error = relative_error(result[name], exact[name])
        tolerance.within(error, 2e-2, f"{name}, tiny weights", gpu.name)
    moved = on_device(gpu, case).requiring(*GRADIENTS)
    loss = ckd.contrastive_cross_entropy(
        *moved.arguments, target_weight=share.to(gpu.device), backend=gpu.name
    )
    assert all((x == 0).all() for x in oracle.gradients(moved, 0 * loss).values())


def test_huge_weights_of_solved_rows_give_no_nan(gpu: Gpu) -> None:
    """p_other is 1e-42 here, so gradients vanish; a loss scale of AMP must not make them NaN."""
    bank = torch.eye(20, 64)
    weight, target = torch.eye(64), torch.arange(8)
    case = Case(bank[:8].clone(), bank.half(), target, weight, None, torch.tensor(100.0))
    case = on_device(gpu, case).requiring("student", "weight", "logit_scale")
    with gpu.autocast():
        loss = ckd.contrastive_cross_entropy(*case.arguments, backend=gpu.name)
    for factor in (2.0**22, 2.0**40):
        for name, value in oracle.gradients(case, factor * loss).items():
            assert value.isfinite().all(), (factor, name)


def similarity(gpu: Gpu, case: Case, backend: str) -> Results:
    case = on_device(gpu, case).requiring(*GRADIENTS)
    student, bank, _, weight, bias, scale = case.arguments
    table = ckd.normalized_similarity(student, bank, weight, bias, scale, backend=backend)
    return {n: x.cpu() for n, x in similarity_results(case, table).items()}


def similarity_results(case: Case, table: torch.Tensor) -> Results:
    weights = torch.linspace(-1, 1, table.numel(), dtype=table.dtype, device=table.device)
    total = (table * weights.view(table.shape)).sum()
    return {"table": table.detach(), **oracle.gradients(case, total)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_similarity_at_every_edge(gpu: Gpu, shape: tuple[int, ...], chunks: int) -> None:
    case = make_case(*shape)

    def by_oracle(dtype: torch.dtype) -> Results:
        cast = case.cast(dtype).requiring(*GRADIENTS)
        return similarity_results(cast, oracle.logits(cast))

    tolerance.check(similarity(gpu, case, gpu.name), tolerance.expected(by_oracle), gpu.name)


@pytest.mark.parametrize("half", [False, True])
def test_similarity_gradients_of_each_row_are_on_their_own(
    gpu: Gpu, half: bool, chunks: int
) -> None:
    """Rows of d_logits differ by 22 orders of magnitude, and one is not finite."""
    case = on_device(gpu, make_case(12, 70, 24, 20))
    case = replace(case, bank=case.bank.half())
    sizes = 10.0 ** torch.arange(-18.0, 6.0, 2.0)
    slope = torch.randn(12, 70, generator=torch.Generator().manual_seed(0)) * sizes[:, None]
    slope[5, 3] = torch.nan
    slope = slope.to(gpu.device)

    def d_student(backend: str, half: bool) -> torch.Tensor:
        s = case.student.clone().requires_grad_()
        with gpu.autocast() if half else contextlib.nullcontext():
            table = ckd.normalized_similarity(s, case.bank, *case.arguments[3:], backend=backend)
        return torch.autograd.grad(table, s, slope)[0].cpu()

    expected, found = d_student("reference", False), d_student(gpu.name, half)
    assert found[5].isnan().all()
    for i in [i for i in range(12) if i != 5]:
        error = relative_error(found[i], expected[i])
        about = "student, rows on their own" + ", half" * half
        tolerance.within(error, 4e-3 if half else 1e-5, about, gpu.name)


def test_exact_weight_gradient_whatever_the_norms_of_the_bank(gpu: Gpu, chunks: int) -> None:
    """Rows of dZ scale with 1 / norm of their bank rows: only the products are of similar size."""
    case = make_case(20, 70, 24, 20)
    sizes = 10.0 ** torch.linspace(-4.0, 4.0, 70)
    case = replace(case, bank=(case.bank * sizes[:, None]).half(), bias=None)
    exact = eager(case)
    error = relative_error(ours(gpu, case)["weight"], exact["weight"])
    tolerance.within(error, 1e-5, "weight, norms of the bank", gpu.name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda case: case.cast(torch.float64), "has no float64 arithmetic"),
        (lambda case: on_meta(case), "the tensors are on meta"),
    ],
)
def test_says_what_it_does_not_serve(gpu: Gpu, change: Callable[[Case], Case], words: str) -> None:
    case = change(on_device(gpu, make_case(3, 4, 5, 6)))
    with pytest.raises(ckd.backends.BackendError, match=words):
        ckd.contrastive_cross_entropy(*case.arguments, backend=gpu.name)


def on_meta(case: Case) -> Case:
    return replace(case, **{n: x.to("meta") for n, x in vars(case).items() if x is not None})


@pytest.mark.parametrize(
    ("half", "tau", "width"),
    [
        (False, 14.0, 20),
        (True, 14.0, 20),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in [(True, 1e30, 20), (True, 5.0, 300)]),
    ],
)
def test_weighted_targets_of_every_chunk(
    gpu: Gpu, half: bool, tau: float, width: int, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One and several blocks of the width, and a bank row among the targets of every student. The
    second call must give the same bits with NaN in all memory that it allocates."""
    case, share = weighted.make(35, 131, 24, width, targets=9, tau=tau)
    case = replace(case, bank=case.bank.half())
    case.target[:, 4] = 130
    result = ours(gpu, case, half, target_weight=share.to(gpu.device))
    for name, value in weighted.by_oracle(case, share, torch.float64).items():
        error = relative_error(result[name], value)
        tolerance.within(error, 4e-3 if half else 1e-5, f"{name}, weights, chunks", gpu.name)
    poison_memory(gpu, monkeypatch)
    again = ours(gpu, case, half, target_weight=share.to(gpu.device))
    for name, value in result.items():
        assert torch.equal(value, again[name]), name


def test_wrong_weighted_targets_give_nan_and_no_gradient(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With check_targets off, as on a GPU, where it does not read the targets."""
    case, share = weighted.make(6, 40, 24, 20, targets=3)
    case.target[1, 2], case.target[3, 0], share[4, 1] = 40, -1, math.inf
    right = torch.tensor([0, 2, 5])
    kept = replace(case, student=case.student[right], target=case.target[right])
    monkeypatch.setattr(ckd.backends.ORDER[gpu.name], "check_targets", lambda *arguments: None)
    truth = weighted.by_oracle(kept, share[right], torch.float64)
    case, share = on_device(gpu, case).requiring(*GRADIENTS), share.to(gpu.device)
    nll = ckd.contrastive_cross_entropy(
        *case.arguments, target_weight=share, reduction="none", backend=gpu.name
    )
    assert nll.isnan().tolist() == [False, True, False, True, True, False]
    result = {n: x.cpu() for n, x in oracle.gradients(case, nll.sum() / 3).items()}
    assert (result["student"][[1, 3, 4]] == 0).all()
    result |= {"student": result["student"][right], "loss": nll.detach().cpu()[right].mean()}
    for name, value in truth.items():
        error = relative_error(result[name], value)
        tolerance.within(error, 1e-5, f"{name}, bad weighted targets", gpu.name)


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("targets", [1, 5])
def test_runs_in_a_cuda_graph_without_a_synchronisation(gpu: Gpu, targets: int) -> None:
    case, share = make_case(64, 500, 96, 64), None
    if targets > 1:
        case, share = weighted.make(64, 500, 96, 64, targets=targets)
        share = share.to(gpu.device)
    case = on_device(gpu, replace(case, bank=case.bank.half())).requiring(*GRADIENTS)
    leaves = [getattr(case, n) for n in GRADIENTS]

    def step() -> list[torch.Tensor]:
        with gpu.autocast():
            loss = ckd.contrastive_cross_entropy(
                *case.arguments, target_weight=share, backend=gpu.name
            )
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    expected = step()  # also compiles kernels and measures tiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for value in captured:
        value.fill_(torch.nan)
    graph.replay()
    for value, wanted in zip(captured, expected):
        assert torch.equal(value, wanted)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("shape", [(64, 3_000_000, 768, 64), (8, 40_000_000, 64, None)], ids=str)
def test_offsets_beyond_2_to_the_31(gpu: Gpu, shape: tuple[int, ...]) -> None:
    """The targets are the last rows; all other rows are equal, so few rows give the exact loss."""
    batch, bank_rows, teacher_dim, student_dim = shape
    others = bank_rows - batch
    bank = torch.zeros(bank_rows, teacher_dim, dtype=torch.float16, device=gpu.device)
    bank[:, 0] = 1
    bank[others:] = torch.randn(batch, teacher_dim, device=gpu.device)
    weight = torch.eye(teacher_dim, device=gpu.device)
    weight = None if student_dim is None else torch.randn_like(weight)[:student_dim]
    few = torch.cat([bank[:1], bank[others:]]).double()
    n = oracle.unit_rows(few if weight is None else few @ weight.double().T)
    table = 20.0 * n[1:] @ n.T
    table[:, 0] += math.log(others)
    truth = torch.nn.functional.cross_entropy(table, torch.arange(1, batch + 1, device=gpu.device))
    target = torch.arange(others, bank_rows, device=gpu.device)
    loss = ckd.contrastive_cross_entropy(
        n[1:].float(), bank, target, weight, logit_scale=20.0, backend=gpu.name
    )
    torch.testing.assert_close(loss.double(), truth, rtol=1e-3, atol=1e-5)
