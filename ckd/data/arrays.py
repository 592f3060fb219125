"""Images that are stored as arrays: .npz files, and the digits that come with the package."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.lib.format import MAGIC_PREFIX, read_array
from torch import Tensor

from ckd import _npy
from ckd._files import open_regular
from ckd._fit import fitted
from ckd.data import splits
from ckd.data.dataset import (
    LABEL_NAMES,
    DataError,
    MemoryImages,
    MissingSplit,
    check_rows,
    composed,
    numbered_classes,
    unreadable,
    warn_of_copies,
)

# Names of the arrays of images and of their labels, if they have any.
_Pair = tuple[str, str | None]
_DIGITS_TRAIN = 1437
# Errors of numpy and zipfile on damaged and foreign files.
_DAMAGE = (*_npy.DAMAGE, zipfile.BadZipFile, zlib.error)
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DEFLATE_RATIO = 1032  # the most that deflate compresses


def load_digits(split: str, image_size: int | None) -> MemoryImages:
    """UCI handwritten digits (see DIGITS_LICENSE), 1 x 8 x 8: 1,437 for training, 360 for test."""
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        pixels, labels = file["images"], file["labels"]
    rows = slice(_DIGITS_TRAIN) if split == "train" else slice(_DIGITS_TRAIN, None)
    # 0..16 to 0..255, rounded
    images = ((pixels[rows].astype(np.uint16) * 255 + 8) // 16).astype(np.uint8)
    stored = MemoryImages(
        torch.from_numpy(images)[:, None],
        torch.from_numpy(labels[rows].astype(np.int64)),
        class_names=[str(digit) for digit in range(10)],
        name="digits",
        split=split,
    )
    return _resized(stored, image_size)


def load_npz(path: Path, split: str, image_size: int | None, holdout: float) -> MemoryImages:
    """Images and labels from an .npz file.

    Arrays: `images` and `labels`, divided by `splits.holdout_positions`; or one pair per split,
    such as `train_images` and `train_labels`, `x_test` and `y_test`. Images are uint8
    [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1 or 3, labels integers [N] or [N, 1], -1
    where unknown; images without an array of labels have none. `class_names` (optional) is an array
    of strings, or of UTF-8 bytes; without it the classes are numbered up to the largest label of
    any split. Sample ids are row numbers. Other arrays are not read.
    """
    arrays = _Arrays(path)
    pairs = _pairs(arrays)
    divided = bool(pairs)
    if not divided and "images" in arrays.names:
        labelled = "labels" in arrays.names
        pairs = {split: ("images", "labels" if labelled else None)}
    chosen = splits.choose(pairs, split, path)
    if chosen is None:
        raise MissingSplit(
            f"{path} has no images of the {split} split: expected arrays images and labels, or "
            f"{split}_images and {split}_labels, or x_{split} and y_{split}; "
            f"found {', '.join(arrays.names) or 'none'}"
        )
    _refuse_unread_labels(arrays, pairs)
    image_key, label_key = pairs[chosen]
    images = _channels_first(path, image_key, arrays.read(image_key))
    labels = _labels(arrays, label_key, len(images))
    if "class_names" in arrays.names:
        class_names = _class_names(path, arrays.read("class_names"))
    else:
        # Any split may lack the last class: look at the labels of all.
        every = [_labels(arrays, key, 0) for _, key in pairs.values()]
        class_names = numbered_classes(every, path)
    ids = torch.arange(len(images))
    keys = image_key if label_key is None else f"{image_key}, {label_key}"
    check_rows(labels, ids, class_names, len(images), f"{path} ({keys})")
    if not divided:
        rows = splits.holdout_positions(ids, split, holdout)
        images, labels, ids = images[rows], labels[rows], ids[rows]
    digests = b"".join(xxhash.xxh3_128_digest(image.tobytes()) for image in images.numpy())
    warn_of_copies(digests, lambda position: f"{path}, row {int(ids[position])} of {image_key}")
    stored = MemoryImages(
        images, labels, class_names=class_names, sample_ids=ids, name=path.stem, split=split
    )
    result = _resized(stored, image_size)
    result.held_out = not divided
    return result


class _Arrays:
    """The arrays of an .npz file, each read when it is needed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path, follow=True) as stream:
            if stream.read(len(MAGIC_PREFIX)) == MAGIC_PREFIX:
                raise DataError(
                    f"{path} holds one array without a name (it is an .npy file); "
                    "write images and labels with numpy.savez"
                )
            try:
                with zipfile.ZipFile(stream) as file:
                    entries = file.infolist()
            except _DAMAGE as error:
                raise unreadable(path, "an .npz", error) from error
        self._entries = {entry.filename.removesuffix(".npy"): entry for entry in entries}
        self.names = list(self._entries)

    def read(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        try:
            with open_regular(self.path, follow=True) as stream, zipfile.ZipFile(stream) as file:
                _check_sizes(entry, stream.seek(0, os.SEEK_END))
                with file.open(entry) as array:
                    _npy.check_header(array.read(_npy.HEAD_BYTES), entry.file_size)
                with file.open(entry) as array:
                    return read_array(array)
        except _DAMAGE as error:
            reason = f"({error})"
            if str(error).startswith("Object arrays"):
                reason += "; save it with a dtype other than object: "
                reason += "str" if name == "class_names" else "uint8 for images, int64 for labels"
            raise DataError(f"{self.path}: array {name!r} cannot be read {reason}") from error


def _check_sizes(entry: zipfile.ZipInfo, size: int) -> None:
    """ValueError unless a file of `size` bytes may hold the entry at its declared size."""
    if entry.compress_type not in _METHODS:
        raise ValueError("its compression is not numpy's; write it with numpy.savez_compressed")
    ratio = _DEFLATE_RATIO if entry.compress_type == zipfile.ZIP_DEFLATED else 1
    if entry.compress_size > size or entry.file_size > ratio * entry.compress_size:
        raise ValueError(
            f"{entry.compress_size:,} compressed bytes in a file of {size:,} cannot become the "
            f"{entry.file_size:,} that are declared"
        )


def _pairs(arrays: _Arrays) -> dict[str, _Pair]:
    """Split name -> names of its image and label arrays, for every split that the file has.

    Images without labels count if the file has no others for that half, "train" or "test".
    """
    found = set(arrays.names)
    pairs: dict[str, _Pair] = {}
    for groups in splits.NAMES_ON_DISK.values():
        names = [name for synonyms in groups for name in synonyms]
        every = [
            (name, pair)
            for name in names
            for pair in ((f"{name}_images", f"{name}_labels"), (f"x_{name}", f"y_{name}"))
        ]
        chosen: list[tuple[str, _Pair]] = [(name, pair) for name, pair in every if {*pair} <= found]
        if not chosen and not {"images", "labels"} <= found:
            chosen = [(name, (images, None)) for name, (images, _) in every if images in found]
        for name, pair in chosen:
            if pairs.setdefault(name, pair) != pair:
                raise DataError(
                    f"{arrays.path} has both {pairs[name][0]} and {pair[0]}; remove or rename one"
                )
    return pairs


def _refuse_unread_labels(arrays: _Arrays, pairs: dict[str, _Pair]) -> None:
    """Raise DataError if images have no labels and the file has an array that seems to be theirs:
    to leave it unread would be to train without labels unnoticed."""
    used = {"class_names", *(labels for _, labels in pairs.values())}
    bare = [images for images, labels in pairs.values() if labels is None]
    unread = [name for name in arrays.names if name not in used and LABEL_NAMES.search(name)]
    if bare and unread:
        name = bare[0].replace("images", "labels").replace("x_", "y_")
        raise DataError(
            f"{arrays.path} has no array {name} for {bare[0]}, but {unread[0]}; call it {name}, or "
            "remove it if these images have no labels"
        )


def _channels_first(path: Path, key: str, images: np.ndarray) -> Tensor:
    if images.dtype != np.uint8:
        raise DataError(
            f"{path}: {key} must be uint8 with values 0 to 255, got {images.dtype}; convert it"
        )
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    elif images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DataError(
            f"{path}: {key} must be [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels, "
            f"got shape {images.shape}"
        )
    if 0 in images.shape[1:]:
        raise DataError(f"{path}: {key} of shape {images.shape} have no pixels")
    return torch.from_numpy(np.ascontiguousarray(images))


def _labels(arrays: _Arrays, key: str | None, count: int) -> Tensor:
    """The labels int64 [N] under this name; without a name, `count` times -1."""
    if key is None:
        return torch.full((count,), -1)
    path, labels = arrays.path, arrays.read(key)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path}: {key} must be integer class indices of shape [N], "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _class_names(path: Path, names: np.ndarray) -> tuple[str, ...]:
    try:
        if names.dtype.kind == "S":
            names = np.char.decode(names, "utf-8")
        class_names = tuple(str(name) for name in names.ravel())
        if b"\0" in "".join(class_names).encode():
            raise ValueError("a NUL, which no file of a model or a bank can hold")
    # ValueError: not UTF-8, or half of a surrogate pair; SystemError: no code point.
    except (ValueError, SystemError) as error:
        raise DataError(f"{path}: class_names are not UTF-8 or Unicode ({error})") from error
    composed(class_names, f"{path}: the class names")
    return class_names


def _resized(data: MemoryImages, image_size: int | None) -> MemoryImages:
    """The data set at image_size x image_size, cropped and scaled as decoded images are.

    The fingerprint remains that of the stored pixels, so a bank built at one size fits a student
    of another.
    """
    if image_size is None or tuple(data.images.shape[2:]) == (image_size, image_size):
        return data
    return MemoryImages(
        fitted(data.images, image_size),
        data.labels,
        class_names=data.class_names,
        sample_ids=data.sample_ids,
        name=data.name,
        split=data.split,
        fingerprint=data.fingerprint,
    )
