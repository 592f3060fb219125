"""Image files in one folder per class or without classes, with or without split folders above."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from ckd._errors import warn
from ckd._files import read_regular
from ckd.data import photo, splits, walk
from ckd.data.dataset import DataError, MissingSplit, composed
from ckd.data.decode import EncodedImages

SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)
# A folder of one of these names, in either case, holds images without labels, as in STL-10.
UNLABELLED = ("unlabelled", "unlabeled")
# Names of a single folder that hardly name a class.
_NO_CLASS = frozenset(("images", "image", "imgs", "img", "photos", "pictures", "data", "all"))


def open_split(root: Path, split: str, holdout: float) -> FolderImages:
    """The images of `split` below `root`; hidden files and files of other kinds are skipped.

    With split folders (root/train/rose/1.jpg, root/val/rose/2.jpg) the class names are those of
    the training folder; without (root/rose/1.jpg) the images are divided by
    `splits.holdout_positions`. If `root` holds a single folder with the split folders in it, that
    folder takes its place. A test folder without class folders is passed over if there is a
    validation folder.

    Without labels (-1) are the images of a root or split folder that has no class folders
    (root/1.jpg, root/train/1.jpg), and those at any depth of a folder UNLABELLED beside class or
    split folders. That of a split folder belongs to its split, that of `root` to the training
    split: nothing of it is held out.
    """
    root = _root_of_splits(root)
    folders = {name: _unwrapped(folder) for name, folder in _split_folders(root).items()}
    folders = _with_classes(folders)
    chosen = splits.choose(folders, split, root)
    other = splits.choose(folders, "train" if split == "test" else "test", root)
    if chosen is None and other is not None:
        raise MissingSplit(
            f"{root} has a folder {folders[other].name!r} but none for the {split} split; "
            f"add one, or pass {folders[other]} to have a part of it held out"
        )
    if chosen is None:
        return _divided(root, split, holdout)
    folder, classes = folders[chosen], _classes(folders[chosen])
    bare = [*_loose(root, folder, classes), *_unlabelled(root, folder, classes)]
    if split == "train":
        _warn_of_one_class(root, folder, classes)
        bare += _unlabelled(root, root, classes)
    if other is not None and (split == "test" or not classes):
        known = _classes(folders[other])
        if known and not classes:
            warn(f"{folder} holds no class folders: its images have no labels", stacklevel=4)
        classes = _named_alike(classes, known, folder, folders[other]) if known else classes
    return _list(root, classes, bare)


def _divided(root: Path, split: str, holdout: float) -> FolderImages:
    """The images of `split` in a root without split folders."""
    classes = _classes(root)
    _warn_of_one_class(root, root, classes)
    loose, unlabelled = _loose(root, root, classes), _unlabelled(root, root, classes)
    whole = _list(root, classes, [*loose, *unlabelled])
    divisible = whole.sample_ids[: len(whole) - len(unlabelled)]
    if len(divisible) == 0 and split == "test":
        raise MissingSplit(
            f"{root} has no images of the {split} split: all are in {_unlabelled_folder(root)}, "
            "of which nothing is held out; to have a part held out, pass that folder"
        )
    positions = torch.arange(len(whole))
    if len(divisible):
        chosen = splits.holdout_positions(divisible, split, holdout)
        positions = chosen if split == "test" else torch.cat([chosen, positions[len(divisible) :]])
    chosen_images = whole.select(positions)
    chosen_images.held_out = len(divisible) > 0
    return chosen_images


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
            path, limit = self._root / self._paths[position], photo.max_bytes(self.max_pixels)
            return read_regular(path, limit, follow=True)
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
        reason = f"{self.where(position)}: cannot be read ({error.strerror}); replace or remove it"
        if error.errno == errno.EFBIG:
            reason += ", or raise the limit with max_pixels (--max-image-pixels)"
        return DataError(reason)


def _split_folders(root: Path) -> dict[str, Path]:
    """Lower-case split name -> folder, for the split folders in `root`.

    Beside folders of other names, a folder with a split's name is a split only if it holds folders:
    of the vehicles car/, bus/ and train/, all three are classes. Folders whose name has a split's
    name as one of several words are splits if they differ in that word alone (train_images/ and
    test_images/), or if there are no other folders and all have a class folder of one name in
    common, or one of them is called like a split: bullet-train/ and test tube/ are classes.
    """
    folders = _labelled_subfolders(root)
    groups: dict[str, list[tuple[str, Path]]] = {}
    for folder in folders:
        name, rest = splits.name_and_rest(folder.name)
        if name is not None:
            groups.setdefault(rest, []).append((name, folder))
    exact = groups.pop("*", [])
    every = [*exact, *(pair for group in groups.values() for pair in group)]
    if exact and len(every) == len(folders) and _both(every):
        return _unique(root, every)
    if len(exact) < len(folders):
        exact = [(name, folder) for name, folder in exact if walk.subfolders(folder)]
    if _both(exact):
        return _unique(root, exact)
    pairs = [pair for group in groups.values() if _both(group) for pair in group]
    if pairs and not exact:
        return _unique(root, pairs)
    every = [*exact, *(pair for group in groups.values() for pair in group)]
    inner = [{place.name for place in walk.subfolders(folder)} for _, folder in every]
    if len(every) == len(folders) > 0 and set.intersection(*inner):
        return _unique(root, every)
    return _unique(root, exact)


def _unwrapped(folder: Path) -> Path:
    """The split folder, or the folder of the same split that is all it holds: train/train/cat/."""
    split = splits.name_and_rest(folder.name)
    inner = walk.subfolders(folder)
    while len(inner) == 1 and splits.name_and_rest(inner[0].name) == split:
        warn(f"{inner[0]} is read: it is all that {folder} holds", stacklevel=5)
        folder = inner[0]
        inner = walk.subfolders(folder)
    return folder


def _with_classes(folders: dict[str, Path]) -> dict[str, Path]:
    """The split folders without those for testing that hold no class folders, if others do:
    contests publish their test images without labels."""
    tests = [name for group in splits.NAMES_ON_DISK["test"] for name in group if name in folders]
    bare = [name for name in tests if not _labelled_subfolders(folders[name])]
    if len(bare) in (0, len(tests)):
        return folders
    for name in bare:
        warn(f"{folders[name]} holds no class folders and is passed over", stacklevel=5)
    return {name: folder for name, folder in folders.items() if name not in bare}


def _both(group: Sequence[tuple[str, Path]]) -> bool:
    """Whether there are folders for both splits."""
    kinds = {name in splits.NAMES_ON_DISK["train"][0] for name, _ in group}
    return len(kinds) == 2


def _unique(root: Path, named: Sequence[tuple[str, Path]]) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for name, folder in named:
        if folders.setdefault(name, folder) is not folder:
            raise DataError(
                f"{root} has two folders for one split, {folders[name].name!r} and "
                f"{folder.name!r}; remove or rename one"
            )
    return folders


def _root_of_splits(root: Path) -> Path:
    """The folder with the split folders: `root`, or one below it, beside which no other has images.

    `root` if there is none. Raises DataError if several folders have split folders of their own.
    """
    place, inner = root, [root]
    while len(inner) == 1 and not _split_folders(place := inner[0]):
        inner = [folder for folder in walk.subfolders(place) if _holds_images(folder)]
    if len(inner) == 1:
        if place != root:
            warn(f"{root} holds its split folders one level deeper: {place} is read", stacklevel=5)
        return place
    divided = [str(folder) for folder in inner if _both(list(_split_folders(folder).items()))]
    if divided:
        raise DataError(
            f"{', '.join(divided)}: each holds folders of its own for training and test. If they "
            f"are data sets, pass one; if they are classes, put the splits above: "
            f"{place / 'train' / Path(divided[0]).name}"
        )
    return root


def _holds_images(folder: Path) -> bool:
    return any(path.suffix.lower() in SUFFIXES for path in walk.files(folder))


def _classes(folder: Path) -> dict[str, Path]:
    """Class name -> folder, sorted by name; warns of images that are in none of them.

    Empty if the folder holds images without labels alone; DataError if it holds none either.
    """
    classes = {entry.name: entry for entry in _labelled_subfolders(folder)}
    loose = _images_in(folder)
    if not (classes or loose or _unlabelled_folder(folder)):
        raise DataError(
            f"{folder} holds no class folders and no images; expected one folder of images per "
            f"class, such as {folder / 'cat' / '1.png'}, images without classes, or parquet files"
        )
    for name in classes:
        # Class names are written into JSON, headers and reports, all of which are UTF-8.
        if name != os.fsencode(name).decode(errors="replace"):
            raise DataError(
                f"{folder}: the name of the class folder {os.fsencode(name)!r} is not UTF-8; "
                "rename it"
            )
    composed(classes, f"{folder}: the class folders")
    if classes and loose:
        warn(
            f"{folder}: images that lie beside the class folders are left out ({len(loose)}, such "
            f"as {loose[0]!r}); a folder {UNLABELLED[0]!r} may hold images without labels",
            stacklevel=5,
        )
    return classes


def _labelled_subfolders(folder: Path) -> list[Path]:
    """The subfolders, without those for images without labels."""
    return [place for place in walk.subfolders(folder) if place.name.lower() not in UNLABELLED]


def _unlabelled_folder(folder: Path) -> Path | None:
    """The folder UNLABELLED in `folder`. Raises DataError if there are several."""
    found = [place for place in walk.subfolders(folder) if place.name.lower() in UNLABELLED]
    if len(found) > 1:
        raise DataError(
            f"{folder} has several folders for images without labels, "
            f"{' and '.join(place.name for place in found)}; put all images into one"
        )
    return found[0] if found else None


def _unlabelled(root: Path, folder: Path, classes: dict[str, Path]) -> list[Path]:
    """The images in the folder UNLABELLED in `folder`.

    Raises DataError if it has none, or a folder that is named after a class: its images may have a
    label.
    """
    place = _unlabelled_folder(folder)
    if place is None:
        return []
    if both := sorted({inner.name for inner in walk.subfolders(place)} & classes.keys()):
        raise DataError(
            f"{place / both[0]} is named after a class, but images in {place.name} have no "
            f"labels; move them to the folder of that class, or rename {both[0]!r} if they are "
            "not of it"
        )
    if found := _images(root, place):
        return found
    raise DataError(f"{place} holds no images; add some or remove it")


def _loose(root: Path, folder: Path, classes: dict[str, Path]) -> list[Path]:
    """The images in `folder` itself, if it has no class folders."""
    return [] if classes else [path for path in _images(root, folder) if path.parent == folder]


def _named_alike(
    classes: dict[str, Path], known: dict[str, Path], folder: Path, training: Path
) -> dict[str, Path]:
    """The folders `classes` under the names of the training folders, which may differ in Unicode
    normalisation. Training classes that are missing keep their place."""
    found = composed(classes, folder)
    names = composed(known, training)
    if unknown := sorted(classes[found[name]].name for name in found.keys() - names.keys()):
        raise DataError(f"{folder} has class folders that {training} has not: {', '.join(unknown)}")
    by_composed = {names[name]: classes[found[name]] for name in found}
    return {name: by_composed.get(name, folder / name) for name in known}


def _warn_of_one_class(root: Path, folder: Path, classes: dict[str, Path]) -> None:
    """Warn of a single class whose folder seems to hold the classes, or images without any."""
    if len(classes) != 1 or _unlabelled_folder(folder):
        return
    ((name, place),) = classes.items()
    inner = walk.subfolders(place)
    if len(inner) > 1 and not _images_in(place):
        remedy = (
            f"if the {len(inner)} folders in it are classes, such as {inner[0].name!r}, "
            f"{f'pass {place}' if folder == root else f'move them into {folder}'}"
        )
    elif name.lower() in _NO_CLASS:
        remedy = f"if its images have no labels, call it {UNLABELLED[0]!r}"
    else:
        return
    warn(f"{folder} holds one class, {name!r}; {remedy}", stacklevel=5)


def _list(root: Path, classes: dict[str, Path], bare: Sequence[Path]) -> FolderImages:
    """The images of the class folders, then the images `bare` without labels."""
    paths: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(classes.values()):
        # A test folder need not have every class of the training folder.
        found = _images(root, folder) if folder.is_dir() else None
        if found == []:
            raise DataError(
                f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}); "
                "add some or remove the class folder"
            )
        for path in found or ():
            paths.append(path.relative_to(root).as_posix())
            labels.append(label)
    paths += [path.relative_to(root).as_posix() for path in bare]
    labels += [-1] * len(bare)
    # Hashes the bytes of the path, since file names need not be UTF-8.
    ids = [xxhash.xxh3_64_intdigest(os.fsencode(path)) & 0x7FFF_FFFF_FFFF_FFFF for path in paths]
    seen: dict[int, str] = {}
    for sample_id, name in zip(ids, paths):
        if sample_id in seen:
            raise DataError(
                f"{root}: {seen[sample_id]} and {name} have the same sample id; rename one"
            )
        seen[sample_id] = name
    known, sample_ids = torch.tensor(labels, dtype=torch.int64), torch.tensor(ids)
    return FolderImages(root, paths, known, sample_ids, tuple(classes))


def _images_in(folder: Path) -> list[str]:
    """Names of the image files in `folder` itself."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    return [name for name in names if os.path.splitext(name)[1].lower() in SUFFIXES]


def _images(root: Path, folder: Path) -> list[Path]:
    return sorted(path for path in walk.files(folder, root) if path.suffix.lower() in SUFFIXES)
