"""Finds the finished runs in folders, and names them so that they are told apart."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckd._console import bar
from ckd._files import open_regular
from ckd._json import JsonError, is_number, parse_object, read_object
from ckd.train import checkpoint
from ckd.train.errors import CheckpointError, ConfigError, TrainError
from ckd.train.metrics import METRICS
from ckd.train.report import RESULT
from ckd.train.stored import CONFIG, is_run, read_result, resume_command, stored_config

_METRICS_LIMIT = 64 << 20  # bytes: some 200,000 epochs


@dataclass
class Found:
    """Finished runs by folder, and a line for each other one that says why it is left out."""

    results: dict[Path, dict[str, Any]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def find_runs(places: Sequence[Path], *, settings: bool = False) -> Found:
    """The runs that `places` are, or hold at any depth. Links are followed in `places` alone.

    settings: whether runs must have their config.json. Raises TrainError for a place that does not
    exist.
    """
    found, seen = Found(), set()
    for place in places:
        if not os.path.lexists(place):
            raise TrainError(f"{place} is not a run folder: it has no {CONFIG}")
        if not place.is_dir():
            found.skipped.append(f"{place} is no folder")
            continue
        runs = 0
        for folder in _candidates(place, found):
            runs += 1
            if (real := folder.resolve()) in seen:
                continue
            seen.add(real)
            try:
                result = read_finished(folder)
                if settings:
                    stored_config(folder)
                found.results[folder] = result
            except (TrainError, ConfigError, CheckpointError, OSError) as error:
                found.skipped.append(str(error))
        if not runs:
            found.skipped.append(f"{place} holds no run")
    return found


def read_finished(folder: Path) -> dict[str, Any]:
    """result.json. Raises TrainError that says how far a run came that has none."""
    if (folder / RESULT).exists() or not is_run(folder):
        return read_result(folder)
    if checkpoint.latest(folder) is None:
        raise TrainError(
            f"{folder} has no result: it failed before its first checkpoint, or has just begun"
        )
    raise TrainError(f"{folder} is not finished; go on with: {resume_command(folder)}")


def _candidates(place: Path, found: Found) -> Iterator[Path]:
    """The run folders at and below `place`, in the order of their names. A run holds no others."""
    if _is_ours(place):
        yield place
        return

    def refuse(error: OSError) -> None:
        found.skipped.append(f"{error.filename} cannot be searched: {error.strerror}")

    with bar(f"searching {place}", total=None, unit="folders") as searched:
        for parent, folders, _ in os.walk(place, onerror=refuse):
            searched.update()
            deeper = []
            for name in sorted(folders):
                folder = Path(parent) / name
                if folder.is_symlink() or name.startswith("."):
                    continue
                if _is_ours(folder):
                    yield folder
                else:
                    deeper.append(name)
            folders[:] = deeper


def _is_ours(folder: Path) -> bool:
    """Whether this is the folder of a run. Models of other libraries have a config.json too, and
    other programs a result.json."""
    try:
        if checkpoint.latest(folder) is not None:
            return True
        for name in (CONFIG, RESULT):
            if (folder / name).is_symlink() or not (folder / name).exists():
                continue
            try:
                values, _ = read_object(folder / name)
            except JsonError:
                if name == CONFIG:  # torn; it is a run's if something else is
                    continue
                return True
            if {"method", "student", "data"} <= values.keys() or "schema_version" in values:
                return True
    except OSError:
        pass
    return False


def labels(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: its own, with as many of those above it as tell equal ones apart."""
    parts = [folder.absolute().parts for folder in folders]
    depth = [1] * len(parts)
    while True:
        names = ["/".join(part[-d:]) for part, d in zip(parts, depth)]
        counts = Counter(names)
        longer = [
            i for i, name in enumerate(names) if counts[name] > 1 and depth[i] < len(parts[i])
        ]
        if not longer:
            return names
        for i in longer:
            depth[i] += 1


def read_curves(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl with the numbers that curves are made of; [] if it is missing or
    damaged, since a comparison does without."""
    try:
        with open_regular(folder / METRICS) as file:
            data = file.read(_METRICS_LIMIT)
        records = [parse_object(line) for line in data.splitlines()]
    except (OSError, JsonError):
        return []
    for record in records:
        if not all(is_number(record.get(name)) for name in ("epoch", "time_s", "loss")):
            return []
        for name in ("test_accuracy", "test_loss"):
            if not is_number(record.get(name)):
                record[name] = None
    return records
