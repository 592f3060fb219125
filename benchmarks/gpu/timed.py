"""Rung `fast` in a worker: times one provider of the loss on one problem after another."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from common.memory import peak_mib_of
from common.timing import seconds_of
from gpu.contenders import CUBLAS, EAGER, RIVALS
from gpu.device import Device
from loss import providers
from loss.problem import Inputs, Problem, make_inputs

FORWARD, STEP = "forward", "step"
PRODUCT_ROWS = 160_000  # bank rows of one cuBLAS product
QUEUE_MS = 25.0  # time to queue a step of hundreds of launches


@dataclass
class Bench:
    """Times a provider on the last problem given to `load`."""

    device: Device
    provider: str
    _inputs: Inputs | None = None
    _call: dict[str, Callable[[], Any]] = field(default_factory=dict)
    _loss: Callable[[Inputs], Tensor] | None = None

    def __post_init__(self) -> None:
        self.device.set_up()

    def prepare(self) -> None:
        """Import the provider's package and make its loss."""
        if self._loss is None and self.provider != CUBLAS:
            self._loss = loss_of(self.provider)

    def load(self, problem: Problem) -> dict[str, float | None]:
        """Make the inputs, run a first step and a first forward without gradients; returns their
        seconds, the loss and the peak memory."""
        self._inputs, self._call = None, {}
        gc.collect()
        on_gpu = not self.device.rehearse
        if on_gpu:
            torch.cuda.empty_cache()
        self._inputs = inputs = make_inputs(problem, self.device.name)
        if self.provider == CUBLAS:
            self._call = {FORWARD: logits_product(inputs)}
            return {"first_s": self._seconds(FORWARD)}
        self.prepare()
        loss: Any = self._loss

        def forward() -> Tensor:
            with torch.no_grad():
                return loss(inputs)

        def step() -> tuple[Tensor, ...]:
            # Some rivals have no gradient for the scale.
            return torch.autograd.grad(
                loss(inputs), inputs.leaves, allow_unused=self.provider in RIVALS
            )

        self._call = {FORWARD: forward, STEP: step}
        found: dict[str, float | None] = {"first_step_s": self._seconds(STEP)}
        found |= {"first_forward_s": self._seconds(FORWARD), "loss": float(forward())}
        if on_gpu:
            found["peak_mib"] = peak_mib_of(step, self.device.name)
        return found

    def time(self, mode: str, calls: int) -> list[float]:
        """Milliseconds of each call on the device, launched ahead into a full queue."""
        self._call[mode]()
        return self.device.times_ms(self._call[mode], calls, QUEUE_MS)

    def called(self, calls: int) -> dict[str, float]:
        """Microseconds per step: of a loop of calls, and of the host's part, until it is queued."""
        step = self._call[STEP]
        for _ in range(3):
            step()
        self.device.sync()
        start = time.perf_counter()
        for _ in range(calls):
            step()
        self.device.sync()
        eager = 1e6 * (time.perf_counter() - start) / calls
        self.device.sleep(50)
        times = []
        for _ in range(10):  # fewer launches than the queue holds, which is 1,024
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        self.device.sync()
        return {"eager_us": eager, "host_us": 1e6 * statistics.median(times)}

    def graph(self, replays: int) -> float:
        """Microseconds of a step replayed as a CUDA graph."""
        step = self._call[STEP]
        if self.device.rehearse:
            return 1e3 * self.device.median_ms(step, 2)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        graph.replay()
        return 1e3 * statistics.median(self.device.times_ms(graph.replay, replays))

    def kernels(self) -> list[tuple[str, int, float]]:
        """(name, launches, ms) of one step, the longest first."""
        if self.device.rehearse:
            return []
        from torch.profiler import ProfilerActivity, profile

        self._call[STEP]()
        self.device.sync()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            self._call[STEP]()
            self.device.sync()
        table = [
            (event.key, event.count, event.self_device_time_total / 1e3)
            for event in found.key_averages()
            if event.self_device_time_total > 0
        ]
        return sorted(table, key=lambda row: -row[2])

    def _seconds(self, mode: str) -> float:
        return seconds_of(self._call[mode], self.device.name)


def loss_of(provider: str) -> Callable[[Inputs], Tensor]:
    if provider == EAGER:
        return eager_fp16
    return RIVALS[provider].make() if provider in RIVALS else providers.find(provider).make()


def eager_fp16(inputs: Inputs) -> Tensor:
    """Plain torch under autocast: float16 on a GPU; bfloat16, with CPU instructions, on a CPU."""
    on_gpu = inputs.student.device.type == "cuda"
    return providers.eager_half(inputs, torch.float16 if on_gpu else torch.bfloat16)


def logits_product(inputs: Inputs) -> Callable[[], None]:
    """A function that computes [B, W] x [W, K] in float16, chunks of K into one buffer."""
    batch, width = inputs.student.shape
    rows = len(inputs.bank)
    device = inputs.student.device
    u = torch.randn(batch, width, device=device).half()
    n = torch.randn(rows, width, device=device).half()
    most = min(rows, PRODUCT_ROWS)
    out = torch.empty(batch, most, dtype=torch.float16, device=device)

    def product() -> None:
        for part in n.split(most):
            torch.mm(u, part.T, out=out[:, : len(part)] if len(part) < most else out)

    return product
