"""Error messages with a remedy: the known names nearest to an unknown one, an extra to install."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ckd._errors import ConfigError


def unknown(kind: str, name: str, known: Iterable[str], takes: str = "known") -> str:
    """The message for a name that is not known; it lists the known ones, the most similar first."""
    names = sorted(known, key=lambda k: -difflib.SequenceMatcher(None, str(name), k).ratio())
    return f"unknown {kind} {name!r}; {takes}, nearest first: {', '.join(names)}"


def flag(field: str) -> str:
    """The command-line flag of a dataclass's field."""
    return "--" + field.replace("_", "-")


def check_choices(settings: Any) -> None:
    """Raise ConfigError for the first field of a dataclass whose value its Literal type excludes.

    Dataclasses do not check types, and `ckd.cli.command.parse` leaves choices to this function, so
    that settings from Python, files and command lines get the same message.
    """
    for name, hint in get_type_hints(type(settings)).items():
        literals = [t for t in (hint, *get_args(hint)) if get_origin(t) is Literal]
        value = getattr(settings, name)
        if not literals or (value is None and type(None) in get_args(hint)):
            continue
        known = [choice for literal in literals for choice in get_args(literal)]
        for one in value if isinstance(value, tuple) else (value,):
            if one not in known:
                takes = f"{flag(name)} takes"
                raise ConfigError(unknown(name.replace("_", " "), one, known, takes))


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or raise ImportError that says what to install."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        remedy = f"install it with: pip install 'ckd[{extra}]'"
        # Compiled for another torch, torchvision fails when it registers its operators
        # (RuntimeError), loads its library (OSError) or, tried again, misses a part of itself.
        if not isinstance(error, ImportError):
            remedy = (
                "it, or a package that it imports, is broken; if that is torchvision, install "
                "torch and torchvision of releases that belong together"
            )
        raise ImportError(
            f"{purpose} needs {module.partition('.')[0]}, which could not be imported ({error}); "
            f"{remedy}"
        ) from error
