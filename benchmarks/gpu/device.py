"""The device under test: a GPU, or the CPU in a rehearsal."""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpu.job import ROOT, Job, NotHere

BACKENDS = ("triton", "cuda")
_is_set_up = False


@dataclass(frozen=True)
class Device:
    """The device under test, for a rung and its workers: each process calls `set_up` first."""

    rehearse: bool
    emulated: Path  # the module of the emulated CUDA kernels, if it was built

    @classmethod
    def of(cls, job: Job) -> Device:
        """The device of a rung, set up. Raises NotHere without a GPU."""
        if not job.rehearse and not torch.cuda.is_available():
            raise NotHere("torch sees no GPU")
        device = cls(job.rehearse, job.emulated)
        device.set_up()
        return device

    def set_up(self) -> None:
        """Make the GPU backends of this tree work on this device, once per process."""
        global _is_set_up
        if _is_set_up:
            return
        _is_set_up = True
        _find_triton_kernels()
        if not self.rehearse:
            return
        torch.set_num_threads(1)
        from ckd.backends import triton
        from tests import cuda_emulation

        if triton.missing() is None and triton.interpreted():
            from tests import triton_interpreter

            triton_interpreter.repair()
        if self.emulated.exists():
            cuda_emulation.use(self.emulated)

    @property
    def name(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def missing(self, backend: str) -> str | None:
        """The reason why a backend cannot run here, or None."""
        from ckd import backends

        reason: str | None = backends.ORDER[backend].missing()
        return reason

    def sync(self) -> None:
        if not self.rehearse:
            torch.cuda.synchronize()

    def sleep(self, ms: float) -> None:
        """Delay the GPU, so that all timed launches are queued before the first one runs."""
        if not self.rehearse:
            torch.cuda._sleep(int(ms * 1.8e6))  # cycles, at some 1.8 GHz

    def times_ms(self, run: Callable[[], Any], calls: int, queue_ms: float = 2.0) -> list[float]:
        """Milliseconds of each of `calls` calls in a row; on a GPU by events in a full queue."""
        if self.rehearse:
            marks = [time.perf_counter()]
            for _ in range(calls):
                run()
                marks.append(time.perf_counter())
            return [1e3 * (b - a) for a, b in itertools.pairwise(marks)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        self.sync()
        self.sleep(queue_ms)
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        self.sync()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]

    def median_ms(self, run: Callable[[], Any], calls: int, queue_ms: float = 2.0) -> float:
        run()
        return statistics.median(self.times_ms(run, calls, queue_ms))


def _find_triton_kernels() -> None:
    """Import ckd._triton from this tree's triton_kernels/: that name is set up by an installation,
    which may be missing or belong to another tree."""
    folder = ROOT / "triton_kernels"
    found = importlib.util.find_spec("ckd._triton")
    if found is not None and Path(found.origin or "").resolve().parent == folder:
        return
    spec = importlib.util.spec_from_file_location(
        "ckd._triton", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    import ckd

    module = importlib.util.module_from_spec(spec)
    sys.modules["ckd._triton"] = module
    spec.loader.exec_module(module)
    ckd.__dict__["_triton"] = module
