"""The data and banks of labels.py, made once in its folder."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ckd import data
from ckd._files import atomic_write
from ckd.bank.build import build_bank
from ckd.neighbours import build_neighbours
from students.teachers import teacher

IMAGES = "images.npz"


def write_images(spec: str, images: int | None, test_images: int | None, folder: Path) -> Path:
    """Decode the data set into an .npz, so that every process reads it quickly.

    images, test_images: that many, from the first on; None: all.
    """
    path = folder / IMAGES
    if not path.exists():
        train, test = data.load(spec, "train"), data.load(spec, "test")
        _write(path, _arrays(train, slice(images)), _arrays(test, slice(test_images)), train)
    return path


def labelled_images(images: Path, percent: float, seed: int) -> Path:
    """The data of plain training: the images that have a label under `percent` and `seed`, each
    repeated until there are as many as in `images`, so that an epoch takes as many steps."""
    if percent == 100:
        return images
    path = images.with_name(f"labelled-{percent:g}-seed{seed}.npz")
    if not path.exists():
        train, test = data.load(images), data.load(images, "test")
        kept = data.keep_labels(train, percent / 100, seed).labels
        rows = (kept >= 0).nonzero().flatten()
        rows = rows.repeat(-(-len(train) // len(rows)))[: len(train)]
        _write(path, _arrays(train, rows), _arrays(test, slice(None)), train)
    return path


def write_banks(
    images: Path, device: str, batch_size: int, named: tuple[str, Path | None]
) -> Iterator[bool]:
    """Make the banks of a teacher (a spec and its weights): of the training images, with neighbours
    for the term soft, and of the test images; complete ones stay as they are. Yields whether it has
    a class head of the data's classes."""
    tqdm.set_lock(threading.RLock())  # not a semaphore, which outlives a killed worker
    spec, weights = named
    model, banks = teacher(spec, weights), []
    for split in ("train", "test"):
        dataset = data.load(images, split)
        banks.append(
            build_bank(
                dataset,
                model,
                bank_folder(images.parent, spec, split),
                batch_size=batch_size,
                device=device,
                rows_per_shard=len(dataset),  # a step looks its rows up in one file
            )
        )
    # The term soft takes the exact mean rows, beside which the nearest rows are of no use.
    build_neighbours(banks[0].path, k=1, exact=True, device=device)
    head = banks[0].class_head()
    yield head is not None and head.num_classes == len(dataset.class_names)


def bank_folder(folder: Path, spec: str, split: str) -> Path:
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in spec)
    return folder / f"{name}-{split}"


def _arrays(dataset: Any, rows: Any) -> tuple[np.ndarray, np.ndarray]:
    images = dataset.images[rows]
    return images.numpy(), dataset.labels[rows].numpy()


def _write(path: Path, train: Any, test: Any, dataset: data.Dataset) -> None:
    file = io.BytesIO()
    names = ("train_images", "train_labels", "test_images", "test_labels")
    np.savez(
        file,
        **dict(zip(names, (*train, *test))),
        class_names=np.array(dataset.class_names),
    )
    atomic_write(path, file.getvalue())
