"""How far from float64 a float32 result may be, on any machine.

The limit of a quantity is the larger of

    MODEL x  the root mean square of its errors in eight runs with random roundings of every
             operation (tests/rounding.py, Rounded), the same on every machine, and
    EAGER x  the largest error of eager torch in eight orders of its sums (OtherOrder).

One run of eager torch gives no limit: for a single number, such as a loss, its error is one random
draw, and may be zero. `python -m pytest --margins` shows how close results come to their limits.
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
# Tensor cores truncate sums towards zero. Such errors have one sign, so they do not average out in
# a mean over students, as the model's random errors do.
CUT_OFF = {"cuda": 3.0, "triton": 3.0}
RARE = 1.5  # among thousands of problems rarer errors occur
Results = dict[str, Tensor]


class Expected(NamedTuple):
    exact: Tensor  # float64
    limit: float  # on |result - exact| in the 2-norm


def expected(
    compute: Callable[[torch.dtype], Results], *, eager: bool = True
) -> dict[str, Expected]:
    """Exact values and limits of the results of `compute(dtype)`, which is written in plain torch.

    eager=False leaves out the limit from eager torch, for cases where it loses digits that the ops
    keep.
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
    """Root mean square error of each quantity under random roundings."""
    sums = dict.fromkeys(exact, 0.0)
    for seed in range(draws):
        with Rounded(seed, chunk):
            result = compute(torch.float64)
        for name, value in exact.items():
            sums[name] += distance(result[name], value) ** 2
    return {name: math.sqrt(total / draws) for name, total in sums.items()}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one thread: faster for small operations while other processes use cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def distance(value: Tensor, truth: Tensor) -> float:
    """|value - truth| in the 2-norm; inf if it is NaN."""
    difference = torch.linalg.vector_norm(value.double() - truth.double()).item()
    return math.inf if math.isnan(difference) else difference


def check(results: Results, wanted: dict[str, Expected], backend: str) -> None:
    """Assert that every quantity is within its limit; `backend` is the one that computed it."""
    assert results.keys() == wanted.keys()
    for name, (exact, limit) in wanted.items():
        limit *= CUT_OFF.get(backend, 1.0)
        within(distance(results[name], exact), limit, name, backend)


def check_quickly(
    results: Results, compute: Callable[[torch.dtype], Results], backend: str
) -> None:
    """A fast check(results, expected(compute), backend), for thousands of small problems.

    One run with random roundings is enough if all errors are below half of its limits; otherwise
    the limits are those of `expected`, times RARE.
    """
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
    """Assert error <= limit, and record their ratio for --margins."""
    margins.record(backend, quantity, error, limit)
    assert error <= limit, f"{quantity} of {backend}: error {error:.3g}, limit {limit:.3g}"
