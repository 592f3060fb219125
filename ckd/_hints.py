"""Error messages that say what to do: unknown names with the nearest known ones, missing extras."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not in a table, the known ones listed nearest first."""
    names = sorted(known, key=lambda k: -difflib.SequenceMatcher(None, str(name), k).ratio())
    return f"unknown {kind} {name!r}; known, nearest first: {', '.join(names)}"


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or raise ImportError that names the extra to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs {module.partition('.')[0]}, which could not be imported ({error}); "
            f"install it with: pip install 'ckd[{extra}]'"
        ) from error
