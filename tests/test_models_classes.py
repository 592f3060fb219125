from __future__ import annotations

import pytest

from ckd.models import are_named, class_order


@pytest.mark.parametrize(
    ("theirs", "ours", "order"),
    [
        (["dog", "cat"], ["cat", "dog"], [1, 0]),
        (["cat", "dog"], ["cat", "dog"], [0, 1]),
        (["Bull_Frog", "sea-lion"], ["sea lion", "bull frog"], [1, 0]),
        (["caf\N{LATIN SMALL LETTER E WITH ACUTE}", "bar"], ["bar", "cafe\u0301"], [1, 0]),
        (["tench, Tinca tinca", "goldfish, Carassius auratus"], ["goldfish", "tench"], [1, 0]),
    ],
)
def test_classes_are_matched_by_name(theirs: list[str], ours: list[str], order: list[int]) -> None:
    assert class_order([theirs], ours) == order


def test_any_vocabulary_may_match() -> None:
    ids, words = ["n02", "n01"], ["goldfish", "tench"]
    assert class_order([words, ids], ["n01", "n02"]) == [1, 0]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (["cat", "dog"], ["cat", "cow"]),
        (["cat", "dog", "cow"], ["cat", "dog"]),
        (["cat", "dog"], ["cat", "dog", "cow"]),
        (["cat", "Cat"], ["cat", "dog"]),
        # ImageNet has two cranes: the first synonym alone does not tell them apart.
        (["crane, bird", "crane, machine"], ["crane", "crane "]),
        ([], []),
    ],
)
def test_names_that_do_not_match_one_to_one(theirs: list[str], ours: list[str]) -> None:
    assert class_order([theirs], ours) is None


def test_numbers_are_no_names() -> None:
    assert are_named(["cat", "dog"])
    assert are_named(["1", "0"])
    assert not are_named(["0", "1", "2"])
    assert not are_named([])
