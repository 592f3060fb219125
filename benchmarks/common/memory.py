"""Peak memory of a call: from the resident size, or from torch's CUDA allocator."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MIB = 1 << 20


def peak_mib_of(call: Callable[[], Any], device: torch.device | str) -> float | None:
    """The peak during a call minus the memory held before it; None as in `Memory.peak_mib`."""
    memory = Memory(device)
    memory.restart()
    call()
    return memory.peak_mib()


class Memory:
    """The peak since `restart`, minus `held`: the bytes held when this object was made.

    On the CPU the resident size (Linux only), on a GPU the bytes allocated by torch. Measure each
    computation in a process of its own: pages that an earlier one left to malloc are resident.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._trim()
        self.held = 0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            self.held = torch.cuda.memory_allocated(self.device)
        elif sys.platform == "linux":
            self.held = _status_bytes("VmRSS")

    def restart(self) -> None:
        self._trim()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS

    def peak_mib(self) -> float | None:
        """The peak in MiB; None on a CPU without Linux."""
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self.device) - self.held) / MIB
        return (_status_bytes("VmHWM") - self.held) / MIB if sys.platform == "linux" else None

    def _trim(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif sys.platform == "linux":
            with contextlib.suppress(AttributeError):  # musl has no malloc_trim
                ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)
