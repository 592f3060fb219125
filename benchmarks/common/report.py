"""Shared by the reports: the lines on the machine, durations, JSON and CSV files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ckd._files import atomic_write

Record = dict[str, Any]


def show_machine(about: Record, *more: str) -> None:
    """Print processor, GPU, versions and date, with `more` before the date."""
    print(f"{about['processor']}, {about['threads']} threads of {about['cpus']} CPUs")
    if about.get("gpu"):
        print(f"{about['gpu']}, CUDA {about['cuda']}, triton {about['triton']}")
    versions = f"torch {about['torch']}, ckd {about['ckd']} at {about['commit']}"
    print(", ".join([versions, *more, about["date"]]))


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:,.4g} ms"


def write_record(path: Path, record: Record) -> None:
    atomic_write(path, (json.dumps(record, indent=1) + "\n").encode())


def write_csv(path: Path, fields: Sequence[str], lines: Iterable[Record]) -> None:
    """Write the given fields of each line; an absent field or None is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    atomic_write(path, text.getvalue().encode())
