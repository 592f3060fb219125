"""`ckd eval`: its table, its JSON, and what it takes from a run."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from ckd import cli, data, models
from ckd._json import parse_object, unsealed
from ckd.bank import BankWriter, EmbeddingBank
from ckd.eval import evaluate_student
from ckd.eval.report import FIGURES, Figure, Report
from ckd.train import Config, train
from tests.train_runs import tiny_config, tiny_teacher

pytestmark = pytest.mark.usefixtures("quick_runs")


def trained(folder: Path, **settings: Any) -> Config:
    """A tiny run, trained on a fifth of the labels with seed 7."""
    options = {"distill": "cosine=1", "epochs": 1, "seed": 7, "label_fraction": 0.2}
    config = tiny_config(folder, **{**options, **settings})
    train(config, verbose=False)
    return config


def rows_of_tests(folder: Path, config: Config) -> Path:
    """Random rows of the test images."""
    images, path = data.load(config.data, "test"), folder / "test bank"
    with BankWriter(path, 12, class_names=images.class_names) as writer:
        rows = torch.randn(len(images), 12, generator=torch.Generator().manual_seed(1))
        writer.write(images.sample_ids, rows, images.labels)
    return path


def test_the_command_prints_a_table_and_writes_the_figures_of_the_function(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = trained(tmp_path), tmp_path / "figures.json"
    extra = str(rows_of_tests(tmp_path, config))
    argv = ["eval", str(config.folder), "--bank", config.bank[0], "--test-bank", extra]
    argv += ["--label-fraction", "0.3", "--device", "cpu"]
    assert cli.main([*argv, "--out", str(out)]) == 0
    printed, err = capsys.readouterr()
    assert err == ""  # no progress bar: this is no terminal

    report = evaluate_student(
        models.load_student(config.folder),
        *(data.load(config.data, split) for split in ("train", "test")),
        EmbeddingBank.open(config.bank[0]),
        test_bank=EmbeddingBank.open(extra),
        label_fraction=0.3,
        seed=7,  # the run's
        progress=False,
    )
    bytes_ = out.read_bytes()
    stored = unsealed(parse_object(bytes_), bytes_)
    assert stored == {"student": str(config.folder), **json.loads(json.dumps(report.to_dict()))}
    assert [figure["name"] for figure in stored["figures"]] == [*FIGURES]
    assert printed == f"{config.folder} on tiny\n\n{report.table()}\n"
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")]
    heads, _, *rows = [[cell.strip() for cell in row] for row in rows]
    assert heads == ["figure", "student", "teacher", "quotient", "queries", "gallery", "labels"]
    figure = report["knn_20"]
    assert figure.value is not None
    assert figure.teacher
    assert figure.quotient == figure.value / figure.teacher
    shown = [f"{figure.value:.2%}", f"{figure.teacher:.2%}", f"{figure.quotient:.3f}"]
    assert ["20-NN among teacher rows", *shown, "20", "27", "27"] in rows
    assert "without teacher's class head: the bank holds no class head" in printed

    again = tmp_path / "again.json"
    assert cli.main([*argv, "--out", str(again)]) == 0
    assert again.read_bytes() == bytes_


def test_a_student_alone_has_the_figures_of_its_own_space(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = trained(tmp_path, method="plain", distill=None)
    assert cli.main(["eval", str(config.folder), "--bank", config.bank[0]]) == 0
    out = capsys.readouterr().out
    names = re.findall(r"^\| (.*?) +\| +\d+\.\d\d% \|", out, re.MULTILINE)
    own = ["class_head", "own_knn_1", "own_knn_20", "linear_probe"]
    own += ["symmetric_recall_1", "symmetric_recall_10"]
    assert names == [FIGURES[name] for name in own]
    assert "| figure " in out
    assert "teacher |" not in out
    assert "without teacher's class head; nearest class mean of teacher rows; " in out
    assert "the student has no map between its space and the teacher's" in out


def test_the_json_is_written_also_if_the_reader_of_the_table_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = trained(tmp_path), tmp_path / "figures.json"
    monkeypatch.setattr("builtins.print", Mock(side_effect=BrokenPipeError))
    cli.main(["eval", str(config.folder), "--figures", "class_head", "--out", str(out)])
    (figure,) = parse_object(out.read_bytes())["figures"]
    assert figure["name"] == "class_head"


def test_the_json_takes_the_place_of_no_device_and_no_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = trained(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    (tmp_path / "link to a file").symlink_to(Path(config.data))
    for name in ("fifo", "link", "link to a file"):
        assert cli.main(["eval", str(config.folder), "--out", str(tmp_path / name)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "it is no regular file" in err


def test_a_runs_own_images_have_the_size_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = trained(tmp_path, method="plain", distill=None, image_size=4)
    spy = Mock(side_effect=data.load)
    monkeypatch.setattr(data, "load", spy)
    for argv, size in (([], 4), (["--image-size", "6"], 6), (["--data", config.data], None)):
        spy.reset_mock()
        assert cli.main(["eval", str(config.folder), "--figures", "class_head", *argv]) == 0
        assert [call.kwargs["image_size"] for call in spy.call_args_list] == [size] * 2


def test_a_file_or_a_named_model_is_evaluated_on_the_data_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_config(tmp_path).data
    file = tiny_teacher(tmp_path)
    spec = models.load(file).spec
    tables = []
    for argv in ([str(file)], [spec, "--weights", str(file)]):
        assert cli.main(["eval", *argv, "--data", source, "--image-size", "6"]) == 0
        tables.append(capsys.readouterr().out.partition("\n\n")[2])
    assert tables[0] == tables[1]
    assert "linear probe" in tables[0]


def test_without_any_figure_the_reasons_remain() -> None:
    figures = [Figure(name, None, "no test image has a label", None, 0, 0, 0) for name in FIGURES]
    lines = Report(figures, {}).table().splitlines()
    assert lines[0] == "there is no figure"
    assert lines[2] == f"without {'; '.join(FIGURES.values())}: no test image has a label"
    with pytest.raises(KeyError):
        Report(figures, {})["knn"]
