"""How close results come to their limits: the largest error / limit of each quantity and backend.

`python -m pytest --slow --margins` ends with the table that CONTRIBUTING.md shows. Tests in
subprocesses append their margins to the file named by CKD_TEST_MARGINS.
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
    """Append the margins to the file named by CKD_TEST_MARGINS, if it is set."""
    if path := os.environ.get(FILE):
        rows = [[*key, *found] for key, found in _nearest.items()]
        with Path(path).open("a") as file:
            file.write(json.dumps(rows) + "\n")


def _load(path: Path) -> None:
    for line in path.read_text().splitlines():
        for backend, quantity, ratio, test in json.loads(line):
            _keep(backend, quantity, Nearest(ratio, test))


def table(saved: Path) -> list[str]:
    """Markdown tables with a column for each backend: limits of tests/tolerance.py by quantity,
    other limits (of quantities named `quantity, about`) by `about`; then the nearest tests."""
    _load(saved)
    modelled, others = {}, {}
    for (backend, quantity), one in _nearest.items():
        _, comma, about = quantity.partition(", ")
        rows, row = (others, about) if comma else (modelled, quantity)
        rows[backend, row] = max(one.ratio, rows.get((backend, row), 0.0))
    lines = [*_rows("quantity", modelled), "", *_rows("other limits", others), "", "The nearest:"]
    for (backend, quantity), one in sorted(_nearest.items(), key=lambda x: -x[1].ratio)[:12]:
        lines.append(f"{one.ratio:.2f}  {backend} {quantity}  {one.test}")
    return lines


def _rows(head: str, ratios: dict[tuple[str, str], float]) -> list[str]:
    backends = sorted({backend for backend, _ in ratios})
    lines = [f"| {head} | " + " | ".join(backends) + " |", "| --- |" + " ---: |" * len(backends)]
    for row in sorted({row for _, row in ratios}):
        found = [ratios.get((backend, row)) for backend in backends]
        lines.append(
            f"| {row} | " + " | ".join("" if x is None else f"{x:.2f}" for x in found) + " |"
        )
    return lines
