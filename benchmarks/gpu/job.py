"""A rung's inputs and its record, which is written to disk after every new result.

A file holds the records of several rungs by name. Only the standard library is imported here: a
torch that cannot be imported is reported as a result of the rung.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
LINE = 116  # characters of a rung's line in the table


class NotHere(Exception):
    """The rung has nothing to do on this machine; the message says why."""


@dataclass
class Job:
    """One rung's time limit, paths and record.

    In the record, `lines` are for the table at the end, `wrong` lists failures, `rows` all
    measurements. Each method that changes the record writes it.
    """

    name: str
    file: Path
    work: Path  # shared by the rungs of a run, and deleted after it
    seconds: float
    rehearse: bool = False
    data: str | None = None
    teacher_weights: str | None = None
    record: Record = field(default_factory=dict)
    _start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.record = {"status": "running", "lines": [], "wrong": [], "rows": []}
        self.write()

    @property
    def left(self) -> float:
        """Seconds until this rung is stopped."""
        return self.seconds - (time.monotonic() - self._start)

    @property
    def emulated(self) -> Path:
        """The module of emulated CUDA kernels that a rehearsal's `build` writes."""
        return self.work / "emulated" / "ckd_emulated.so"

    def line(self, text: str) -> None:
        """Add a line to the table at the end."""
        print(text, flush=True)
        self.record["lines"].append(text)
        self.write()

    def packed(self, head: str, texts: Sequence[str]) -> None:
        """Add texts to the table, several per line; `head` precedes the first."""
        for text in pack(head, texts):
            self.line(text)

    def lines(self, texts: Sequence[str]) -> None:
        """Replace all lines."""
        self.record["lines"] = list(texts)
        self.write()

    def wrong(self, text: str) -> None:
        """Add a failure: it is shown at the end, and the command fails."""
        print(f"WRONG {text}", flush=True)
        self.record["wrong"].append(text)
        self.write()

    def row(self, **values: Any) -> None:
        """Add a measurement, with its time in seconds since the rung began."""
        print(" ".join(f"{k}={_short(v)}" for k, v in values.items()), flush=True)
        self.record["rows"].append(values | {"at": round(self.seconds - self.left, 1)})
        self.write()

    def put(self, **values: Any) -> None:
        """Set named values of the record."""
        self.record.update(values)
        self.write()

    def write(self) -> None:
        write_record(self.file, self.name, self.record)


def pack(head: str, texts: Sequence[str]) -> list[str]:
    """Lines of `head` and the texts, as many per line as fit."""
    lines = [head]
    for number, text in enumerate(texts):
        if number > 0 and len(lines[-1]) + len(text) + 2 > LINE:
            lines.append(f"  {text}")
        else:
            lines[-1] += f"{'; ' if number > 0 else ' '}{text}"
    return [line.strip() if not head else line for line in lines]


def write_record(file: Path, name: str, record: Record) -> None:
    """Put one rung's record into a file, by an atomic rename."""
    text = json.dumps(read_records(file) | {name: record}, indent=1, default=str)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text + "\n")
    temporary.replace(file)


def read_records(file: Path) -> dict[str, Record]:
    """The records of a file by rung; empty for a missing or damaged file."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
