"""How near to their limits results come: the largest error / limit of each quantity and backend.

`python -m pytest --slow --margins` ends with the table that CONTRIBUTING.md shows. Tests that run
in processes of their own leave theirs in the file that CKD_TEST_MARGINS names.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

FILE = "CKD_TEST_MARGINS"


class Nearest(NamedTuple):
    ratio: float  # error / limit
    test: str


_nearest: dict[tuple[str, str], Nearest] = {}


def record(backend: str, quantity: str, error: float, limit: float) -> None:
    ratio = error / limit if limit > 0 else float(error > 0)
    test = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")
    _keep(backend, quantity, Nearest(ratio, test))


def _keep(backend: str, quantity: str, found: Nearest) -> None:
    key = (backend, quantity)
    _nearest[key] = max(found, _nearest.get(key, found))


def save() -> None:
    """To the file that the environment names, after what other processes left there."""
    if path := os.environ.get(FILE):
        rows = [[*key, *found] for key, found in _nearest.items()]
        with Path(path).open("a") as file:
            file.write(json.dumps(rows) + "\n")


def _load(path: Path) -> None:
    for line in path.read_text().splitlines():
        for backend, quantity, ratio, test in json.loads(line):
            _keep(backend, quantity, Nearest(ratio, test))


def table(saved: Path) -> list[str]:
    """Markdown: a row for each quantity, a column for each backend; then the nearest tests."""
    _load(saved)
    backends = sorted({backend for backend, _ in _nearest})
    quantities = sorted({quantity for _, quantity in _nearest})
    lines = ["| quantity | " + " | ".join(backends) + " |", "| --- |" + " ---: |" * len(backends)]
    for quantity in quantities:
        found = [_nearest.get((backend, quantity)) for backend in backends]
        cells = [f"{one.ratio:.2f}" if one else "" for one in found]
        lines.append(f"| {quantity} | " + " | ".join(cells) + " |")
    lines += ["", "The nearest:"]
    for (backend, quantity), one in sorted(_nearest.items(), key=lambda x: -x[1].ratio)[:12]:
        lines.append(f"{one.ratio:.2f}  {backend} {quantity}  {one.test}")
    return lines
