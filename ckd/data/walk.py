"""The files below a folder, links followed, each place visited once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def subfolders(folder: Path) -> list[Path]:
    """Folders in `folder` in order of their names: neither hidden, nor links that lead back up."""
    above = _with_parents(folder)
    return sorted(
        entry
        for entry in folder.iterdir()
        if not entry.name.startswith(".") and entry.is_dir() and entry.resolve() not in above
    )


def files(folder: Path, root: Path | None = None) -> Iterator[Path]:
    """Files below `folder`, in order of their names within each folder; hidden ones are left out,
    and so is all in hidden folders.

    Links are followed, but not to a folder that was visited before, nor to one that holds
    `folder` or `root`: its files would come twice, or be mixed with those of its neighbours.
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
