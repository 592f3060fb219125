"""Loads a data set by its name or path."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import torch

from ckd._console import bar
from ckd._files import check_regular, user_path
from ckd._hints import unknown
from ckd.data import arrays, folder, parquet, photo, splits, walk
from ckd.data.dataset import DataError, Dataset, MemoryImages, check_rows
from ckd.data.decode import EncodedImages, decode, decode_many
from ckd.data.stream import FileImages


def load(
    spec: str | Path,
    split: str = "train",
    *,
    image_size: int | None = None,
    holdout: float = 0.1,
    memory_limit: int = 2 << 30,
    max_pixels: int = photo.MAX_PIXELS,
) -> Dataset:
    """The `split` ("train" or "test") of a data set, labelled or not.

    `spec` is "digits" (comes with the package), an image folder, a Hugging Face parquet file or a
    folder of them at any depth, or an .npz file; `~` is the home folder. Validation data on disk
    serve as "test" if there is no test split. Data without splits are divided by a stable hash of
    the sample id, the fraction `holdout` going to "test".

    `image_size` cuts out the centre square and scales it to that size; without it all images must
    have the same size. Encoded images become RGB; arrays keep their channels. Encoded images that
    would take more than `memory_limit` bytes decoded are decoded on demand (FileImages) instead of
    once (MemoryImages).

    An encoded image of more than `max_pixels` is refused before it is decoded, as is an image file
    of more than 8 bytes for each of these plus 64 MiB.

    Warns of images with the same content within the split (unless the images exceed 2 GiB), and of
    folders that may not be meant as they are read.

    Images without labels have the label -1: those of files and folders without labels or classes,
    labels that are -1 or null, and image folders named `unlabelled` (`unlabeled`).

    Raises DataError, naming the file, for data that is missing or not as described; MissingSplit if
    the data set has no images of this split.
    """
    if split not in splits.NAMES_ON_DISK:
        raise DataError(unknown("split", split, splits.NAMES_ON_DISK))
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size must be at least 1, got {image_size}")
    if max_pixels < 1:
        raise DataError(f"max_pixels must be at least 1, got {max_pixels}")
    if not 0.0 <= holdout < 1.0:
        raise DataError(f"holdout must be at least 0 and below 1, got {holdout}")
    if spec == "digits":
        return arrays.load_digits(split, image_size)
    path = user_path(spec)
    try:
        if path.exists() and not path.is_dir():
            check_regular(path, follow=True)
            if path.suffix.lower() == ".npz":
                return arrays.load_npz(path, split, image_size, holdout)
        source = _open(path, split, holdout)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{error.filename or path}: {reason[:1].lower()}{reason[1:]}") from error
    source.max_pixels = max_pixels
    where = f"{path} ({split})"
    check_rows(source.labels, source.sample_ids, source.class_names, len(source), where)
    # resolve() gives "." the name of its folder.
    name = path.resolve().stem if path.is_file() else path.resolve().name
    with warnings.catch_warnings():
        photo.ignore_warnings()
        return _from_encoded(source, name, split, image_size, memory_limit)


def _open(path: Path, split: str, holdout: float) -> EncodedImages:
    if not path.exists():
        raise DataError(
            f"{unknown('data set', str(path), ['digits'])}; or the path of an image folder, of "
            "parquet files, or of an .npz file (no file or folder has this name)"
        )
    if path.is_dir():
        path = walk.hub_snapshot(path)
        holds_parquet = next(parquet.files_in(path), None) is not None
        source = parquet if holds_parquet else folder
        return source.open_split(path, split, holdout)
    if path.suffix.lower() == parquet.SUFFIX:
        return parquet.open_split(path, split, holdout)
    raise DataError(
        f"{path} is neither a .parquet nor an .npz file; pass one, or a folder of images"
    )


def _from_encoded(
    source: EncodedImages, name: str, split: str, image_size: int | None, memory_limit: int
) -> Dataset:
    channels, height, width = decode(source, 0, image_size).shape
    if len(source) * channels * height * width > memory_limit:
        return FileImages(source, name=name, split=split, image_size=image_size)
    lock = threading.Lock()
    with bar(f"decoding {name} ({split})", total=len(source), unit="images") as done:

        def decoded(count: int) -> None:
            with lock:
                done.update(count)

        images = decode_many(
            source,
            torch.arange(len(source)),
            image_size,
            (channels, height, width),
            decoded=decoded,
        )
    stored = MemoryImages(
        images,
        source.labels,
        class_names=source.class_names,
        sample_ids=source.sample_ids,
        name=name,
        split=split,
        fingerprint=source.fingerprint(),
    )
    stored.held_out = source.held_out
    return stored
