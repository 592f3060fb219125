"""The device on which the GPU backends launch kernels: a GPU, or the CPU that simulates one."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import Any

import torch

from ckd.backends.interface import Problem


class Gpu:
    """The GPUs that torch sees."""

    type = "cuda"  # device type of the tensors
    family: str | None = None  # of Triton tiles (ckd._triton.tiles); None: by its shared memory

    def __init__(self, chunk_rows: int = 1 << 40) -> None:
        self.chunk_rows = chunk_rows  # upper bound on the bank rows of a chunk

    def missing(self) -> str | None:
        return None if torch.cuda.is_available() else "torch sees no GPU"

    def capability(self, index: int | None) -> tuple[int, int]:
        return torch.cuda.get_device_capability(index)

    def processors(self, device: torch.device) -> int:
        return _properties(device).multi_processor_count

    def stream(self, device: torch.device) -> int:
        """The handle of the device's current stream."""
        return torch.cuda.current_stream(device).cuda_stream

    def current(self, device: torch.device) -> AbstractContextManager[Any]:
        """A context in which kernels are launched on this device."""
        return torch.cuda.device(device)


class Simulated(Gpu):
    """The CPU, for kernels in Triton's interpreter and in the CUDA emulation (csrc/emulation).

    By default it has few processors and small tiles, so that small problems are split too.
    """

    type = "cpu"

    def __init__(
        self, family: str = "tiny", processors: int = 3, chunk_rows: int = 1 << 40
    ) -> None:
        super().__init__(chunk_rows)
        self.family, self._processors = family, processors

    def missing(self) -> str | None:
        return None

    def capability(self, index: int | None) -> tuple[int, int]:
        return (9, 0)

    def processors(self, device: torch.device) -> int:
        return self._processors

    def stream(self, device: torch.device) -> int:
        return 0

    def current(self, device: torch.device) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()


def elsewhere(problem: Problem, gpu: Gpu) -> str | None:
    """That the tensors are on a device of another type, or None."""
    if problem.device_type == gpu.type:
        return None
    return f"the tensors are on {problem.device_type}, not on {gpu.type}"


def beyond_limits(problem: Problem, spare_rows: int) -> str | None:
    """Why the kernels' types cannot serve a problem, or None. Row indices are 32-bit integers, and
    loops count up to `spare_rows` beyond the last row."""
    if problem.student_dtype == torch.float64:
        return "has no float64 arithmetic"
    if max(problem.batch, problem.bank_rows) >= 2**31 - spare_rows:
        return f"has 32-bit row indices: fewer than 2^31 - {spare_rows} students and bank rows"
    if problem.student_dim == 0 or problem.teacher_dim == 0:
        return "the tensors have rows of width 0"
    return None


@functools.cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)
