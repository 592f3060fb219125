"""Bad input to an evaluation: banks that do not fit, students and data that do not say enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ckd._errors import ConfigError
from ckd.bank import BankError, BankWriter, EmbeddingBank
from ckd.cli.command import parse
from ckd.data import DataError, MemoryImages
from ckd.eval.__main__ import Eval
from ckd.models import ModelError, Student
from tests.bad_input import Case
from tests.eval_tools import CLASSES, DIM, Setting, evaluated, setting, student_with
from tests.train_runs import tiny_data, tiny_teacher


def bank_of(
    path: Path, ids: Any, *, dim: int = DIM, labels: Any = None, **settings: Any
) -> EmbeddingBank:
    """A bank of ones with these ids."""
    with BankWriter(path, dim, **settings) as writer:
        writer.write(ids, torch.ones(len(ids), dim), labels)
    return EmbeddingBank.open(path)


def with_bank(
    which: str, of: str = "train", shift: int = 0, **settings: Any
) -> Callable[[Path], Any]:
    """An evaluation whose bank or test_bank has the images of a split, but other settings."""

    def call(tmp_path: Path) -> Any:
        given = setting(tmp_path)
        data = getattr(given, of)
        labels = (data.labels + shift) % len(CLASSES)
        bank = bank_of(tmp_path / "other", data.sample_ids, labels=labels, **settings)
        given = given._replace(test_bank=None)._replace(**{which: bank})
        return evaluated(student_with("head"), given)

    return call


def of_other_data(which: str) -> Callable[[Path], Any]:
    def call(tmp_path: Path) -> Any:
        given, other = setting(tmp_path / "a"), setting(tmp_path / "b", seed=1)
        return evaluated(student_with("head"), given._replace(**{which: getattr(other, which)}))

    return call


def with_texts(
    rows: int, labels: Sequence[int] | None = None, **settings: Any
) -> Callable[[Path], Any]:
    def call(tmp_path: Path) -> Any:
        given = setting(tmp_path)
        known = torch.full((rows,), -1) if labels is None else torch.tensor(labels)
        texts = bank_of(tmp_path / "texts", torch.arange(rows), labels=known, **settings)
        return evaluated(student_with("head"), given, texts=texts)

    return call


def several_maps(tmp_path: Path, names: Sequence[str] = "uv", **options: Any) -> Any:
    maps = [student_with("head", name=name).teachers[0] for name in names]
    return evaluated(Student(student_with("none").model, maps), setting(tmp_path), **options)


def changed(change: Callable[[Setting], Setting]) -> Callable[[Path], Any]:
    return lambda tmp_path: evaluated(student_with("head"), change(setting(tmp_path)))


def other_classes(given: Setting) -> Setting:
    images, labels = given.test.images, given.test.labels
    return given._replace(test=MemoryImages(images, labels, class_names=("x", "y", "z")))


def not_finite(tmp_path: Path) -> Any:
    student = student_with("head")
    student.model.channel_std.fill_(0)
    return evaluated(student, setting(tmp_path))


def not_finite_in_the_teachers_space(tmp_path: Path) -> Any:
    student = student_with("head")
    student.teachers[0].head.sigma.fill_(3e38)
    return evaluated(student, setting(tmp_path), figures=("own_row_recall_1",))


def command(*argv: str) -> Callable[[Path], Any]:
    """`ckd eval` of a student's file."""

    def call(tmp_path: Path) -> Any:
        tiny_data(tmp_path)
        given = [part.replace("TMP", str(tmp_path)) for part in argv]
        parse(Eval, [str(tiny_teacher(tmp_path)), *given], "ckd eval").run()

    return call


CASES = [
    Case("bank of other data", of_other_data("bank"), BankError,
         ("fingerprint", "this data has", "build a bank of this data")),
    Case("test bank of other data", of_other_data("test_bank"), BankError, ("fingerprint",)),
    Case("bank of other classes", with_bank("bank", class_names=("ant", "bee", "dog")), BankError,
         ("class 2 is 'dog'", "'cat' in the data")),
    Case("bank of other ids", with_bank("bank", shift=1), BankError,
         ("has other ids than memory (train)", "build the bank from this data")),
    Case("bank of the test images", with_bank("bank", of="test"), BankError,
         ("is not in the bank", "built from other data")),
    Case("test bank of another width", with_bank("test_bank", of="test", dim=5), BankError,
         ("the test bank", "width 5", "of 12")),
    Case("test bank of another teacher", with_bank("test_bank", of="test", teacher="u"), BankError,
         ("of different teachers", "ckd bank info")),
    Case("bank of a teacher of another width", with_bank("bank", dim=5), BankError,
         ("width 5", "the student was trained with a teacher of width 12")),
    Case("texts of other classes", with_texts(3, class_names=("ant", "bee", "dog")), BankError,
         ("has 3 classes (ant, bee, dog, ...)", "not the 3 of the data")),
    Case("fewer texts than classes", with_texts(2), BankError,
         ("has 2 classes", "it needs a row for each")),
    Case("a class without a text", with_texts(2, [0, 2], class_names=CLASSES), BankError,
         ("class 1 ('bee') has no row",)),
    Case("texts of another width", with_texts(3, dim=5), BankError,
         ("the bank of texts", "width 5", "of 12")),
    Case("splits of other classes", changed(other_classes), DataError, ("have other classes",)),
    Case("several maps fit the bank", several_maps, ConfigError, ("2 maps", "width 12", "teacher")),
    Case("several maps of the bank's teacher", lambda tmp_path: several_maps(tmp_path, "tt"),
         ConfigError, ("2 maps", "width 12", "teacher")),
    Case("number of no map", lambda tmp_path: several_maps(tmp_path, teacher=2), ConfigError,
         ("from 0 and below 2, got 2",)),
    Case("number of a map of a student without one",
         lambda tmp_path: evaluated(student_with("none"), setting(tmp_path), teacher=0),
         ConfigError, ("below 0, got 0",)),
    Case("fraction of the labels above one",
         lambda tmp_path: evaluated(student_with("head"), setting(tmp_path), label_fraction=1.5),
         DataError, ("fraction must be from 0 to 1, got 1.5",)),
    Case("embeddings that are not finite", not_finite, ModelError,
         ("memory (test) is not finite", "sample_id")),
    Case("embeddings that are not finite in the teacher's space", not_finite_in_the_teachers_space,
         ModelError, ("memory (test) is not finite", "sample_id")),
    Case("a file without data", command(), ConfigError, ("teacher.safetensors", "--data")),
    Case("a place for the JSON that is not there", command("--out", "TMP/no/x.json"), ConfigError,
         ("--out", "there is no folder", "make it")),
    Case("a folder in place of the JSON", command("--out", "TMP"), ConfigError,
         ("--out", "no regular file", "name another")),
    Case("images of no pixel", command("--data", "TMP/tiny.npz", "--image-size", "0"), DataError,
         ("image_size must be at least 1, got 0",)),
    Case("a bank that is not there", command("--bank", "TMP/no"), BankError, ("is not a bank",)),
    Case("no such device", command("--device", "gpu"), ConfigError, ("--device must be auto",)),
]  # fmt: skip
