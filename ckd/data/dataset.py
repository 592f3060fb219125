"""The interface of a data set, and its implementation in memory."""

from __future__ import annotations

import copy
import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import xxhash
from torch import Tensor

from ckd._errors import CkdError, warn
from ckd._files import LFS_POINTER, holds_lfs_pointer

# What arrays and columns of labels are called.
LABEL_NAMES = re.compile("label|class|klass|target|categor|^y$|^y_|_y$", re.IGNORECASE)


class DataError(CkdError, ValueError):
    """Unusable data or a wrong argument; the message names the file, row or argument."""


class MissingSplit(DataError):
    """The data set has no images of the split that is asked for."""


class Batch(NamedTuple):
    """`images` uint8 [B, C, H, W], `labels` int64 [B], -1 where unknown, `sample_ids` int64 [B], on
    one device."""

    images: Tensor
    labels: Tensor
    sample_ids: Tensor


_Self = TypeVar("_Self", bound="Dataset")


class Dataset(ABC):
    """uint8 images with labels, where these are known, that are read by position.

    `labels` and `sample_ids` are int64 [N] on the CPU, labels within 0..len(class_names)-1, or -1
    where unknown; a data set without classes has no class names. Sample ids are unique and stable:
    the same image always has the same id. `fingerprint` is a hash of the content, which tells data
    sets apart.
    """

    name: str
    split: str
    class_names: tuple[str, ...]
    labels: Tensor
    sample_ids: Tensor
    image_shape: tuple[int, int, int]
    fingerprint: str
    held_out: bool = False
    """Whether the data have no splits, so that a part was held out for "test" (see `load`)."""

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        channels, height, width = self.image_shape
        return (
            f"{type(self).__name__}({self.name!r}, {self.split!r}: {len(self):,} images of "
            f"{channels} x {height} x {width}, {len(self.class_names):,} classes, "
            f"{self.labelled:,} labelled)"
        )

    @property
    def labelled(self) -> int:
        """The number of images with a label."""
        return int((self.labels >= 0).sum())

    def with_labels(self: _Self, labels: Tensor) -> _Self:
        """The same images with other labels, int64 [N]; the fingerprint stays, since it tells
        which images these are."""
        other = copy.copy(self)
        other.labels = labels
        return other

    def batches(
        self,
        order: Tensor,
        batch_size: int | Sequence[int],
        device: str | torch.device = "cpu",
        workers: int = 0,
    ) -> Iterator[Batch]:
        """Batches in the order of the positions `order` (int64 [n]): of one size, and the last may
        be shorter, or of each size in a sequence whose sum is n.

        `workers` processes prefetch if images are decoded on demand; batches do not depend on their
        number. A position outside 0..N-1 raises IndexError.
        """
        smallest = batch_size if isinstance(batch_size, int) else min(batch_size, default=1)
        if smallest < 1:
            raise DataError(f"batch_size must be at least 1, got {smallest}")
        if not isinstance(batch_size, int) and sum(batch_size) != len(order):
            raise DataError(
                f"batch_size must add up to the {len(order)} positions of order, "
                f"got sizes with the sum {sum(batch_size)}"
            )
        if workers < 0:
            raise DataError(f"workers must be 0 or more, got {workers}")
        if order.dtype != torch.int64 or order.dim() != 1:
            raise DataError(
                f"order must be a one-dimensional int64 tensor of positions, "
                f"got {order.dtype} of shape {tuple(order.shape)}"
            )
        order = order.cpu()
        lowest, highest = order.aminmax() if len(order) else (0, 0)
        if lowest < 0 or highest >= len(self):
            raise IndexError(
                f"order holds positions {int(lowest)}..{int(highest)}, "
                f"but {self.name} ({self.split}) has rows 0..{len(self) - 1}"
            )
        groups = order.split(batch_size) if len(order) else ()
        return self._batches(groups, torch.device(device), workers)

    @abstractmethod
    def _batches(
        self, groups: Sequence[Tensor], device: torch.device, workers: int
    ) -> Iterator[Batch]:
        """One batch for each group of valid positions."""

    @abstractmethod
    def to(self, device: str | torch.device) -> Dataset:
        """This data set with its images on `device`; unchanged if they are decoded on demand."""


class MemoryImages(Dataset):
    """All images as one uint8 tensor [N, C, H, W] on any device.

    Sample ids are the row numbers unless given. Raises DataError for a wrong dtype or shape, a
    label out of range, or a sample id that occurs twice.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        class_names: Sequence[str],
        sample_ids: Tensor | None = None,
        name: str = "memory",
        split: str = "train",
        fingerprint: str | None = None,
    ) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise DataError(
                f"images must be a uint8 tensor [N, C, H, W], "
                f"got {images.dtype} of shape {tuple(images.shape)}"
            )
        if sample_ids is None:
            sample_ids = torch.arange(len(images))
        self.name, self.split, self.class_names = name, split, tuple(class_names)
        self.labels, self.sample_ids = labels.cpu(), sample_ids.cpu()
        check_rows(self.labels, self.sample_ids, self.class_names, len(images), name)
        self.image_shape = (images.shape[1], images.shape[2], images.shape[3])
        self.images = images
        self.fingerprint = fingerprint or _fingerprint_of_pixels(self)

    def _batches(
        self, groups: Sequence[Tensor], device: torch.device, workers: int
    ) -> Iterator[Batch]:
        home = self.images.device
        columns = (self.images, self.labels.to(home), self.sample_ids.to(home))
        for positions in groups:
            here = positions.to(home)
            yield Batch(*(column.index_select(0, here).to(device) for column in columns))

    def to(self, device: str | torch.device) -> MemoryImages:
        other = copy.copy(self)
        other.images = self.images.to(device)
        return other


def check_rows(
    labels: Tensor, sample_ids: Tensor, class_names: Sequence[str], n: int, where: object
) -> None:
    """DataError unless labels and sample ids are int64 [n], in range (-1: unknown), and unique."""
    if n == 0:
        raise DataError(f"{where} holds no images")
    for name, tensor in (("labels", labels), ("sample_ids", sample_ids)):
        if tensor.dtype != torch.int64 or tensor.shape != (n,):
            raise DataError(
                f"{where}: {name} must be int64 of shape ({n},), one per image, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    wrong = torch.nonzero((labels < -1) | (labels >= len(class_names))).flatten()
    if len(wrong):
        row = int(wrong[0])
        known = f"outside 0..{len(class_names) - 1}" if class_names else "of a set without classes"
        raise DataError(
            f"{where}: label {int(labels[row])} of row {row} is {known} "
            f"({len(class_names)} classes; {len(wrong)} such rows); "
            "labels must be class indices, or -1 where they are unknown"
        )
    ids, counts = torch.unique(sample_ids, return_counts=True)
    if len(ids) < n:
        twice = ids[counts > 1]
        raise DataError(f"{where}: sample id {int(twice[0])} occurs more than once")


def numbered_classes(labels: Sequence[Tensor], where: object) -> tuple[str, ...]:
    """Class names "0", "1", ... up to the largest label, for data that store none.

    Raises DataError if the labels do not look like class indices.
    """
    rows = sum(len(part) for part in labels)
    largest = max((int(part.max()) for part in labels if len(part)), default=-1)
    # Class indices leave few gaps. The bound keeps one wrong label from filling the memory with
    # names; few rows of ImageNet's thousand classes must pass it.
    if largest >= max(1000, 10 * rows):
        raise DataError(
            f"{where}: the largest label is {largest} in {rows} rows, so the labels do not look "
            "like class indices 0..C-1; renumber them, or store the class names"
        )
    return tuple(str(label) for label in range(largest + 1))


def nfc(name: str) -> str:
    """The composed form (Unicode NFC) of a class name: names that look equal are equal in it."""
    return unicodedata.normalize("NFC", name)


def composed(names: Iterable[str], where: object) -> dict[str, str]:
    """Class names by their composed form; DataError if two different ones have the same."""
    by_form: dict[str, str] = {}
    for name in names:
        if by_form.setdefault(form := nfc(name), name) != name:
            raise DataError(
                f"{where} {by_form[form]!a} and {name!a} look equal and differ only in how their "
                "characters are encoded (Unicode normalisation); rename one"
            )
    return by_form


def unreadable(path: Path, kind: str, error: Exception) -> DataError:
    """The error for a file of images that its reader refuses with `error`."""
    reason = LFS_POINTER if holds_lfs_pointer(path) else " ".join(str(error).split())
    return DataError(f"{path}: cannot be read as {kind} file ({reason})")


def warn_of_copies(digests: bytes, where: Callable[[int], str]) -> None:
    """Warn if images have the same content, given their 16-byte hashes one after another.

    `where` names the image at a position.
    """
    hashes = np.frombuffer(digests, "V16")
    _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    original = first[which]
    copies = np.flatnonzero(original != np.arange(len(hashes)))
    if len(copies):
        warn(
            f"{len(copies)} of {len(hashes)} images are copies of others (first: "
            f"{where(int(copies[0]))} of {where(int(original[copies[0]]))}); copies count "
            "more than once, and a contrastive loss pushes them apart",
            stacklevel=5,
        )


def fingerprint_of(
    labels: Tensor, sample_ids: Tensor, class_names: Sequence[str]
) -> xxhash.xxh3_128:
    """A hash object fed with class names, labels and sample ids; the caller adds the images."""
    digest = xxhash.xxh3_128()
    digest.update(json.dumps(list(class_names)).encode())
    digest.update(labels.numpy().astype("<i8").tobytes())
    digest.update(sample_ids.numpy().astype("<i8").tobytes())
    return digest


def _fingerprint_of_pixels(data: MemoryImages) -> str:
    digest = fingerprint_of(data.labels, data.sample_ids, data.class_names)
    digest.update(json.dumps(data.image_shape).encode())
    digest.update(data.images.cpu().contiguous().numpy().data)
    return digest.hexdigest()
