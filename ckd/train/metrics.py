"""metrics.jsonl: one line an epoch. A checkpoint holds the hash of the lines that precede it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from ckd._files import check_regular, naming, open_regular
from ckd._json import JsonError, is_number, parse_object
from ckd.train.errors import CheckpointError

METRICS = "metrics.jsonl"
# What result.json and curves.png are made of.
_REQUIRED = frozenset(
    ("epoch", "step", "test_accuracy", "lr", "time_s", "images_per_s", "loss", "test_loss")
)
# null, both of them, where no test image has a label or the student no class head.
_SCORES = ("test_accuracy", "test_loss")


class MetricsLog:
    """Appends to metrics.jsonl."""

    def __init__(self, run: Path, *, keep_bytes: int) -> None:
        """Truncate the log to `keep_bytes`, its size at the checkpoint that is resumed."""
        self.path = run / METRICS
        self._digest = xxhash.xxh3_64()
        if os.path.lexists(self.path):
            check_regular(self.path)
        with naming(self.path), open(self.path, "a+b") as file:
            file.truncate(keep_bytes)
            file.seek(0)
            self._digest.update(file.read())

    def write(self, record: Mapping[str, Any]) -> tuple[int, str]:
        """Append a line durably; returns the new size of the file in bytes, and its xxh3."""
        line = (json.dumps(record) + "\n").encode()
        with naming(self.path), open(self.path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        self._digest.update(line)
        return size, self._digest.hexdigest()


def read_metrics(run: Path, size: int, xxh3: str, checkpoint: Path) -> list[dict[str, Any]]:
    """The records in the first `size` bytes of metrics.jsonl, which `checkpoint` was made after.

    Raises CheckpointError if they are not the bytes with this hash.
    """
    path = run / METRICS
    remedy = "restore it, or begin another run"
    if not size:
        return []
    try:
        with open_regular(path) as file:
            found = os.fstat(file.fileno()).st_size
            data = file.read(size) if found >= size else b""
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; {remedy}") from error
    if found < size:
        raise CheckpointError(f"{path} has {found} bytes, it had {size} at {checkpoint}; {remedy}")
    if xxhash.xxh3_64_hexdigest(data) != xxh3:
        raise CheckpointError(
            f"{path} is damaged: its first {size} bytes are not those it had at {checkpoint}; "
            f"{remedy}"
        )
    records = []
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            record = parse_object(line)
            if missing := sorted(_REQUIRED - record.keys()):
                raise JsonError(f"it has no {', '.join(missing)}")
            unscored = all(record[name] is None for name in _SCORES)
            for name, value in record.items():
                if unscored and name in _SCORES:
                    continue
                # The test data may drive a loss to infinity.
                if not (is_number(value) or (name == "test_loss" and isinstance(value, float))):
                    raise JsonError(f"{name} is {value!r:.40}")
        except JsonError as error:
            raise CheckpointError(f"{path}, line {number} is damaged: {error}; {remedy}") from error
        records.append(record)
    return records
