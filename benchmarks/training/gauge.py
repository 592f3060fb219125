"""What bench_kd.py reads while the trainer works: time, memory and energy of its steps."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import torch

from common.memory import Memory
from common.timing import quantiles
from common.workers import Result

LEAST_STEPS = 2  # measured, however long they take
TURN = 1.0  # seconds of steps after which another process may have the machine

TurnOver = Callable[[], None]  # returns when this process may go on


class Enough(Exception):
    """All steps are measured; leaves the trainer's loop before it would save a checkpoint."""


class Gauge:
    """Called after each step; it notes how long the step took and ends the measurement.

    After `warm_up` calls it measures until `steps` steps are done or took `seconds`, but at least
    LEAST_STEPS. It asks for every turn, of one step or of TURN seconds.

    A GPU may still be at work on the end of a step, as it was at the step before: the time from
    one call to the next is that of a step in the middle of training.
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
        """False, as the trainer's loop asks whether to stop; raises Enough in the end."""
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
    """Joules of the whole GPU between `start` and `stop`, summed, by its own counter; None where
    there is none."""

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
