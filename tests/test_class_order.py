"""A teacher's classes are compared with those of the data by name, wherever its logits count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ckd import data, models
from ckd.bank.build import build_bank
from ckd.train import CheckpointError, Config, ConfigError, train
from ckd.train.__main__ import parse
from ckd.train.evaluation import evaluate_source, logit_order
from tests.train_runs import STUDENT, tiny_config


def reordered(config: Config, names: list[str], order: list[int]) -> Path:
    """The teacher of `config`, whose logit i is now that of class order[i], called names[i]."""
    model = models.load(config.teacher)
    head = model.head
    with torch.no_grad():
        head.weight.copy_(head.weight[order].clone())
        head.bias.copy_(head.bias[order].clone())
    path = Path(config.teacher).with_name("reordered.safetensors")
    models.save(model, path, class_names=names)
    return path


def final_weights(config: Config) -> str:
    train(config, verbose=False)
    return models.weights_hash(models.load(config.folder))


ORDER = [2, 0, 1]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny_config(tmp_path, method="logit-kd", epochs=1)


@pytest.fixture
def permuted(config: Config) -> Config:
    path = reordered(config, [f"Class_{c}" for c in ORDER], ORDER)
    return replace(config, teacher=str(path), out=f"{config.out}-permuted")


def test_a_teacher_with_permuted_classes_trains_the_same_student(config, permuted) -> None:
    assert final_weights(permuted) == final_weights(config)


def test_eval_scores_permuted_classes_the_same(config, permuted) -> None:
    scores = [
        str(evaluate_source(c, str(c.teacher))).partition(", ")[0] for c in (config, permuted)
    ]
    assert scores[0].partition(" on ")[2] == scores[1].partition(" on ")[2]


def test_the_accuracy_that_a_build_prints_is_that_of_the_named_classes(
    config, permuted, tmp_path, capsys
) -> None:
    dataset, told = data.load(config.data), []
    for number, c in enumerate((config, permuted)):
        build_bank(dataset, models.load(c.teacher), tmp_path / f"b{number}")
        told.append(capsys.readouterr().out.splitlines()[-1])
    assert told[0].startswith("the teacher's own accuracy")
    assert told[0] == told[1]


def test_classes_of_other_names_are_refused(config: Config) -> None:
    path = reordered(config, ["cat", "dog", "cow"], ORDER)
    other = replace(config, teacher=str(path))
    for use in (lambda: train(other, verbose=False), lambda: evaluate_source(other, str(path))):
        with pytest.raises(ConfigError, match=r"cat, dog, cow.*class 0.*--teacher-classes"):
            use()


def test_names_of_the_teachers_classes_in_a_file(config: Config, tmp_path: Path) -> None:
    path = reordered(config, ["cat", "dog", "cow"], ORDER)
    file = tmp_path / "names.txt"
    file.write_text("".join(f"class {c}\n" for c in ORDER))
    named = replace(config, teacher=str(path), teacher_classes=str(file), out=f"{config.out}-named")
    assert final_weights(named) == final_weights(config)
    file.write_text("class 0\nclass 1\n")
    with pytest.raises(ConfigError, match=r"names\.txt has 2 names, .* tells 3 classes apart"):
        train(replace(named, out=f"{config.out}-short"), verbose=False)


def test_the_students_own_classes_count_when_its_run_is_scored(config, permuted, tmp_path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("".join(f"class {c}\n" for c in ORDER))
    train(replace(permuted, teacher_classes=str(file)), verbose=False)
    train(config, verbose=False)
    scores = []
    for run in (config.out, permuted.out):
        command = parse(["--eval", run])
        scores.append(
            str(evaluate_source(command.config, run)).partition(" on ")[2].partition(", ")[0]
        )
    assert scores[0] == scores[1]


def test_a_resume_needs_the_same_order(config: Config, tmp_path: Path) -> None:
    path, file = reordered(config, ["cat", "dog", "cow"], ORDER), tmp_path / "names.txt"
    named = replace(config, teacher=str(path), teacher_classes=str(file), epochs=2)
    file.write_text("".join(f"class {c}\n" for c in ORDER))
    train(named, verbose=False)
    (named.folder / "result.json").unlink()
    file.write_text("".join(f"class {c}\n" for c in range(3)))
    with pytest.raises(CheckpointError, match="order of the teacher's classes"):
        train(named, resume=True, verbose=False)


def test_numbers_are_matched_as_names(tmp_path: Path) -> None:
    """Folders called 0 to 11 are sorted as text: 0, 1, 10, 11, 2, ..."""
    for number in range(12):
        for split in ("train", "test"):
            folder = tmp_path / "data" / split / str(number)
            folder.mkdir(parents=True)
            Image.new("L", (8, 8), number).save(folder / "1.png")
    dataset = data.load(tmp_path / "data")
    teacher = models.create(STUDENT, num_classes=12, image_size=8)
    teacher.class_names = tuple(map(str, range(12)))
    order = logit_order(Config(), "teacher", teacher, dataset, torch.device("cpu"))
    assert [teacher.class_names[i] for i in order] == list(dataset.class_names)
    teacher.class_names = ()
    file = tmp_path / "names.txt"
    file.write_text("\n".join(map(str, range(12))))
    named = Config(teacher_classes=str(file))
    assert torch.equal(logit_order(named, "t", teacher, dataset, torch.device("cpu")), order)
    file.write_text("\n".join("abcdefghijkl"))
    with pytest.raises(ConfigError, match="--teacher-classes"):
        logit_order(named, "t", teacher, dataset, torch.device("cpu"))


@pytest.mark.parametrize("unnamed", ["teacher", "data"])
def test_classes_without_names_give_a_warning(config: Config, tmp_path: Path, unnamed) -> None:
    if unnamed == "teacher":
        config = replace(config, teacher=str(reordered(config, [], [0, 1, 2])))
    else:
        arrays = dict(np.load(config.data))
        del arrays["class_names"]
        np.savez(config.data, **arrays)
    with pytest.warns(UserWarning, match=r"does not name its classes.*--teacher-classes"):
        train(config, verbose=False)
