"""`ckd._C`, the compiled kernels, or the reason why it is missing."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

__all__ = ["_C", "missing", "warn_of_reference", "why_missing"]

PACKAGE = Path(__file__).parents[1]


def why_missing(package: Path = PACKAGE, other: Path | None = None) -> str:
    """Why the folder of the package has no module that this Python loads, with the remedy. `other`
    is the folder of the package whose module would be loaded instead."""
    tree = package.parent
    remedy = "pip install --force-reinstall ckd"
    if in_tree := (tree / "setup.py").is_file():
        remedy = f"pip install -e {_shown(tree)}"
    if others := sorted(package.glob("_C.*.so")):
        version = ".".join(map(str, sys.version_info[:2]))
        return f"{others[0].name} is not for this Python, {version}: {remedy} with this Python"
    other = other or installed_elsewhere(package)
    if in_tree and other:
        return (
            f"ckd was imported from {_shown(tree)}, where it was never built, in place of the "
            f"installed one in {_shown(other)}: run Python from another folder, or {remedy}"
        )
    report = package / "_build.json"
    if not report.is_file():
        return f"never built here: {remedy}"
    build = json.loads(report.read_text(encoding="utf-8"))
    if build["built"]:
        return f"it was built, and the file is gone: {remedy}"
    return build["reason"]


def installed_elsewhere(package: Path) -> Path | None:
    """The folder of another ckd on the path of imports that has the module."""
    files = [f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    for entry in sys.path:
        folder = Path(entry or ".", "ckd")
        if (
            any((folder / file).is_file() for file in files)
            and folder.resolve() != package.resolve()
        ):
            return folder
    return None


def module_of_another(package: Path = PACKAGE) -> Path | None:
    """The folder that `ckd._C` would be loaded from, if it is not the package's.

    The finder of an editable install serves `ckd._C` for any package named ckd that lacks it, even
    one of another tree and version.
    """
    spec = importlib.util.find_spec("ckd._C")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    return None if folder.resolve() == package.resolve() else folder


def _shown(path: Path) -> str:
    """A path in a message, without control characters and quoted where it has spaces."""
    text = str(path.resolve())
    return text if text.isprintable() and " " not in text else repr(text)


missing: str | None = None
if TYPE_CHECKING:
    from ckd import _C
else:
    _C = None
    if other := module_of_another():
        missing = f"ckd._C is missing: {why_missing(other=other)}"
    else:
        try:
            # `from ckd import _C` would name a circular import: ckd is being imported.
            _C = importlib.import_module("ckd._C")
        except ImportError as error:
            absent = isinstance(error, ModuleNotFoundError) and error.name == "ckd._C"
            missing = f"ckd._C is missing: {why_missing()}"
            if not absent:
                missing = f"ckd._C is present but cannot be loaded: {error}"

_warned = False


def warn_of_reference() -> None:
    """Warn, once in a process, that `reference` serves the CPU for want of the kernels."""
    global _warned
    if not _warned and missing is not None:
        _warned = True
        warnings.warn(
            "ckd computes on the CPU without its compiled kernels, several times slower and the "
            f"same in its results; {missing}",
            RuntimeWarning,
            stacklevel=2,
        )
