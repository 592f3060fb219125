"""The result of a run: result.json, memory and hardware; tables of results."""

from __future__ import annotations

import contextlib
import platform
import re
import resource
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from tqdm import tqdm

from ckd._errors import one_line
from ckd._files import atomic_write
from ckd._json import JsonError, check_types, is_number, read_object, sealed, unsealed
from ckd.train.config import Config
from ckd.train.errors import TrainError

RESULT = "result.json"
SCHEMA_VERSION = 1
MIB = 1 << 20
SCORES = ("test_accuracy", "test_loss", "best_test_accuracy", "best_epoch")
MEMORY_KEYS = ("peak_cuda_mib", "peak_rss_mib", "start_rss_mib")


class Machine(TypedDict):
    """Where a run was measured."""

    device: str
    threads: int
    torch: str
    python: str
    system: str


class _Required(TypedDict):
    schema_version: int
    method: str
    student: str
    data: str
    seed: int
    epochs: int
    parameters: int
    test_accuracy: float | None
    test_loss: float | None
    best_test_accuracy: float | None
    best_epoch: int | None
    time_per_epoch_s: float
    train_time_s: float
    images_per_s: float
    hardware: Machine


class Result(_Required, total=False):
    """result.json, beside its checksum: `peak_cuda_mib`, or both of the others.

    The scores on test images are None all together: without a class head or labelled images.
    """

    peak_cuda_mib: float
    peak_rss_mib: float
    start_rss_mib: float
    # Since version 0.2.
    train_images: int
    test_images: int  # with a label, on which the accuracy was measured; 0 without one
    test_correct: int | None
    held_out: bool  # whether ckd itself held out a part of the images for testing
    backend: str | None  # of the ops that compare with the bank; None if no term uses one


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
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        if found := re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE):
            return int(found[1]) / 1024
    # Second choice: a process inherits it from the one that started it.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


def hardware(device: torch.device) -> Machine:
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
    """The run in one object. Times and rates are medians over the epochs."""
    last = records[-1]
    scored = [record for record in records if record["test_accuracy"] is not None]
    best = max(scored, key=lambda record: record["test_accuracy"], default=None)
    memory_key = "peak_cuda_mib" if device.type == "cuda" else "peak_rss_mib"
    largest = max(records, key=lambda record: record.get(memory_key, 0.0))
    return {
        "schema_version": SCHEMA_VERSION,
        "method": config.method,
        "student": config.student,
        "data": config.data,
        "seed": config.seed,
        "epochs": config.epochs,
        "parameters": parameters,
        "test_accuracy": last["test_accuracy"],
        "test_loss": last["test_loss"],
        "best_test_accuracy": None if best is None else best["test_accuracy"],
        "best_epoch": None if best is None else best["epoch"],
        "time_per_epoch_s": statistics.median_low(record["time_s"] for record in records),
        "train_time_s": sum(record["time_s"] for record in records),
        "images_per_s": statistics.median_high(record["images_per_s"] for record in records),
        **{key: largest[key] for key in MEMORY_KEYS if key in largest},
        "hardware": hardware(device),
    }


def write_result(run: Path, result: Mapping[str, Any]) -> None:
    """Write result.json, which marks the run as finished. Raises OSError."""
    atomic_write(run / RESULT, sealed(result))


def read_result(run: Path) -> dict[str, Any]:
    """The content of result.json. Raises TrainError that names a damaged file, FileNotFoundError
    if there is none."""
    path = run / RESULT
    try:
        values, data = read_object(path)
        if (version := values.get("schema_version")) != SCHEMA_VERSION:
            raise TrainError(
                f"{path} has schema version {version!r:.40}, this version of ckd reads "
                f"{SCHEMA_VERSION}; use the version that wrote it"
            )
        result = check_types(unsealed(values, data), Result)
        memory = [key in result for key in MEMORY_KEYS]
        if memory not in ([True, False, False], [False, True, True]):
            raise JsonError("it has no peak memory, or that of two devices")
        if len({result[name] is None for name in SCORES}) > 1:
            raise JsonError("it has some of the scores on test images, but not all")
        for name, value in result.items():
            # A loss that the test data drive to infinity is a result too.
            number = type(value) in (int, float) and name != "test_loss"
            if number and not is_number(value):
                raise JsonError(f"{name} is {value!r:.40}")
        return result
    except FileNotFoundError:
        raise
    except OSError as error:
        raise TrainError(f"{path} cannot be read: {error.strerror}") from error
    except JsonError as error:
        raise TrainError(f"{path} is damaged ({error}); delete it, and resume the run") from error


def peak_mib(result: Mapping[str, Any]) -> float:
    """ "peak MiB" of a run: on CUDA the allocator's peak; on the CPU the peak resident size of the
    process during the run, PyTorch's libraries included."""
    return result["peak_cuda_mib" if "peak_cuda_mib" in result else "peak_rss_mib"]


def correct_images(accuracy: float | None, images: int) -> int | None:
    """How many of the images an accuracy counts: their quotient, which rounding does not change."""
    return None if accuracy is None else round(accuracy * images)


def accuracy_words(accuracy: float, correct: int | None = None, images: int | None = None) -> str:
    """An accuracy for people: "30.43 % (14 of 46 images)"; without counts, "30.43 %"."""
    counts = "" if correct is None else f" ({correct:,} of {images:,} images)"
    return f"{100 * accuracy:.2f} %{counts}"


def result_words(result: Mapping[str, Any]) -> str:
    """The test accuracy of a result in words; results of version 0.1 hold no counts."""
    if result["test_accuracy"] is None:
        return "no test accuracy"
    counts = (result.get("test_correct"), result.get("test_images"))
    return f"test accuracy {accuracy_words(result['test_accuracy'], *counts)}"


def time_left(records: Sequence[Mapping[str, Any]], epochs: int) -> str:
    """The estimate of a run's time that is left, in words; "" before its first record."""
    if not records:
        return ""
    each = statistics.median(one["time_s"] + one.get("eval_time_s", 0.0) for one in records)
    return f" (run: {tqdm.format_interval(each * (epochs - len(records)))} left)"


def epoch_line(record: Mapping[str, Any], epochs: int, images: int) -> str:
    """A record of metrics in words, for the terminal. images: those that were scored."""
    accuracy = record["test_accuracy"]
    test = ""
    if accuracy is not None:
        width = len(accuracy_words(1.0, images, images))
        words = accuracy_words(accuracy, correct_images(accuracy, images), images)
        test = f"test {words:<{width}}   "
    return (
        f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}   loss {record['loss']:.4f}   "
        f"{test}lr {record['lr']:.2e}   "
        f"{record['time_s']:.1f} s   {record['images_per_s']:,.0f} images/s"
    )


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table that reads well as plain text too; all but the first columns are numbers.

    Names come from files: what would end a cell or a row is escaped.
    """
    rows = [[one_line(cell).replace("|", r"\|") for cell in row] for row in rows]
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
