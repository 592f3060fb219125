"""Autotuning: the fastest of a kernel's tiles, measured on the current device.

The first call of a kernel with a kind of problem measures, which synchronises; no other call does.
Tiles determine the order of sums, so another process may choose other tiles and get other last
bits: with `torch.use_deterministic_algorithms(True)` the first candidate is taken.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from triton.runtime.errors import OutOfResources

T = TypeVar("T")

REPEATS, LAUNCHES = 3, 5
# The device waits this long (about half a millisecond) while launches queue up: on an empty queue
# events would time the host.
SLEEP_CYCLES = 1_000_000
_fastest: dict[Hashable, object] = {}


def bucket(n: int) -> int:
    """Sizes within a factor of two are one kind of problem."""
    return n.bit_length()


def choose(key: Hashable, candidates: Sequence[T], launch: Callable[[T], None]) -> T:
    """The candidate whose launch takes the least time, measured once for each key.

    `launch` may run several times and must give the same results each time. Returns the first
    candidate without measuring if it is the only one, under deterministic algorithms, and while a
    CUDA graph is captured. (A call before the capture compiles and measures; a graph captured
    without one keeps the first candidate.)
    """
    if len(candidates) == 1 or torch.are_deterministic_algorithms_enabled():
        return candidates[0]
    # Sizes that share a bucket may have other candidates.
    key = (key, tuple(candidates))
    found = _fastest.get(key)
    if found is None:
        if torch.cuda.is_current_stream_capturing():
            return candidates[0]
        found = _fastest[key] = min(candidates, key=lambda c: seconds(launch, c))
    return found  # type: ignore[return-value]


def seconds(launch: Callable[[T], None], candidate: T) -> float:
    """Median time of a launch; infinite for tiles that exceed the device's resources."""
    times = []
    try:
        launch(candidate)  # compiles
    except OutOfResources:
        return float("inf")
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        for _ in range(LAUNCHES):
            launch(candidate)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / LAUNCHES)
    return statistics.median(times)
