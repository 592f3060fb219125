"""Whether the banks of an evaluation fit the data, the student and one another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ckd import models
from ckd._errors import ConfigError
from ckd.bank import BankError, ClassHead, EmbeddingBank
from ckd.data import Dataset
from ckd.eval.comparison import Missing
from ckd.models import Student


def check_rows(bank: EmbeddingBank, dataset: Dataset) -> None:
    """Raise BankError unless the bank has a row of every image, and its label where both have one,
    and is not known to be made of other data."""
    bank.check(class_names=dataset.class_names, fingerprint=dataset.fingerprint)
    bank.check_rows(dataset.sample_ids, dataset.labels, f"{dataset.name} ({dataset.split})")


def check_fits(
    bank: EmbeddingBank | None, test_bank: EmbeddingBank | None, texts: EmbeddingBank | None
) -> None:
    """Raise BankError unless the rows of all banks have one width, and those of images one teacher,
    as far as they say."""
    for name, other in (("test bank", test_bank), ("bank of texts", texts)):
        if bank is None or other is None:
            continue
        if other.dim != bank.dim:
            raise BankError(
                f"the {name} {other.path} has rows of width {other.dim}, the bank {bank.path} of "
                f"{bank.dim}; make both with one teacher"
            )
        theirs, ours = (b.meta["teacher"] or {} for b in (other, bank))
        if other is test_bank and any(theirs[x] != ours[x] for x in theirs.keys() & ours.keys()):
            raise BankError(
                f"the {name} {other.path} and the bank {bank.path} are of different teachers (see "
                "ckd bank info); make both with one teacher"
            )


def map_number(student: Student, bank: EmbeddingBank, given: int | None) -> int | None:
    """Which of the student's maps belongs to the bank: the `given` one, or the one of its teacher's
    name, or the only one of its width; None if the student has no map.

    Raises BankError if no map has the bank's width, ConfigError if that leaves several, or for a
    number of no map.
    """
    teachers = student.teachers
    if given is not None and not 0 <= given < len(teachers):
        raise ConfigError(
            f"teacher must be the number of a map of the student, from 0 and below "
            f"{len(teachers)}, got {given}"
        )
    if not teachers:
        return None
    candidates = range(len(teachers)) if given is None else [given]
    fitting = [number for number in candidates if teachers[number].dim == bank.dim]
    if not fitting:
        widths = ", ".join(f"{teachers[number].dim}" for number in candidates)
        raise BankError(
            f"the bank {bank.path} has rows of width {bank.dim}, the student was trained with a "
            f"teacher of width {widths}; name a bank of its own teacher"
        )
    named = [number for number in fitting if teachers[number].name == bank.teacher_name]
    if len(named or fitting) > 1:
        raise ConfigError(
            f"the student has {len(named or fitting)} maps to teachers of width {bank.dim}; name "
            "that of this bank by its number, from 0, with teacher"
        )
    return (named or fitting)[0]


def class_order(what: str, of: Any, class_names: Sequence[str]) -> Tensor:
    """int64 [C]: which of the classes of a model or class head `of` is each class of the data.

    Without names on one side, the same order is taken. Raises Missing for other classes.
    """
    names, count = of.class_names, of.num_classes
    if not class_names:
        raise Missing("the data has no classes")
    if order := models.class_order((names, *of.other_class_names), class_names):
        return torch.tensor(order)
    named = models.are_named(names) and models.are_named(class_names)
    if named or count != len(class_names):
        theirs = f" ({', '.join([*names[:3], '...'])})" if names else ""
        raise Missing(
            f"{what} has {count} classes{theirs}, which are not the {len(class_names)} of the data"
        )
    return torch.arange(count)


def class_texts(texts: EmbeddingBank, class_names: Sequence[str]) -> Tensor:
    """The row of each class of the data, float32 [C, D]: the mean of those with its label, or,
    without labels, the rows one after another. Raises BankError if they are not of these classes.
    """
    labelled = bool((texts.labels >= 0).any())
    rows = texts.centroids() if labelled else texts.embeddings().float()
    try:
        head = ClassHead(rows, rows[:, 0], texts.class_names)
        return rows[class_order(f"the bank of texts {texts.path}", head, class_names)]
    except Missing as why:
        raise BankError(f"{why}; it needs a row for each, by label or in order") from why


def about_data(dataset: Dataset) -> dict[str, Any]:
    """What a report says of a data set."""
    return {
        "name": dataset.name,
        "split": dataset.split,
        "fingerprint": dataset.fingerprint,
        "images": len(dataset),
        "labelled": dataset.labelled,
    }


def about_bank(bank: EmbeddingBank | None) -> dict[str, Any] | None:
    """What a report says of a bank."""
    if bank is None:
        return None
    about = {"path": str(bank.path), "checksum": bank.checksum, "teacher": bank.teacher_name}
    return {**about, "rows": len(bank), "dim": bank.dim}
