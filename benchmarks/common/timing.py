"""Durations of calls, and their quantiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def seconds_of(call: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of a call; a GPU is synchronised before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def quantiles(times: Sequence[float], counted: str) -> dict[str, float]:
    """The quantiles 0.2, 0.5 and 0.8, and under the key `counted` the number of times."""
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7], counted: len(times)}
