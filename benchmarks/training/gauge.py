"""Measures time, memory and energy of the trainer's steps for bench_kd.py."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import torch

from common.memory import Memory
from common.timing import quantiles
from common.workers import Result

LEAST_STEPS = 2  # are measured, however long they take
TURN = 1.0  # seconds of steps in a turn; then another process has its turn

TurnOver = Callable[[], None]  # ends a turn; blocks until the next one


class Enough(Exception):
    """Raised after the last measured step, to leave the trainer's loop before it saves."""


class Gauge:
    """The trainer's stop function, called after each step: it times the steps, then ends the run.

    After `warm_up` calls it measures until `steps` steps are done or took `seconds`, but at least
    LEAST_STEPS. A turn lasts for TURN seconds of steps, at least one step.

    The GPU is not synchronised: at each call it may still run the end of a step, so the time from
    one call to the next is that of a step in steady state.
    """

    def __init__(
        self,
        memory: Memory,
        turn_over: TurnOver,
        *,
        warm_up: int,
        steps: int,
        seconds: float,
        batch_size: int,
    ) -> None:
        self._memory, self._turn_over, self._warm_up = memory, turn_over, warm_up
        self._steps, self._seconds, self._batch_size = steps, seconds, batch_size
        self._energy = EnergyMeter(memory.device)
        self._times: list[float] = []
        self._calls, self._mark, self._turn = 0, 0.0, 0.0
        self._peak: float | None = None

    def __call__(self) -> bool:
        """False (do not stop) after each step; raises Enough after the last."""
        now = time.perf_counter()
        self._calls += 1
        if self._calls == self._warm_up:
            self._memory.restart()
            self._begin_turn()
        elif self._calls > self._warm_up:
            self._times.append(now - self._mark)
            self._mark = now
            self._turn += self._times[-1]
            steps = len(self._times)
            enough = steps >= self._steps or sum(self._times) >= self._seconds
            if enough and steps >= LEAST_STEPS:
                self._energy.stop()
                self._peak = self._memory.peak_mib()
                raise Enough
            if self._turn >= TURN:
                self._energy.stop()
                self._begin_turn()
        return False

    def _begin_turn(self) -> None:
        self._turn_over()
        self._energy.start()
        self._turn, self._mark = 0.0, time.perf_counter()

    def result(self) -> Result:
        if len(self._times) < LEAST_STEPS:
            raise RuntimeError(f"the images ended after {len(self._times)} measured steps")
        images = len(self._times) * self._batch_size
        return {
            "step_s": quantiles(self._times, "steps"),
            "peak_mib": self._peak,
            "image_j": None if self._energy.joules is None else self._energy.joules / images,
        }


class EnergyMeter:
    """Sums the joules of the whole GPU between `start` and `stop`, by its energy counter (NVML);
    None without one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start: float | None = None
        self.joules: float | None = None

    def start(self) -> None:
        self._start = self._read()

    def stop(self) -> None:
        end = self._read()
        if end is not None and self._start is not None:
            self.joules = (self.joules or 0.0) + end - self._start

    def _read(self) -> float | None:
        if self._device.type != "cuda":
            return None
        try:
            nvml: Any = importlib.import_module("pynvml")
        except ImportError:
            return None
        torch.cuda.synchronize(self._device)
        try:
            nvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(self._device).uuid}"
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            return nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        except nvml.NVMLError:
            return None
