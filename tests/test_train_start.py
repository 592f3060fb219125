"""A run that fails before anything of it is worth keeping leaves no folder, and nobody's files."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ckd.compare.__main__ import main as compare_main
from ckd.train import CheckpointError, Config, ConfigError, TrainError, checkpoint, loop, train
from ckd.train import run as run_module
from ckd.train.stored import read_result
from tests.train_runs import tiny_config

pytestmark = pytest.mark.usefixtures("quick_runs")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def fails(config: Config, **options: Any) -> None:
    with pytest.raises((Exception, KeyboardInterrupt)):
        train(config, verbose=False, **options)


STARTS: dict[str, dict[str, Any]] = {
    "missing data": {"data": "nowhere"},
    "missing bank": {"bank": "nowhere"},
    "missing teacher": {"method": "teacher-kd", "teacher": "nowhere"},
    "unknown student": {"student": "vitt"},
    "refused setting": {"lr": -1.0},
    "refused term": {"distill": "soft"},
    "no device": {"device": "cuda:77"},
    "first step": {"student": "resnet8:width=4", "batch_size": 1},
}


@pytest.mark.parametrize("settings", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("resume", [False, True])
def test_a_start_that_fails_leaves_no_folder(
    tmp_path: Path, settings: dict[str, Any], resume: bool
) -> None:
    config = tiny_config(tmp_path)
    if settings == STARTS["first step"]:  # 4 x 4 images end in a map of 1 x 1
        settings = {**settings, "image_size": 4, "method": "plain"}
    before = files(tmp_path)
    out = tmp_path / "a" / "b" / "run"
    fails(replace(config, out=str(out), **settings), resume=resume)
    assert files(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_so_does_one_that_is_stopped_in_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def stopping(*_: Any) -> None:
        raise error

    monkeypatch.setattr(loop, "optimizer_step", stopping)
    config = tiny_config(tmp_path)
    before = files(tmp_path)
    fails(config)
    assert files(tmp_path) == before


def test_what_was_there_before_stays(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, student="vitt")
    config.folder.mkdir()
    (config.folder / "notes.txt").write_text("mine")
    (config.folder / "tensorboard").mkdir()
    fails(config)
    assert files(config.folder) == {"notes.txt", "tensorboard"}
    (config.folder / "config.json").write_text("of a run that was killed")
    fails(config)
    assert files(config.folder) == {"notes.txt", "tensorboard", "config.json"}


def test_the_config_of_another_program_is_not_replaced(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.folder.mkdir()
    (config.folder / "config.json").write_text('{"model_type": "vit"}')
    (config.folder / "metrics.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="that ckd did not write"):
        train(config, verbose=False)
    assert (config.folder / "config.json").read_text() == '{"model_type": "vit"}'
    assert (config.folder / "metrics.jsonl").read_text() == "mine"
    (config.folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds a metrics\.jsonl that ckd did not write"):
        train(config, verbose=False)
    assert (config.folder / "metrics.jsonl").read_text() == "mine"


def test_folders_above_one_that_cannot_be_made_are_removed(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, out=str(tmp_path / "new" / "newer" / ("x" * 300)))
    with pytest.raises(OSError, match="name too long"):
        train(config, verbose=False)
    assert not (tmp_path / "new").exists()


def test_an_empty_folder_of_the_user_stays(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, student="vitt")
    config.folder.mkdir()
    fails(config)
    assert files(config.folder) == set()
    assert config.folder.is_dir()


def test_a_file_that_another_puts_there_keeps_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path)

    def set_up(*_: Any) -> None:
        (config.folder / "theirs").write_text("x")
        raise TrainError

    monkeypatch.setattr(loop, "set_up", set_up)
    fails(config)
    assert files(config.folder) == {"theirs"}


def test_a_batch_that_stopped_the_run_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path)
    monkeypatch.setattr(loop, "math", SimpleNamespace(isfinite=lambda value: False))
    with pytest.raises(TrainError, match=r"nonfinite\.json"):
        train(config, verbose=False)
    assert {"nonfinite.json", "config.json"} <= files(config.folder)


def test_a_first_checkpoint_that_cannot_be_saved_keeps_what_a_resume_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise CheckpointError("disk full")

    config = tiny_config(tmp_path, checkpoint_steps=2)
    monkeypatch.setattr(run_module.checkpoint, "save", full)
    with pytest.raises(CheckpointError, match=r"go on with: .* --resume"):
        train(config, verbose=False)
    assert json.loads((config.folder / "config.json").read_text())["epochs"] == 2


def test_a_failure_after_a_checkpoint_keeps_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, checkpoint_steps=2)
    step = loop.optimizer_step

    def failing(run: Any, group: Any) -> Any:
        if run.progress.step == 3:
            raise RuntimeError
        return step(run, group)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", failing)
        fails(config)
    assert checkpoint.latest(config.folder) is not None
    assert train(config, resume=True, verbose=False)["epochs"] == 2


def test_nobody_is_told_to_resume_a_run_without_a_checkpoint(tmp_path: Path, capsys: Any) -> None:
    config = tiny_config(tmp_path)
    config.folder.mkdir()
    config.save(config.folder / "config.json")  # left by a kill
    with pytest.raises(TrainError, match="not finished: it has no checkpoint yet") as caught:
        read_result(config.folder)
    assert "--resume" not in str(caught.value)
    assert compare_main([str(config.folder)]) == 2
    assert "--resume" not in capsys.readouterr().err
    # A queue that starts killed jobs again may still do so with --resume.
    assert train(config, resume=True, verbose=False)["epochs"] == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_an_error_and_stays(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.folder.mkdir(mode=0o500)
    with pytest.raises(OSError, match="Permission denied"):
        train(config, verbose=False)
    assert config.folder.is_dir()


def test_a_forked_child_that_fails_removes_nothing(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    config = tiny_config(tmp_path)
    with run_module.run_folder(config, resume=False):
        if (child := os.fork()) == 0:
            try:
                raise SystemExit
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert (config.folder / "config.json").exists()
