"""How far from float64 a float32 result may be, on whichever machine the test runs.

The limit of a quantity is the larger of

    MODEL x  the root mean square of what eight random roundings of every operation do to it
             (tests/rounding.py, Rounded), the same on every machine, and
    EAGER x  the largest error of eager torch in eight orders of its sums (OtherOrder).

One run of eager torch is no measure: for a single number, such as a loss, its error is one draw,
and may be zero. `python -m pytest --margins` shows how far from their limits results are.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tests import margins
from tests.rounding import OtherOrder, Rounded

DRAWS = 8
MODEL, EAGER = 5.0, 2.0
# Tensor cores cut sums off towards zero: their errors point one way, and a mean over students does
# not make them smaller, as the model has it.
CUT_OFF = {"cuda": 3.0, "triton": 3.0}
RARE = 1.5
Results = dict[str, Tensor]


class Expected(NamedTuple):
    exact: Tensor  # float64
    limit: float  # on |result - exact| in the 2-norm


def expected(
    compute: Callable[[torch.dtype], Results], *, eager: bool = True
) -> dict[str, Expected]:
    """Exact values and limits of what `compute` gives, in plain torch, in the dtype it is told.

    eager=False leaves eager's errors out: where it loses digits that the ops keep.
    """
    with one_thread():
        return _expected(compute, eager)


def _expected(compute: Callable[[torch.dtype], Results], eager: bool) -> dict[str, Expected]:
    exact = compute(torch.float64)
    modelled = model_errors(compute, exact)
    limits = {name: MODEL * error for name, error in modelled.items()}
    for seed in range(DRAWS if eager else 0):
        with OtherOrder(seed):
            result = compute(torch.float32)
        for name, value in exact.items():
            limits[name] = max(limits[name], EAGER * distance(result[name], value))
    return {name: Expected(value, limits[name]) for name, value in exact.items()}


def model_errors(
    compute: Callable[[torch.dtype], Results],
    exact: Results,
    *,
    draws: int = DRAWS,
    chunk: int | None = None,
) -> dict[str, float]:
    """Root mean squares of the errors by which random roundings move each quantity."""
    sums = dict.fromkeys(exact, 0.0)
    for seed in range(draws):
        with Rounded(seed, chunk):
            result = compute(torch.float64)
        for name, value in exact.items():
            sums[name] += distance(result[name], value) ** 2
    return {name: math.sqrt(total / draws) for name, total in sums.items()}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Faster for operations as small as these where another process has a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def distance(value: Tensor, truth: Tensor) -> float:
    """|value - truth| in the 2-norm; inf if it is not a number."""
    difference = torch.linalg.vector_norm(value.double() - truth.double()).item()
    return math.inf if math.isnan(difference) else difference


def check(results: Results, wanted: dict[str, Expected], backend: str) -> None:
    """Every quantity is within its limit; `backend` names who computed the results."""
    assert results.keys() == wanted.keys()
    for name, (exact, limit) in wanted.items():
        limit *= CUT_OFF.get(backend, 1.0)
        within(distance(results[name], exact), limit, name, backend)


def check_quickly(
    results: Results, compute: Callable[[torch.dtype], Results], backend: str
) -> None:
    """check(results, expected(compute), backend), for thousands of small problems, among which
    are rarer errors (RARE): one random rounding in place of all of that where it allows them."""
    with one_thread():
        exact = compute(torch.float64)
        once = model_errors(compute, exact, draws=1)
    if all(distance(results[name], exact[name]) <= MODEL * once[name] / 2 for name in exact):
        wanted = {name: Expected(value, MODEL * once[name]) for name, value in exact.items()}
        check(results, wanted, backend)
    else:
        wanted = expected(compute)
        rare = {name: Expected(exact, RARE * limit) for name, (exact, limit) in wanted.items()}
        check(results, rare, backend)


def within(error: float, limit: float, quantity: str, backend: str) -> None:
    """Asserts error <= limit, and keeps how far apart they are."""
    margins.record(backend, quantity, error, limit)
    assert error <= limit, f"{quantity} of {backend}: error {error:.3g}, limit {limit:.3g}"
