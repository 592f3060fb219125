"""Which part of the data is "train" and which is "test"."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
import xxhash
from torch import Tensor

from ckd.data.dataset import DataError, MissingSplit

# Groups of synonyms in order of preference: a data set with both a test and a validation part is
# tested on "test".
NAMES_ON_DISK = {
    "train": (("train", "training"),),
    "test": (("test", "testing"), ("validation", "valid", "val")),
}
ALL_NAMES = tuple(
    name for groups in NAMES_ON_DISK.values() for synonyms in groups for name in synonyms
)


def name_in(path: str) -> str | None:
    """The split name in a relative path ("data/train-00000-of-00004.parquet": "train"), if any."""
    return name_and_rest(path)[0]


def name_and_rest(path: str) -> tuple[str | None, str]:
    """The last word that is a split's name, and the path with * in its place, in lower case.

    None for the word if its folder or file is named after both splits (train_val_images).
    """
    path = path.lower()
    for word in reversed(list(re.finditer("[a-z]+", path))):
        if word[0] in ALL_NAMES:
            start, end = path.rfind("/", 0, word.start()) + 1, path.find("/", word.end())
            words = {*re.findall("[a-z]+", path[start : None if end < 0 else end])}
            if all(words & {*sum(groups, ())} for groups in NAMES_ON_DISK.values()):
                return None, path
            return word[0], f"{path[: word.start()]}*{path[word.end() :]}"
    return None, path


def choose(present: Iterable[str], split: str, where: object) -> str | None:
    """The first name in NAMES_ON_DISK[split] that is among those present, or None.

    Raises DataError if a synonym of it is there too: one of them would be left out unnoticed.
    """
    present = set(present)
    for synonyms in NAMES_ON_DISK[split]:
        found = [name for name in synonyms if name in present]
        if len(found) > 1:
            raise DataError(
                f"{where} has both {' and '.join(found)}, which name the same split; "
                "remove or rename one"
            )
        if found:
            return found[0]
    return None


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
        raise MissingSplit(
            f"with holdout {holdout} none of the {len(sample_ids)} images is in the {split} split; "
            "choose another holdout, or lay the splits out in folders or files of their own"
        )
    return positions
