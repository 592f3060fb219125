"""python -m ckd.train: flags, resume, evaluation, errors, and the demonstration."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ckd.train import Config, demo, train
from ckd.train.__main__ import main, parse
from tests.train_runs import STUDENT, tiny_config

pytestmark = pytest.mark.usefixtures("quick_runs")


def flags(config: Config) -> list[str]:
    return [
        *("--data", config.data, "--bank", *config.bank, "--student", STUDENT, "--device", "cpu"),
        *("--out", str(config.folder), "--epochs", "2", "--batch-size", "14", "--log-to", "none"),
    ]


def test_flags_become_settings():
    command = parse(["--method", "logit-kd", "--no-flip", "--lr", "0.5", "--image-size", "32"])
    assert command.config == Config(method="logit-kd", flip=False, lr=0.5, image_size=32)
    assert command.resume is None
    assert parse(["--paper-compat"]).config == Config(paper_compat=True)


def test_help_describes_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for field in (*Config.__dataclass_fields__, "resume", "eval"):
        assert f"--{field.replace('_', '-')}" in text
    assert "--method {plain,logit-kd,teacher-kd,embed-kd}" in text
    assert "--targets {None,samples,centroids}" in text


def test_trains_then_evaluates_the_run_folder_to_the_same_accuracy(tmp_path, capsys):
    config = tiny_config(tmp_path)
    assert main(flags(config)) == 0
    trained = capsys.readouterr().out
    assert trained.count("epoch ") == 2
    result = json.loads((config.folder / "result.json").read_text())
    correct, accuracy = result["test_correct"], 100 * result["test_accuracy"]
    assert accuracy == pytest.approx(100 * correct / 20)
    words = f"{accuracy:.2f} % ({correct} of 20 images)"
    assert f"{config.folder}: test accuracy {words} after 2 epochs" in trained

    assert main(["--eval", str(config.folder)]) == 0  # the run knows its data
    line = capsys.readouterr().out
    assert f"accuracy {words}, loss" in line
    assert line.count("\n") == 1


def test_evaluates_a_file_on_the_data_that_is_named(tmp_path, capsys):
    config = tiny_config(tmp_path)
    assert main(["--eval", str(config.teacher), "--data", config.data]) == 0
    assert "on tiny (test): accuracy" in capsys.readouterr().out
    assert main(["--eval", str(config.teacher), "--data", "digits"]) == 2
    assert "tells 3 classes apart, digits has 10 of other names" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["path", "flag"])
def test_both_forms_of_resume_go_on_with_the_stored_settings(tmp_path, form, capsys):
    config = tiny_config(tmp_path)
    config.folder.mkdir()
    config.save(config.folder / "config.json")
    argv = ["--resume", str(config.folder)] if form == "path" else [*flags(config), "--resume"]
    assert parse(argv).config == config
    assert main(argv) == 0
    assert main(argv) == 0
    assert "is finished" in capsys.readouterr().out


def test_resume_may_begin_a_run_with_its_own_flags_but_not_with_a_path_alone(tmp_path, capsys):
    config = tiny_config(tmp_path)
    assert main([*flags(config), "--resume"]) == 0
    assert main(["--resume", str(tmp_path / "nowhere")]) == 2
    assert "no run is there" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def test_resume_with_another_setting_or_another_place_is_refused(tmp_path, capsys):
    config = tiny_config(tmp_path)
    train(config, verbose=False)
    assert main(["--resume", str(config.folder), "--lr", "0.5"]) == 2
    assert "lr was 0.001, is 0.5" in capsys.readouterr().err
    assert main(["--resume", str(config.folder), "--out", "elsewhere"]) == 2
    assert "leave out one" in capsys.readouterr().err


@pytest.mark.filterwarnings("error")
def test_a_stored_setting_that_is_no_choice_is_one_line_and_status_2(tmp_path, capsys):
    config = tiny_config(tmp_path, method="embed-dk")
    config.folder.mkdir()
    config.save(config.folder / "config.json")
    assert main(["--resume", str(config.folder)]) == 2
    error = capsys.readouterr().err
    assert "config.json: unknown method 'embed-dk'; --method takes, nearest first: emb" in error
    assert error.count("\n") == 1


def test_a_moved_run_resumes_where_it_lies(tmp_path, capsys):
    config = tiny_config(tmp_path)
    train(config, verbose=False)
    moved = config.folder.rename(tmp_path / "moved")
    assert main(["--resume", str(moved)]) == 0
    assert f"{moved} is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--method", "embed-dk"], "unknown method 'embed-dk'"),
        (["--method", "plain", "--amp", "bfloat16"], "--amp takes, nearest first: bf16"),
        (["--targets", "sample"], "unknown targets 'sample'; --targets takes"),
        (["--eval", "nowhere", "--method", "plane"], "unknown method 'plane'; --method takes"),
        (["--data", "nowhere", "--method", "plain"], "nowhere"),
        (["--method", "plain", "--student", "resnet21"], "resnet21"),
        (["--bank", "nowhere"], "nowhere is not a bank"),
        (["--eval", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line_and_status_2(tmp_path, monkeypatch, capsys, argv, says):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert says in captured.err


def test_an_unknown_flag_is_status_2():
    with pytest.raises(SystemExit) as caught:
        main(["--learning-rate", "1"])
    assert caught.value.code == 2


def test_the_module_runs(tmp_path):
    command = [sys.executable, "-m", "ckd.train", "--method", "nonsense"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown method")


def test_demo_ends_with_one_table_and_what_to_do_next(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = {"epochs": 1, "warmup_epochs": 0.0, "student": STUDENT, "batch_size": 256}
    monkeypatch.setattr(demo, "TEACHER", replace(demo.TEACHER, **short))
    monkeypatch.setattr(demo, "STUDENT", replace(demo.STUDENT, **short))
    monkeypatch.setattr(demo, "SEEDS", (0, 1))
    for _ in range(2):  # the second demo gets a new folder
        assert main([]) == 0
        text = capsys.readouterr().out
        rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
        assert rows[2:] == ["teacher", "student, plain", "student, embed-kd"]
        assert re.search(r"Distillation: [+-]\d+\.\d\d points", text)
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"demo", "demo-2"}
    assert "--eval runs/demo-2/embed-kd-seed0" in text
    assert main(["--eval", "runs/demo/embed-kd-seed1"]) == 0


def test_demo_compares_like_with_like():
    """The students differ in the method alone; their settings are those that the demo names."""
    assert demo.STUDENT.method == Config().method == "embed-kd"
    assert demo.STUDENT.data == demo.TEACHER.data == "digits"
    assert not demo.STUDENT.flip  # a mirrored digit is no digit
    assert len(demo.SEEDS) >= 2
