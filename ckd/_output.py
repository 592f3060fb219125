"""The file that the `--out` of a command names."""

from __future__ import annotations

import os
from pathlib import Path

from ckd._errors import ConfigError


def check_output(path: Path) -> None:
    """Raise ConfigError for a place that takes no file: known before the work, not after it."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"--out {path}: there is no folder {path.parent}; make it")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ConfigError(f"--out {path}: it is no regular file, which is replaced; name another")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--out {path}: the folder {path.parent} is read-only; name another")
