"""Measures one provider of the loss on one problem, in a worker: memory, errors, times."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.memory import peak_mib_of
from common.timing import seconds_of
from loss import providers
from loss.problem import Inputs, Problem, checked_students, make_inputs

GRADIENTS = ("student", "weight", "bias", "logit_scale")
STEP, FORWARD = "step", "forward"


@dataclass
class Errors:
    """Relative errors in the 2-norm against float64, by name."""

    values: dict[str, float]

    @property
    def worst(self) -> float:
        return max(self.values.values())


class Bench:
    """Makes the inputs on the first call, and the loss in `memory`, which precedes the rest."""

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
        """Write loss and gradients in float64 to `path`, computed by TRUTHS[name]."""
        exact = self.inputs.cast(torch.float64, checked_students(self._problem))
        torch.save(_loss_and_gradients(providers.TRUTHS[name], exact), path)

    def memory(self) -> float | None:
        """Peak MiB of loss and gradients, results included, above the process with its inputs.

        Measured in the first call, so that a provider's caches are counted; a provider that
        compiles has one call before. None as in `common.memory`.
        """
        inputs = self.inputs
        self._loss = self._provider.make()
        small = make_inputs(Problem(2, 3, 4, 4, self._problem.learned), self._device)
        self._call(STEP, inputs if self._provider.compiles else small)
        return peak_mib_of(partial(self._call, STEP, inputs), self._device)

    def errors(self, path: str) -> Errors:
        """Compare with the file that `truth` wrote."""
        exact: dict[str, Tensor] = torch.load(path, map_location=self._device)
        students = checked_students(self._problem)
        inputs = self.inputs
        if students < self._problem.batch:
            inputs = inputs.cast(torch.float32, students)
            inputs = Inputs(**{**vars(inputs), "bank": self.inputs.bank})
        result = _loss_and_gradients(self._loss, inputs)
        return Errors({name: _relative(result[name], value) for name, value in exact.items()})

    def time(self, mode: str, seconds: float) -> list[float]:
        """Seconds of each call, for calls that fill `seconds`, at least one.

        Calls for a tenth of that time before them warm up caches and threads.
        """
        end = time.perf_counter() + seconds / 10
        while time.perf_counter() + self._last < end:
            self._call(mode, self.inputs)
        times: list[float] = []
        while not times or sum(times) < seconds:
            times.append(self._call(mode, self.inputs))
        return times

    def _call(self, mode: str, inputs: Inputs) -> float:
        call = _loss_alone if mode == FORWARD else _loss_and_gradients
        self._last = seconds_of(partial(call, self._loss, inputs), self._device)
        return self._last


def _loss_alone(loss: providers.Loss, inputs: Inputs) -> None:
    with torch.no_grad():
        loss(inputs)


def _loss_and_gradients(loss: providers.Loss, inputs: Inputs) -> dict[str, Tensor]:
    value = loss(inputs)
    gradients = iter(torch.autograd.grad(value, inputs.leaves))
    named = {n: next(gradients) for n in GRADIENTS if getattr(inputs, n) is not None}
    return {"loss": value.detach(), **named}


def _relative(value: Tensor, truth: Tensor) -> float:
    error = torch.linalg.vector_norm(value.double() - truth)
    return (error / torch.linalg.vector_norm(truth)).item()
