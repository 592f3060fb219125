"""The emulated CUDA kernels against double-precision loops in C++
(tests/emulation/contrastive_ce.cpp)."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import cuda_emulation as tools

SOURCES = tools.ROOT / "csrc"
PROGRAM = tools.ROOT / "tests" / "emulation" / "contrastive_ce.cpp"
RESULTS = [
    "nll",
    "loss",
    "kept",
    "lse",
    "p_other",
    "residual",
    "attention",
    "d_student",
    "along",
    "d_weight",
    "d_bias",
]

pytestmark = pytest.mark.skipif(tools.missing() is not None, reason=str(tools.missing()))


@pytest.fixture(scope="module")
def programs(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> dict[str, Path]:
    wanted = tools.KINDS if pytestconfig.getoption("--slow") else ["plain"]
    kinds = [kind for kind in wanted if tools.links(kind)]
    # Compiling takes most of the time, less with -O1.
    kernels = [PROGRAM, SOURCES / "cuda" / "contrastive_ce.cu"]
    return tools.build(kernels, tmp_path_factory.mktemp("kernels"), kinds, ["-O1", f"-I{SOURCES}"])


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(tools.jobs()) as workers:
        yield workers


# kind -> (arguments, pairs of a schedule and a seed). `ordered` ignores the seed. Runs under
# sanitizers take long and get few schedules: races depend little on the schedule.
RUNS = {
    "plain": (
        [],
        [("ordered", 0), *((schedule, n) for schedule in ("eager", "random") for n in range(3))],
    ),
    "address": ([], [("ordered", 0), ("random", 1)]),
    "thread": (["small"], [("eager", 0), ("random", 1)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_kernels_are_right_in_every_schedule(
    kind: str, programs: dict[str, Path], pool: ThreadPoolExecutor
) -> None:
    """Results are also bitwise equal: the program prints a hash of them."""
    if kind not in programs:
        pytest.skip("the compiler has no such sanitizer")
    arguments, cases = RUNS[kind]

    def start(schedule: str, seed: int) -> Future[tools.Outcome]:
        program = programs[kind]
        return pool.submit(tools.run, program, *arguments, schedule=schedule, seed=seed)

    hashes = set()
    for case, running in [(case, start(*case)) for case in cases]:
        outcome = running.result()
        assert outcome.finding == "none", f"{case}: {outcome.text}"
        hashes.add(outcome.text)
    assert len(hashes) == 1, hashes


@pytest.mark.slow
def test_kernels_are_right_with_rounded_sums(programs: dict[str, Path]) -> None:
    """Matrix units of some GPUs may round sums better: results must not rely on truncation."""
    outcome = tools.run(programs["plain"], sums="rounded")
    assert outcome.finding == "none", outcome.text


def test_kernels_are_right_in_one_schedule(programs: dict[str, Path]) -> None:
    outcome = tools.run(programs["plain"], "small", schedule="eager")
    assert outcome.finding == "none", outcome.text


def test_each_result_is_compared(programs: dict[str, Path]) -> None:
    """Given reference values with one wrong element each, the program reports every result."""
    outcome = tools.run(programs["plain"], "wrong")
    assert outcome.finding == "values"
    assert {line.split(":")[0] for line in outcome.text.splitlines()} == set(RESULTS)
