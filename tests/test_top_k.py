"""`ckd.top_k` against float64 `torch.topk`, and the order of equal, zero and NaN cosines."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch

import ckd
from ckd.ops.top_k import TILE_ELEMENTS, RunningTopK, tiles
from tests import oracle
from tests.oracle import make_case

TOP_K: Any = importlib.import_module("ckd.ops.top_k")  # `ckd.ops.top_k` is the function


@pytest.fixture(params=[64, 1000, 1 << 21])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Cosines in a tile: from a few columns in each, narrower than k, to all in one."""
    monkeypatch.setitem(TILE_ELEMENTS, "cpu", request.param)
    monkeypatch.setattr(TOP_K, "TILE_ELEMENTS_ELSEWHERE", request.param)
    monkeypatch.setattr(TOP_K, "STUDENTS", 5)
    monkeypatch.setattr(TOP_K, "STUDENTS_PROJECTED", 6)
    return request.param


# One row; one place; all places; tiles that divide the bank and that do not; with a projection.
@pytest.mark.parametrize(
    ("shape", "k"),
    [
        ((1, 1, 1, 1), 1),
        ((7, 65, 33, 16), 1),
        ((7, 65, 33, 16), 20),
        ((13, 64, 12, None), 64),
        ((3, 1000, 16, None), 32),
    ],
    ids=str,
)
def test_top_k_matches_float64(shape: Any, k: int, tile: int, backend: str) -> None:
    case = make_case(*shape, tau=1.0)
    inputs = (case.student, case.bank, k, case.weight, case.bias)
    values, rows = ckd.top_k(*inputs, backend=backend)
    assert (values.dtype, rows.dtype) == (torch.float32, torch.int64)
    assert values.shape == rows.shape == (shape[0], k)
    assert (values.diff(dim=1) <= 0).all()
    assert all(len(set(row)) == k for row in rows.tolist())

    exact = oracle.logits(case.cast(torch.float64))
    table = ckd.normalized_similarity(
        case.student, case.bank, case.weight, case.bias, backend=backend
    )
    # No order statistic is off by more than the largest error of a cosine; a tile may round
    # otherwise than the whole table.
    error = 2 * (table - exact).abs().max() + 2**-24
    assert (values - exact.topk(k, dim=1).values).abs().max() <= error
    assert (values - exact.gather(1, rows)).abs().max() <= error


# In rising order, each tile displaces what the tiles before it gave, with rows that are equal.
@pytest.mark.parametrize("rising", [False, True])
@pytest.mark.parametrize("k", [1, 2, 7, 59, 60])
def test_among_equal_cosines_the_smaller_row_comes_first(
    k: int, rising: bool, tile: int, backend: str
) -> None:
    generator = torch.Generator().manual_seed(k)
    axes = torch.randint(4, (60,), generator=generator)
    if rising:
        axes = axes.sort(descending=True).values
    bank = torch.eye(4)[axes].to(torch.get_default_device())  # so that cosines are exact
    student = torch.tensor([[4.0, 3.0, 0.0, 0.0], [0.0, 0.0, -1.0, 0.0], [0.0] * 4, [1.0] * 4])
    values, rows = ckd.top_k(student, bank, k, backend=backend)
    table = ckd.normalized_similarity(student, bank, backend=backend)
    for row, cosines in zip(rows.tolist(), table.tolist()):
        assert row == sorted(range(60), key=lambda r: (-cosines[r], r))[:k]
    assert torch.equal(values, table.gather(1, rows))


def test_a_tile_of_equal_cosines_hardly_above_those_before_gives_the_first_of_them() -> None:
    running = RunningTopK(3)
    running.add(torch.full((1, 4), 0.5))
    above = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()
    running.add(torch.full((1, 100), above))
    values, rows = running.result()
    assert rows.tolist() == [[4, 5, 6]]
    assert values.tolist() == [[above] * 3]


@pytest.mark.skipif("cpu" not in ckd.backends.available(), reason="needs the C++ kernels")
def test_equal_rows_of_the_bank_are_ranked_by_their_numbers(tile: int) -> None:
    bank = torch.randn(40, 8)[torch.randint(40, (2000,))].half()
    student = torch.randn(11, 8)
    table = ckd.normalized_similarity(student, bank, backend="cpu")
    expected = table.sort(dim=1, descending=True, stable=True)
    values, rows = ckd.top_k(student, bank, 30, backend="cpu")
    assert torch.equal(rows, expected.indices[:, :30])
    assert torch.equal(values, expected.values[:, :30])


def test_zero_rows_have_cosine_zero_and_nan_ranks_last(tile: int, backend: str) -> None:
    student = torch.tensor([[1.0, 0.0], [0.0, 0.0], [math.inf, 1.0], [-1.0, 0.0]])
    bank = torch.tensor(
        [[1.0, 0.0], [math.nan, 0.0], [0.0, 0.0], [-1.0, 0.0], [math.inf, 0.0], [2.0, 0.0]]
    )
    for k in range(1, 7):
        values, rows = ckd.top_k(student, bank, k, backend=backend)
        expected = [[0, 5, 2, 3, 1, 4], [0, 2, 3, 5, 1, 4], [0, 1, 2, 3, 4, 5], [3, 2, 0, 5, 1, 4]]
        assert rows.tolist() == [row[:k] for row in expected]
        assert values[0].nan_to_num(nan=9).tolist() == [1, 1, 0, -1, 9, 9][:k]
        assert values[1].nan_to_num(nan=9).tolist() == [0, 0, 0, 0, 9, 9][:k]
        assert values[2].isnan().all()


def test_no_array_is_larger_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = TOP_K.normalized_similarity

    def similarity(*args: Any, **options: Any) -> torch.Tensor:
        table = original(*args, **options)
        sizes.append(table.numel())
        return table

    monkeypatch.setattr(TOP_K, "normalized_similarity", similarity)
    monkeypatch.setitem(TILE_ELEMENTS, "cpu", 1 << 14)
    for students in (1, 300):
        ckd.top_k(torch.randn(students, 4), torch.randn(70_000, 4).half(), 3)
    assert max(sizes) <= 1 << 16  # the most columns, for one student
    assert sum(sizes) == 301 * 70_000


def test_chunks_of_any_sizes_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    student, bank = torch.randn(9, 6), torch.randn(501, 6).half()
    monkeypatch.setitem(TILE_ELEMENTS, "cpu", 9 * 50)
    expected = ckd.top_k(student, bank, 60)
    for sizes in ([501], [1, 500], [3, 0, 47, 51, 400], [50] * 10 + [1]):
        running, seen = RunningTopK(60), []
        for rows, cosines in tiles(student, bank.split(sizes)):
            running.add(cosines)
            seen.append(rows)
        assert [len(rows) for rows in seen] == [50] * 10 + [1]
        assert torch.equal(torch.cat(seen), bank)
        assert all(map(torch.equal, running.result(), expected))


def test_fewer_rows_than_k_are_refused() -> None:
    running = RunningTopK(3)
    with pytest.raises(ValueError, match="3 rows were asked for, and 0 were added"):
        running.result()
    running.add(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="and 2 were added"):
        running.result()


def test_dtypes_gradients_and_an_empty_batch() -> None:
    case = make_case(4, 30, 8, 6).requiring("student", "weight", "bias")
    values, _ = ckd.top_k(case.student, case.bank, 5, case.weight, case.bias)
    assert not values.requires_grad
    double = case.cast(torch.float64)
    exact = ckd.top_k(double.student, double.bank, 5, double.weight, double.bias)
    truth = oracle.logits(double).topk(5, dim=1)
    assert exact.values.dtype == torch.float64
    torch.testing.assert_close(exact.values * double.logit_scale, truth.values)
    assert torch.equal(exact.rows, truth.indices)
    for half in (torch.float16, torch.bfloat16):
        less, _ = ckd.top_k(case.student.to(half), case.bank, 5, case.weight, case.bias)
        assert less.dtype == torch.float32
        assert (less - values).abs().max() < 2**-6
    with torch.autocast("cpu", torch.bfloat16):
        assert ckd.top_k(case.student, case.bank, 5, case.weight).values.dtype == torch.float32
    empty = ckd.top_k(torch.randn(0, 8), case.bank, 5)
    assert (empty.values.shape, empty.rows.shape) == ((0, 5), (0, 5))
