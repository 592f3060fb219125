"""Calls of `ckd.models` that are natural and wrong: each error says what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import ckd
from ckd import models
from ckd.models import ModelError, Prediction, Student
from tests.model_files import NAMES
from tests.test_models_student import student_file

PHOTO = np.zeros((9, 7, 3), np.uint8)


@pytest.fixture
def student(tmp_path: Path) -> Student:
    student_file(tmp_path / "student.safetensors", [{}])
    return ckd.load_student(tmp_path)


MISTAKES: dict[str, tuple[Callable[[Student], Any], str]] = {
    "prepare: images first": (
        lambda s: models.prepare(torch.zeros(1, 3, 8, 8), s.model),  # type: ignore[arg-type]
        "model first and the images second",
    ),
    "prepare: a student": (
        lambda s: models.prepare(s, torch.zeros(1, 3, 8, 8, dtype=torch.uint8)),  # type: ignore[arg-type]
        "got Student; pass its .model",
    ),
    "prepare: a path": (
        lambda s: models.prepare("runs/a", torch.zeros(1, 3, 8, 8)),  # type: ignore[arg-type]
        "got str 'runs/a'; load one with ckd.models.load",
    ),
    "prepare: another network": (
        lambda s: models.prepare(nn.Linear(1, 1), torch.zeros(1)),  # type: ignore[arg-type]
        "got Linear; make it one of ckd.models.create",
    ),
    "prepare: floats": (
        lambda s: models.prepare(s.model, torch.zeros(1, 3, 8, 8)),
        "got torch.float32 of shape [1, 3, 8, 8]; prepare scales and normalises",
    ),
    "prepare: one image": (
        lambda s: models.prepare(s.model, torch.zeros(3, 8, 8, dtype=torch.uint8)),
        "images[None]",
    ),
    "prepare: channels last": (
        lambda s: models.prepare(s.model, torch.zeros(1, 8, 8, 3, dtype=torch.uint8)),
        "permute(0, 3, 1, 2)",
    ),
    "prepare: an array": (
        lambda s: models.prepare(s.model, PHOTO),  # type: ignore[arg-type]
        "got uint8 of shape [9, 7, 3]; convert arrays",
    ),
    "preprocess: a path": (lambda s: s.preprocess("a.png"), "got str 'a.png'; open the file"),
    "preprocess: floats": (
        lambda s: s.preprocess(torch.zeros(1, 3, 8, 8)),
        "got torch.float32 of shape [1, 3, 8, 8]; pass the pixels 0..255",
    ),
    "preprocess: channels last": (
        lambda s: s.preprocess(torch.zeros(2, 9, 8, 3, dtype=torch.uint8)),
        "channels come second",
    ),
    "preprocess: channels first": (
        lambda s: s.preprocess(torch.zeros(3, 9, 8, dtype=torch.uint8)),
        "add the batch's dimension",
    ),
    "logits: not preprocessed": (
        lambda s: s.logits(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)),
        "got torch.uint8 of shape [1, 3, 8, 8]; use",
    ),
    "logits: a photo": (lambda s: s.logits(Image.fromarray(PHOTO)), "student's own preprocess"),  # type: ignore[arg-type]
    "predict: no class": (lambda s: s.predict(PHOTO, top=0), "top must be at least 1, got 0"),
    "save: the path first": (
        lambda s: models.save("a.safetensors", s.model),  # type: ignore[arg-type]
        "the model of ckd.models.save must be a ckd.models.Model, got str 'a.safetensors'",
    ),
    "load: a model": (lambda s: models.load(s.model), "source must be a path or the name"),  # type: ignore[arg-type]
    "class_head: a path": (lambda s: models.class_head("a"), "ckd.models.class_head must be"),  # type: ignore[arg-type]
    "check_teacher: a student": (lambda s: models.check_teacher(s), "pass its .model"),  # type: ignore[arg-type]
    "flops_per_image: a student": (lambda s: models.flops_per_image(s), "pass its .model"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_natural_mistake_is_told_with_its_remedy(name: str, student: Student) -> None:
    call, says = MISTAKES[name]
    with pytest.raises(ModelError) as caught:
        call(student)
    assert says in str(caught.value)


def test_a_folder_without_a_student_says_where_one_is(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nor is there a file or run folder of that name"):
        ckd.load_student(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="pass a finished run's folder"):
        ckd.load_student(tmp_path)
    run = tmp_path / "my run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"not finished: go on with ckd train --resume '.*my run'"):
        ckd.load_student(run)
    student_file(run / "student.safetensors", [])
    with pytest.raises(ModelError, match=r"pass a run in it, such as .*my run$"):
        ckd.load_student(tmp_path)


def test_a_student_tells_what_it_takes_and_gives(student: Student) -> None:
    assert (student.image_size, student.in_channels, student.num_classes) == (8, 3, 3)
    assert (student.mean, student.std) == ((0.5,) * 3, (0.5,) * 3)
    assert student.device == torch.device("cpu")
    assert repr(student) == (
        f"Student({student.spec!r}, images 3 x 8 x 8, 3 classes; teachers: 'a teacher' [12] by a "
        "head)"
    )


def test_predictions_are_the_softmax_of_the_logits(student: Student) -> None:
    photos = [PHOTO, PHOTO + 200, PHOTO + 90]
    expected = student.logits(student.preprocess(photos)).double().softmax(dim=1)
    student.train()
    predicted = student.predict(photos)
    assert student.training
    for row, probabilities in zip(predicted, expected):
        assert [one.label for one in row] == probabilities.argsort(descending=True).tolist()
        assert [one.class_name for one in row] == [NAMES[one.label] for one in row]
        torch.testing.assert_close(
            torch.tensor([one.probability for one in row]).double(),
            probabilities.sort(descending=True).values,
        )
    assert [len(row) for row in student.predict(photos, top=2)] == [2, 2, 2]


def test_of_equal_probabilities_the_smaller_number_comes_first_and_numbers_are_names(
    tmp_path: Path,
) -> None:
    model = models.create("resnet8:width=4", num_classes=3, image_size=8).eval()
    head: Any = model.classifier
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    third = pytest.approx(1 / 3)
    assert Student(model).predict(PHOTO, top=2) == [
        [Prediction(0, "0", third), Prediction(1, "1", third)]
    ]
