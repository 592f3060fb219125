"""What train, demo and --eval print: bars on long work, one result with --quiet, and --json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ckd.cli import main as ckd
from ckd.data import decode, folder, load
from ckd.train import demo, evaluation, report, train
from tests.image_files import encoded, pixels, write_layout, write_parquet
from tests.train_runs import STUDENT, tiny_config

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture
def short_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    short = {"epochs": 1, "warmup_epochs": 0.0, "student": STUDENT, "batch_size": 256}
    for name in ("TEACHER", "STUDENT"):
        monkeypatch.setattr(demo, name, replace(getattr(demo, name), **short))
    monkeypatch.setattr(demo, "SEEDS", (0, 1))


def argv(tmp_path: Path, *more: str) -> list[str]:
    config = tiny_config(tmp_path)
    shape = ["--student", STUDENT, "--epochs", "2", "--batch-size", "14", "--device", "cpu"]
    paths = ["--data", config.data, "--bank", *config.bank, "--out", str(config.folder)]
    return ["train", *paths, *shape, "--log-to", "none", *more]


def test_train_json_is_the_result_and_its_folder(tmp_path: Path, capsys: Any) -> None:
    assert ckd(argv(tmp_path, "--json")) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    del stored["checksum"]
    assert found == {"run": str(tmp_path / "run"), **stored}
    assert err.count("epoch ") == 2
    assert "data      " in err


def test_train_quiet_is_one_line(tmp_path: Path, capsys: Any) -> None:
    assert ckd(argv(tmp_path, "--quiet")) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path / 'run'}: test accuracy ")
    assert (out.count("\n"), err) == (1, "")


def test_what_json_cannot_hold_is_null(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = {"test_loss": float("inf"), "hardware": {"a": float("nan")}, "epochs": 1}
    monkeypatch.setattr("ckd.train.__main__.train", lambda *_, **__: result)
    assert ckd(argv(tmp_path, "--json")) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {**result, "test_loss": None, "hardware": {"a": None}, "run": found["run"]}


def test_eval_json(tmp_path: Path, capsys: Any) -> None:
    result = train(tiny_config(tmp_path), verbose=False)
    assert ckd(["train", "--eval", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("time_s") > 0
    assert found.pop("loss") == pytest.approx(result["test_loss"], rel=1e-6)
    assert found == {
        "source": str(tmp_path / "run"),
        "data": "tiny",
        "accuracy": result["test_accuracy"],
        "correct": result["test_correct"],
        "images": 20,
    }


def test_demo_quiet_is_its_table(short_demo: None, capsys: Any) -> None:
    assert ckd(["demo", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("|  ")
    assert out.count("\n| student, ") == 2
    assert "epochs in" not in out


def test_demo_json_holds_every_run(short_demo: None, capsys: Any) -> None:
    assert ckd(["demo", "--json", "--out", "a b"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["folder"] == "a b"
    assert found["teacher"]["run"] == "a b/teacher"
    runs = [one["run"] for results in found["students"].values() for one in results]
    names = ("plain-seed0", "plain-seed1", "embed-kd-seed0", "embed-kd-seed1")
    assert runs == [f"a b/{name}" for name in names]
    plain, distilled = found["students"].values()
    gain = 100 * (distilled[1]["test_accuracy"] - plain[1]["test_accuracy"])
    assert found["gains_points"][1] == pytest.approx(gain)
    assert err.count("of 360 images)") == 5  # its lines are notes


def test_the_next_steps_of_the_demo_can_be_pasted(short_demo: None, capsys: Any) -> None:
    assert ckd(["demo", "--out", "a b"]) == 0
    out = capsys.readouterr().out
    assert "ckd compare 'a b' --html 'a b'/compare.html" in out
    assert "--eval 'a b'/embed-kd-seed0" in out


def test_loading_and_scoring_show_bars(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], terminal: None
) -> None:
    root = write_layout(tmp_path / "pets", "train/a", "train/b", "test/a", "test/b")
    train(tiny_config(tmp_path, method="plain", data=str(root), epochs=1))
    err = capsys.readouterr().err
    for words in ("decoding pets (train)", "hashing", "epoch 1/1", "scoring test images"):
        assert f"{words}: " in err
    rows = [encoded(image) for image in pixels(4)]
    write_parquet(tmp_path / "birds" / "train.parquet", rows, [0, 1, 0, 1])
    load(tmp_path / "birds")
    assert "opening: " in capsys.readouterr().err


def test_a_silent_run_shows_no_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], terminal: None
) -> None:
    root = write_layout(tmp_path / "pets", "train/a", "train/b", "test/a", "test/b")
    train(tiny_config(tmp_path, method="plain", data=str(root), epochs=1), verbose=False)
    assert capsys.readouterr() == ("", "")


def test_every_decoded_image_is_counted_whatever_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "_CHUNK", 1)
    root = write_layout(tmp_path / "pets", "train/a", "train/b", "test/a", "test/b")
    source = folder.open_split(root, "train", 0.1)
    for threads in (1, 3):
        counted: list[int] = []
        decode.decode_many(
            source, torch.arange(4), None, (3, 8, 8), threads=threads, decoded=counted.append
        )
        assert sum(counted) == 4


def test_the_epochs_that_are_left_are_estimated_from_those_before() -> None:
    assert report.time_left([], 10) == ""
    records = [{"time_s": time, "eval_time_s": 1.0} for time in (99.0, 9.0, 9.0)]
    assert report.time_left(records, 10) == " (run: 01:10 left)"


def test_the_words_of_eval() -> None:
    scores = evaluation.SourceScores("run", "pets", 14 / 46, 14, 46, 1.5, 2.0)
    words = (
        "run on pets (test): accuracy 30.43 % (14 of 46 images), loss 1.5000, 2.0 s, 23 images/s"
    )
    assert str(scores) == words
