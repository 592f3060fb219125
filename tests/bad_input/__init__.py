"""Calls that must fail, and what their errors must say; run by `tests/test_bad_input.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Case(NamedTuple):
    """`call(tmp_path)` raises `error`, and its message holds every fragment in `says`.

    `needs` names an optional package without which the case is skipped.
    """

    name: str
    call: Callable[[Path], Any]
    error: type[BaseException]
    says: tuple[str, ...]
    needs: str | None = None
