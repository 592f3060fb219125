"""The file that a flag of a command names for its output."""

from __future__ import annotations

import os
from pathlib import Path

from ckd._errors import ConfigError


def check_output(path: Path, flag: str = "--out") -> None:
    """Raise ConfigError for a place that takes no file: known before the work, not after it."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{flag} {path}: there is no folder {path.parent}; make it")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ConfigError(f"{flag} {path}: it is no regular file, which is replaced; name another")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{flag} {path}: the folder {path.parent} is read-only; name another")
