"""Marks tests that run only with `python -m pytest --slow` (tests/conftest.py)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow(values: Iterable[Any]) -> list[Any]:
    """Values for `parametrize` whose tests are slow."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
