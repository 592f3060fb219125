"""The results of a run: metrics.jsonl, result.json, memory and hardware."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import resource
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ckd._files import atomic_write
from ckd.train.config import Config

METRICS, RESULT = "metrics.jsonl", "result.json"
MIB = 1 << 20


class MetricsLog:
    """metrics.jsonl, one line an epoch, and TensorBoard events if TensorBoard is installed."""

    def __init__(self, run: Path, *, keep_bytes: int, tensorboard: bool, step: int) -> None:
        """Truncate the log to `keep_bytes`, its size at the checkpoint that is resumed."""
        self.path = run / METRICS
        with open(self.path, "ab") as file:
            file.truncate(keep_bytes)
        self._board: Any = None
        if tensorboard and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, record: Mapping[str, Any]) -> int:
        """Append a line durably; returns the new size of the file in bytes."""
        with open(self.path, "ab") as file:
            file.write((json.dumps(record) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        if self._board is not None:
            for name, value in record.items():
                self._board.add_scalar(name, value, record["step"])
            self._board.flush()
        return size

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. Raises ValueError naming the line that is damaged."""
    records = []
    lines = (run / METRICS).read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{run / METRICS}, line {number} is damaged: {error}") from error
    return records


class PeakMemory:
    """Peak memory since this object was made, in MiB.

    On CUDA, the allocator's peak (`peak_cuda_mib`). On the CPU, the peak resident size of the
    process, PyTorch's libraries included (`peak_rss_mib`), and the size at the start
    (`start_rss_mib`).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        # Resets the peak on Linux; elsewhere it is that of the whole life of the process.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.start_rss_mib = _peak_rss_mib()

    def read(self) -> dict[str, float]:
        """The figures for a line of metrics."""
        if self.device.type == "cuda":
            return {"peak_cuda_mib": torch.cuda.max_memory_allocated(self.device) / MIB}
        return {
            "peak_rss_mib": round(_peak_rss_mib(), 1),
            "start_rss_mib": round(self.start_rss_mib, 1),
        }


def _peak_rss_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine and the versions, to be stored with a measurement."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
    }


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def summary(
    config: Config, records: Sequence[Mapping[str, Any]], parameters: int, device: torch.device
) -> dict[str, Any]:
    """result.json: the run in one object. Times and rates are medians over the epochs."""
    last = records[-1]
    best = max(records, key=lambda record: record["test_accuracy"])
    memory_key = "peak_cuda_mib" if device.type == "cuda" else "peak_rss_mib"
    largest = max(records, key=lambda record: record.get(memory_key, 0.0))
    return {
        "method": config.method,
        "student": config.student,
        "data": config.data,
        "seed": config.seed,
        "epochs": config.epochs,
        "parameters": parameters,
        "test_accuracy": last["test_accuracy"],
        "test_loss": last["test_loss"],
        "best_test_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "time_per_epoch_s": statistics.median_low(record["time_s"] for record in records),
        "train_time_s": sum(record["time_s"] for record in records),
        "images_per_s": statistics.median_high(record["images_per_s"] for record in records),
        **{key: largest[key] for key in MEMORY_KEYS if key in largest},
        "hardware": hardware(device),
    }


MEMORY_KEYS = ("peak_cuda_mib", "peak_rss_mib", "start_rss_mib")


def write_result(run: Path, result: Mapping[str, Any]) -> None:
    """Write result.json, which marks the run as finished. Raises OSError."""
    atomic_write(run / RESULT, (json.dumps(result, indent=1) + "\n").encode())


def epoch_line(record: Mapping[str, Any], epochs: int) -> str:
    """A record of metrics in words, for the terminal."""
    return (
        f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}   loss {record['loss']:.4f}   "
        f"test {record['test_accuracy']:6.2%}   lr {record['lr']:.2e}   "
        f"{record['time_s']:.1f} s   {record['images_per_s']:,.0f} images/s"
    )


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table that reads well as plain text too; all but the first columns are numbers."""
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    rule = [
        "-" * width if i < text_columns else "-" * (width - 1) + ":"
        for i, width in enumerate(widths)
    ]
    lines = []
    for row in (heads, rule, *rows):
        cells = [
            cell.ljust(width) if i < text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
