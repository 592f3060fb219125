"""The emulation of CUDA kernels: a right kernel passes, and what finds each planted bug."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import cuda_emulation as tools

KERNEL = tools.ROOT / "tests" / "emulation" / "planted_bugs.cu"
pytestmark = pytest.mark.skipif(tools.missing() is not None, reason=str(tools.missing()))

# For each bug, what the plain build, AddressSanitizer's and ThreadSanitizer's find in some
# schedule. `any` stands where memory that the kernel does not own decides.
N, V, E, A, R, ANY = "none", "values", "emulation", "address", "race", "any"
BUGS = {
    1: ("no barrier before the copies of other threads are read", V, V, R),
    2: ("no barrier before copies overwrite what is read", V, V, R),
    3: ("waits for all groups of copies but one too many", V, V, V),
    4: ("registers of a fragment swapped", V, V, V),
    5: ("loads a matrix that should be transposed as it is", V, V, V),
    6: ("copies past the end of shared memory", E, E, E),
    7: ("copies from past the end of global memory", ANY, E, ANY),
    8: ("stores past the end of global memory", ANY, A, ANY),
    9: ("reads the next array of shared memory", V, A, V),
    10: ("no sync_warp before lanes read what others wrote", V, V, R),
    11: ("shuffle that half of a warp takes part in", E, E, E),
    12: ("some threads return before a barrier", E, E, E),
    13: ("different barriers on two sides of a branch", E, E, E),
    14: ("four warps store the same values to the same place", N, N, R),
    15: ("maximum without an atomic", N, N, R),
    16: ("row of a matrix that is not on 16 bytes", E, E, E),
    17: ("no barrier before what two warps found is joined", V, V, R),
    18: ("copies that are never committed", V, V, V),
    19: ("wrong partner in a shuffle", V, V, V),
    20: ("launch with too little shared memory", E, E, E),
    21: ("reads what another block writes", N, N, R),
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    kinds = [kind for kind in tools.KINDS if tools.links(kind)]
    return tools.build([KERNEL], tmp_path_factory.mktemp("emulation"), kinds)


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(tools.jobs()) as workers:
        yield workers


@pytest.mark.parametrize("kind", tools.KINDS)
def test_right_kernel_passes_in_every_schedule(
    kind: str, programs: dict[str, Path], pool: ThreadPoolExecutor
) -> None:
    if kind not in programs:
        pytest.skip("the compiler has no such sanitizer")
    seeds = range(2 if kind == "thread" else 5)
    cases = [(schedule, seed) for schedule in tools.SCHEDULES for seed in seeds]
    run = lambda case: tools.run(programs[kind], schedule=case[0], seed=case[1])  # noqa: E731
    for case, outcome in zip(cases, pool.map(run, cases)):
        assert outcome.finding == "none", f"{case}: {outcome.text}"
    outcome = tools.run(programs[kind], sums="rounded")
    assert outcome.finding == "none", outcome.text


@pytest.mark.parametrize(("kind", "column"), [("plain", 1), ("address", 2), ("thread", 3)])
def test_planted_bugs_are_found_as_the_table_says(
    kind: str, column: int, programs: dict[str, Path], pool: ThreadPoolExecutor
) -> None:
    """Races show in any order; what values show may need a certain one."""
    if kind not in programs:
        pytest.skip("the compiler has no such sanitizer")
    schedules = ["ordered"] if kind == "thread" else tools.SCHEDULES
    cases = [(bug, s) for bug in BUGS for s in schedules if BUGS[bug][column] != ANY]
    run = lambda case: tools.run(programs[kind], case[0], schedule=case[1])  # noqa: E731
    found: dict[int, set[str]] = {}
    for (bug, _), outcome in zip(cases, pool.map(run, cases)):
        found.setdefault(bug, set()).add(outcome.finding)
    expected = {bug: BUGS[bug][column] for bug in found}
    got = {bug: "/".join(sorted(all_of - {N})) or N for bug, all_of in found.items()}
    assert got == expected


def test_every_planted_bug_is_found_by_something() -> None:
    assert len(BUGS) >= 12
    assert all(set(columns) - {N, ANY} for _, *columns in BUGS.values())


def test_errors_name_kernel_line_block_and_thread(programs: dict[str, Path]) -> None:
    line = next(
        n for n, text in enumerate(KERNEL.read_text().split("\n"), 1) if "copy_async(" in text
    )
    text = tools.run(programs["plain"], 6, schedule="ordered").text
    assert "copy_async: shared address out of range" in text
    assert "kernel row_sums<T>, " in text
    assert f"planted_bugs.cu:{line}, block (0, 0, 0), thread (124, 0, 0)" in text


def test_an_unknown_setting_is_an_error(programs: dict[str, Path]) -> None:
    text = tools.run(programs["plain"], schedule="greedy").text
    assert "CKD_EMULATION_SCHEDULE must be ordered, eager or random, got greedy" in text
    text = tools.run(programs["plain"], sums="exact").text
    assert "CKD_EMULATION_SUMS must be truncated or rounded, got exact" in text


@pytest.mark.slow
def test_kernels_run_from_a_shared_library(tmp_path: Path) -> None:
    """As a module of Python has them, where the emulation does not own the process."""
    library = tools.build([KERNEL], tmp_path, ["plain"], ["-shared"])["plain"]
    code = f"import ctypes; print(ctypes.CDLL({str(library)!r}).main(0, None))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "0\n", done.stdout + done.stderr
