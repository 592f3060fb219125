"""The files below a folder; links are followed, each folder and each file is visited once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ckd._files import read_regular
from ckd.data.dataset import DataError

# Folders that systems put beside or into a user's, with thumbnails or forks of the user's files.
_OF_SYSTEMS = frozenset(("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"))
_REVISION_BYTES = 4096  # of refs/main, which holds a name


def subfolders(folder: Path) -> list[Path]:
    """Folders in `folder`, sorted by name, except those that are hidden or a system's, and links
    to it or its parents.

    Raises DataError for a broken link without a suffix, which may stand for a class folder; with a
    suffix it stands for a file.
    """
    above, found = _with_parents(folder), []
    with os.scandir(folder) as entries:
        for entry in entries:
            if _passed_over(entry.name):
                continue
            if entry.is_symlink() and not os.path.exists(entry.path) and not Path(entry).suffix:
                raise DataError(f"{entry.path} is a link to nothing; mend or remove it")
            if entry.is_dir() and os.path.realpath(entry.path) not in above:
                found.append(folder / entry.name)
    return sorted(found)


def files(folder: Path, root: Path | None = None) -> Iterator[Path]:
    """Files below `folder`, sorted by name within each folder, without hidden files and folders.

    Links are followed, except to a file or folder that was visited before (it would come twice)
    and to `root` or a folder that contains `folder` or `root` (files of other classes would come
    in). Raises OSError for a folder that cannot be listed.
    """
    above = _with_parents(folder) | _with_parents(root or folder)
    seen = above - {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not _passed_over(name))
        for name in sorted(names):
            path = os.path.join(place, name)
            real = os.path.realpath(path) if os.path.islink(path) else path
            if not _passed_over(name) and real not in seen:
                seen.add(real)
                yield Path(parent, name)


def hub_snapshot(folder: Path) -> Path:
    """The snapshot to read if `folder` is a data set in the cache of Hugging Face's hub.

    That is datasets--ORG--NAME with blobs/, refs/ and snapshots/REVISION/: the revision that
    refs/main names, else the only one. Any other folder is returned as it is. Raises OSError if
    refs/main cannot be read.
    """
    snapshots, main = folder / "snapshots", folder / "refs" / "main"
    if not (snapshots.is_dir() and (folder / "blobs").is_dir()):
        return folder
    found = subfolders(snapshots)
    revision = read_regular(main, _REVISION_BYTES, follow=True).strip() if main.exists() else b""
    chosen = [place for place in found if os.fsencode(place.name) == revision] or found
    if len(chosen) != 1:
        raise DataError(
            f"{folder} is a cache of Hugging Face's hub with {len(found)} snapshots"
            f"{''.join(f', {place}' for place in found)}; pass the one to read"
        )
    return chosen[0]


def _passed_over(name: str) -> bool:
    return name.startswith(".") or name in _OF_SYSTEMS


def _with_parents(folder: Path) -> set[str]:
    place = Path(os.path.realpath(folder))
    return {str(place), *map(str, place.parents)}


def _raise(error: OSError) -> None:
    raise error
