"""Which part of the data is "train" and which is "test"."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
import xxhash
from torch import Tensor

from ckd.data.dataset import DataError

# In order of preference: a data set with both a test and a validation part is tested on "test".
NAMES_ON_DISK = {
    "train": ("train", "training"),
    "test": ("test", "testing", "validation", "valid", "val"),
}
ALL_NAMES = tuple(name for names in NAMES_ON_DISK.values() for name in names)


def name_in(path: str) -> str | None:
    """The split name in a relative path ("data/train-00000-of-00004.parquet": "train"), if any."""
    words = re.split(r"[^a-z]+", path.lower())
    return next((word for word in reversed(words) if word in ALL_NAMES), None)


def choose(present: Iterable[str], split: str) -> str | None:
    """The first name in NAMES_ON_DISK[split] that is among those present, or None."""
    present = set(present)
    return next((name for name in NAMES_ON_DISK[split] if name in present), None)


def holdout_positions(sample_ids: Tensor, split: str, holdout: float) -> Tensor:
    """Positions (int64) of the rows of `split` in data that has no splits of its own.

    A row belongs to "test" if the hash of its sample id, divided by 2^64, is below `holdout`:
    adding or removing other images never moves it.
    """
    below = int(holdout * 2**64)
    held_out = torch.tensor(
        [xxhash.xxh3_64_intdigest(str(i).encode()) < below for i in sample_ids.tolist()],
        dtype=torch.bool,
    )
    positions = torch.nonzero(held_out if split == "test" else ~held_out).flatten()
    if len(positions) == 0:
        raise DataError(
            f"with holdout {holdout} none of the {len(sample_ids)} images is in the {split} split; "
            "choose another holdout, or lay the splits out in folders or files of their own"
        )
    return positions
