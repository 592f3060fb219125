"""Compares the classes of a model with those of a data set, by name.

Two sources seldom number the same classes alike: folders are sorted, a model keeps the order of its
own training. Logits in another order are wrong without an error.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence


def class_order(names: Iterable[Sequence[str]], wanted: Sequence[str]) -> list[int] | None:
    """order[i]: which class of a model is class i of the data; None if the names do not match.

    names: the names of the model's classes, in one or several vocabularies (ImageNet has WordNet
    ids and descriptions). wanted: those of the data. Case, separators of words and the Unicode
    form do not matter; failing that, the names are compared up to their first comma ("tench, Tinca
    tinca" and "tench"). All names must match, one to one.
    """
    for vocabulary in names:
        for key in (_plain, _first_synonym):
            if order := _matched(vocabulary, wanted, key):
                return order
    return None


def are_named(names: Sequence[str]) -> bool:
    """Whether these are names, and not the numbers that classes without names get."""
    return len(names) > 0 and list(names) != [str(number) for number in range(len(names))]


def _matched(
    names: Sequence[str], wanted: Sequence[str], key: Callable[[str], str]
) -> list[int] | None:
    place = {key(name): position for position, name in enumerate(names)}
    keys = [key(name) for name in wanted]
    if len(names) == len(wanted) == len(place) and place.keys() == {*keys}:
        return [place[name] for name in keys]
    return None


def _plain(name: str) -> str:
    words = re.split(r"[\s_-]+", unicodedata.normalize("NFKC", name).casefold())
    return " ".join(filter(None, words))


def _first_synonym(name: str) -> str:
    return _plain(name.partition(",")[0])
