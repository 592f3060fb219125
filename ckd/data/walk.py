"""The files below a folder; links are followed, each folder is visited once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def subfolders(folder: Path) -> list[Path]:
    """Folders in `folder`, sorted by name, except hidden ones and links to it or its parents."""
    above = _with_parents(folder)
    return sorted(
        entry
        for entry in folder.iterdir()
        if not entry.name.startswith(".") and entry.is_dir() and entry.resolve() not in above
    )


def files(folder: Path, root: Path | None = None) -> Iterator[Path]:
    """Files below `folder`, sorted by name within each folder, without hidden files and folders.

    Links are followed, except to a folder that was visited before (its files would come twice) and
    to `root` or a folder that contains `folder` or `root` (files of other classes would come in).
    """
    seen = set(folder.resolve().parents) | _with_parents(root or folder) - {folder.resolve()}
    for parent, folders, names in os.walk(folder, followlinks=True):
        place = Path(parent).resolve()
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(parent, name)


def _with_parents(folder: Path) -> set[Path]:
    place = folder.resolve()
    return {place, *place.parents}
