"""A process for each provider: what one does to memory, threads or malloc, no other one sees.

The parent asks the workers in turn, so that they share a machine's good and bad moments, and only
one computes at a time. A worker that dies (out of memory, say) is a result.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from loss import providers
from loss.problem import Inputs, Problem, checked_students, make_inputs

MIB = 1 << 20
GRADIENTS = ("student", "weight", "bias", "logit_scale")
STEP, FORWARD = "step", "forward"
KILLED, OUT_OF_MEMORY = "killed, out of memory?", "out of memory"


class Failed(Exception):
    """The provider could not do what it was asked."""


class Worker:
    """The parent's end."""

    def __init__(self, provider: str, problem: Problem, threads: int, device: str = "cpu") -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(child, provider, problem, threads, device), daemon=True
        )
        self._process.start()
        child.close()

    def ask(self, call: str, *arguments: Any) -> Any:
        """The result of a method of Bench in the worker. Raises Failed with the reason."""
        try:
            self._pipe.send((call, arguments))
            worked, result = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            reason = KILLED if code == -9 else f"died, exit code {code}"
            raise Failed(reason) from None
        if not worked:
            raise Failed(result)
        return result

    def stop(self) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(pipe: Connection, provider: str, problem: Problem, threads: int, device: str) -> None:
    torch.set_num_threads(threads)
    bench = Bench(provider, problem, device)
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        while True:
            call, arguments = pipe.recv()
            try:
                answer = (True, getattr(bench, call)(*arguments))
            except Exception as error:  # noqa: BLE001  # whatever it raises is its result
                traceback.print_exc(file=sys.stderr)
                answer = (False, reason_of(error))
            pipe.send(answer)


def reason_of(error: Exception) -> str:
    """In one line."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    lost = isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text
    return OUT_OF_MEMORY if lost else text[:200]


@dataclass
class Errors:
    """Relative errors in the 2-norm against float64, by name."""

    values: dict[str, float]

    @property
    def worst(self) -> float:
        return max(self.values.values())


class Bench:
    """The worker's end: one provider on one problem."""

    def __init__(self, provider: str, problem: Problem, device: str = "cpu") -> None:
        self._provider, self._problem = providers.find(provider), problem
        self._device = device
        self._inputs: Inputs | None = None
        self._loss: Any = None
        self._last = 0.0  # seconds of the last call

    @property
    def inputs(self) -> Inputs:
        if self._inputs is None:
            self._inputs = make_inputs(self._problem, self._device)
        return self._inputs

    def truth(self, name: str, path: str) -> None:
        """Writes loss and gradients in float64 to `path`, by one of providers.TRUTHS."""
        exact = self.inputs.cast(torch.float64, checked_students(self._problem))
        torch.save(_loss_and_gradients(providers.TRUTHS[name], exact), path)

    def memory(self) -> float | None:
        """Peak MiB of loss and gradients, results included, above the process with its inputs.

        Of the first call, so that what a provider keeps for later calls is counted; one that
        compiles does that before. None where the system does not say.
        """
        inputs = self.inputs
        self._loss = self._provider.make()
        small = make_inputs(Problem(2, 3, 4, 4, self._problem.learned), self._device)
        self._call(STEP, inputs if self._provider.compiles else small)
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            self._call(STEP, inputs)
            return (torch.cuda.max_memory_allocated() - held) / MIB
        if sys.platform != "linux":
            self._call(STEP, inputs)
            return None
        ctypes.CDLL(None).malloc_trim(0)
        before = status_bytes("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # VmHWM := VmRSS
        self._call(STEP, inputs)
        return (status_bytes("VmHWM") - before) / MIB

    def errors(self, path: str) -> Errors:
        """Against what truth() wrote."""
        exact: dict[str, Tensor] = torch.load(path, map_location=self._device)
        students = checked_students(self._problem)
        inputs = self.inputs
        if students < self._problem.batch:
            inputs = inputs.cast(torch.float32, students)
            inputs = Inputs(**{**vars(inputs), "bank": self.inputs.bank})
        result = _loss_and_gradients(self._loss, inputs)
        return Errors({name: _relative(result[name], value) for name, value in exact.items()})

    def time(self, mode: str, seconds: float) -> list[float]:
        """Seconds of each of so many calls as fill `seconds`, at least one.

        Calls before them, for a tenth of that time, bring caches and threads back.
        """
        end = time.perf_counter() + seconds / 10
        while time.perf_counter() + self._last < end:
            self._call(mode, self.inputs)
        times: list[float] = []
        while not times or sum(times) < seconds:
            times.append(self._call(mode, self.inputs))
        return times

    def _call(self, mode: str, inputs: Inputs) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        if mode == FORWARD:
            with torch.no_grad():
                self._loss(inputs)
        else:
            _loss_and_gradients(self._loss, inputs)
        if self._device == "cuda":
            torch.cuda.synchronize()
        self._last = time.perf_counter() - start
        return self._last


def _loss_and_gradients(loss: providers.Loss, inputs: Inputs) -> dict[str, Tensor]:
    value = loss(inputs)
    gradients = iter(torch.autograd.grad(value, inputs.leaves))
    named = {n: next(gradients) for n in GRADIENTS if getattr(inputs, n) is not None}
    return {"loss": value.detach(), **named}


def _relative(value: Tensor, truth: Tensor) -> float:
    error = torch.linalg.vector_norm(value.double() - truth)
    return (error / torch.linalg.vector_norm(truth)).item()


def status_bytes(field: str) -> int:
    """Bytes, of /proc/self/status."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise LookupError(field)
