"""Image files in one folder per class, with or without split folders above."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from ckd.data import splits, walk
from ckd.data.dataset import DataError
from ckd.data.decode import EncodedImages

SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)


def open_split(root: Path, split: str, holdout: float) -> FolderImages:
    """The images of `split` below `root`; hidden files and files of other kinds are skipped.

    With split folders (root/train/rose/1.jpg, root/val/rose/2.jpg) the class names are those of
    the training folder; without (root/rose/1.jpg) the images are divided by
    `splits.holdout_positions`.
    """
    folders = _split_folders(root)
    chosen = splits.choose(folders, split)
    other = splits.choose(folders, "train" if split == "test" else "test")
    if chosen is None and other is not None:
        raise DataError(
            f"{root} has a folder {other!r} but none for the {split} split; add one, or pass "
            f"{folders[other]} to have a part of it held out"
        )
    if chosen is None:
        classes = _classes(root)
        whole = _list(root, root, classes)
        return whole.select(splits.holdout_positions(whole.sample_ids, split, holdout))
    classes = _classes(folders[chosen])
    if split == "test" and other is not None:
        known = _classes(folders[other])
        if unknown := sorted(set(classes) - set(known)):
            raise DataError(
                f"{folders[chosen]} has class folders that {folders[other]} has not: "
                f"{', '.join(unknown)}"
            )
        classes = known
    return _list(root, folders[chosen], classes)


class FolderImages(EncodedImages):
    """Image files below a folder; sample ids are hashes of their paths relative to it."""

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        labels: Tensor,
        sample_ids: Tensor,
        class_names: tuple[str, ...],
    ) -> None:
        self.labels, self.sample_ids, self.class_names = labels, sample_ids, class_names
        self._root, self._paths = root, paths

    def select(self, positions: Tensor) -> FolderImages:
        return FolderImages(
            self._root,
            [self._paths[position] for position in positions.tolist()],
            self.labels[positions],
            self.sample_ids[positions],
            self.class_names,
        )

    def read(self, position: int) -> bytes:
        try:
            return (self._root / self._paths[position]).read_bytes()
        except OSError as error:
            raise self._unreadable(position, error) from error

    def where(self, position: int) -> str:
        return str(self._root / self._paths[position])

    def sizes_bytes(self) -> list[int]:
        sizes = []
        for position, path in enumerate(self._paths):
            try:
                sizes.append((self._root / path).stat().st_size)
            except OSError as error:
                raise self._unreadable(position, error) from error
        return sizes

    def _unreadable(self, position: int, error: OSError) -> DataError:
        return DataError(
            f"{self.where(position)}: cannot be read ({error.strerror}); replace or remove it"
        )


def _split_folders(root: Path) -> dict[str, Path]:
    """Lower-case name -> folder, for the split folders in `root`.

    Beside folders of other names, a folder with a split's name is a split only if it holds folders:
    of the vehicles car/, bus/ and train/, all three are classes.
    """
    folders = walk.subfolders(root)
    named = {folder.name.lower(): folder for folder in folders}
    named = {name: folder for name, folder in named.items() if name in splits.ALL_NAMES}
    if len(named) < len(folders):
        named = {name: folder for name, folder in named.items() if walk.subfolders(folder)}
    return named


def _classes(folder: Path) -> tuple[str, ...]:
    names = tuple(entry.name for entry in walk.subfolders(folder))
    if not names:
        raise DataError(
            f"{folder} holds no class folders; expected one folder of images per class, "
            f"such as {folder / 'cat' / '1.png'}, or parquet files"
        )
    for name in names:
        # Class names are written into JSON, headers and reports, all of which are UTF-8.
        if name != os.fsencode(name).decode(errors="replace"):
            raise DataError(
                f"{folder}: the name of the class folder {os.fsencode(name)!r} is not UTF-8; "
                "rename it"
            )
    return names


def _list(root: Path, folder: Path, class_names: tuple[str, ...]) -> FolderImages:
    paths: list[str] = []
    labels: list[int] = []
    for label, class_name in enumerate(class_names):
        # A test folder need not have every class of the training folder.
        found = _images(root, folder / class_name) if (folder / class_name).is_dir() else None
        if found == []:
            raise DataError(
                f"{folder / class_name} holds no images ({', '.join(sorted(SUFFIXES))}); "
                "add some or remove the class folder"
            )
        for path in found or ():
            paths.append(path.relative_to(root).as_posix())
            labels.append(label)
    # Hashes the bytes of the path, since file names need not be UTF-8.
    ids = [xxhash.xxh3_64_intdigest(os.fsencode(path)) & 0x7FFF_FFFF_FFFF_FFFF for path in paths]
    seen: dict[int, str] = {}
    for sample_id, name in zip(ids, paths):
        if sample_id in seen:
            raise DataError(
                f"{root}: {seen[sample_id]} and {name} have the same sample id; rename one"
            )
        seen[sample_id] = name
    return FolderImages(root, paths, torch.tensor(labels), torch.tensor(ids), class_names)


def _images(root: Path, folder: Path) -> list[Path]:
    return sorted(path for path in walk.files(folder, root) if path.suffix.lower() in SUFFIXES)
