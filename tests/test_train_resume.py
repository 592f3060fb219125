"""A run that is stopped in any way and resumed ends in the same bytes as an undisturbed one."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckd import _lock
from ckd.train import (
    CheckpointError,
    ConfigError,
    Interrupted,
    TrainError,
    checkpoint,
    train,
)
from ckd.train import loop as loop_module
from tests.train_runs import outcome, resume_in_process, tiny_config, tiny_data

pytestmark = pytest.mark.usefixtures("quick_runs")

REPOSITORY = Path(__file__).parents[1]

# Together: every method's state, students without dropout and with batch norm, and every option
# that adds state.
VARIANTS: dict[str, dict[str, Any]] = {
    "embed-kd": {},
    "ema, accumulate, bf16": {"ema": 0.9, "accumulate": 2, "amp": "bf16"},
    "batch norm, clipping, centroids": {
        "student": "resnet8",
        "ema": 0.5,
        "clip_norm": 0.1,
        "targets": "centroids",
    },
    "fp16 with its scaler": {"amp": "fp16", "method": "teacher-kd"},
    "logit-kd, warm-up": {"method": "logit-kd", "warmup_epochs": 1.5, "label_smoothing": 0.1},
    "paper": {"paper_compat": True, "epochs": 3, "centroids_per_class": 5},
}


def interrupt_at(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Ctrl-C in the middle of these steps."""
    original = loop_module.step_generator

    def step_generator(seed, step, device):
        if step in steps:
            steps.remove(step)
            signal.raise_signal(signal.SIGINT)
        return original(seed, step, device)

    monkeypatch.setattr(loop_module, "step_generator", step_generator)


@pytest.mark.parametrize("name", VARIANTS)
def test_interrupted_and_resumed_equals_undisturbed(tmp_path, monkeypatch, capsys, name):
    config = tiny_config(tmp_path, **VARIANTS[name])
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole, verbose=False)
    steps = checkpoint.load(checkpoint.latest(whole.folder)).state["progress"]["step"]
    stops = {1, steps // 2 - 1, steps - 1}  # early, at the end of an epoch, at the very end
    interrupt_at(monkeypatch, set(stops))
    messages: list[str] = []
    for count in range(len(stops) + 1):
        try:
            train(config, resume=count > 0, verbose=False)
            break
        except Interrupted as stop:
            messages.append(str(stop))
    assert all(f"python -m ckd.train --resume {config.folder}" in m for m in messages)
    assert count == len(stops)
    assert outcome(config.folder) == outcome(whole.folder)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_resume_has_the_batches_of_the_whole_epoch(tmp_path, monkeypatch, accumulate):
    """43 images in batches of 7: the last one has 8, since batch normalisation refuses one of 1."""
    tiny_data(tmp_path, train=43, size=4)
    settings = {"method": "plain", "student": "resnet8:width=4", "batch_size": 7}
    config = tiny_config(tmp_path, **settings, accumulate=accumulate)
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole, verbose=False)
    steps = 2 * 6 // accumulate
    assert outcome(whole.folder)["step"] == f"step-{steps:08d}"
    interrupt_at(monkeypatch, set(range(steps)))
    for count in range(steps + 1):
        try:
            train(config, resume=count > 0, verbose=False)
            break
        except Interrupted:
            pass
    assert count == steps
    assert outcome(config.folder) == outcome(whole.folder)


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_equals_undisturbed(tmp_path):
    # A checkpoint after every second step, so that many kills hit the writing of one.
    config = tiny_config(tmp_path, epochs=12, checkpoint_steps=2, ema=0.9, accumulate=2, amp="bf16")
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole, verbose=False)
    context = multiprocessing.get_context("forkserver")  # a fresh process, torch imported once
    context.set_forkserver_preload(["ckd.train", "torch._dynamo"])
    rng = random.Random(0)
    kills = 0
    for _ in range(30):
        process = context.Process(target=resume_in_process, args=(config,))
        before = checkpoint.latest(config.folder)
        process.start()
        while process.is_alive() and checkpoint.latest(config.folder) == before:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
        if kills < 3:
            process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills == 3
    assert outcome(config.folder) == outcome(whole.folder)
    assert not list(config.folder.rglob(".tmp-*"))


def test_ctrl_c_on_the_command_line_says_how_to_go_on_and_that_works(tmp_path):
    config = tiny_config(tmp_path, epochs=500, checkpoint_steps=5)
    flags = [
        *("--data", config.data, "--bank", config.bank, "--student", config.student),
        *("--out", str(config.folder), "--epochs", "500", "--batch-size", "14"),
        *("--no-tensorboard", "--checkpoint-steps", "5"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "ckd.train", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and checkpoint.latest(config.folder) is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    command = re.search(r"go on with: python -m ckd.train (.*)", errors).group(1)
    stopped_at = int(re.search(r"stopped after step (\d+)", errors).group(1))
    assert checkpoint.latest(config.folder).name == f"step-{stopped_at:08d}"

    again = subprocess.Popen(
        [sys.executable, "-m", "ckd.train", *shlex.split(command)],
        stderr=subprocess.PIPE,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while (
        again.poll() is None and checkpoint.latest(config.folder).name <= f"step-{stopped_at:08d}"
    ):
        time.sleep(0.02)
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=60)
    assert again.returncode == 130
    assert checkpoint.load(checkpoint.latest(config.folder)).state["progress"]["step"] > stopped_at


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    before = signal.getsignal(signal.SIGINT)

    def twice(seed, step, device):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop_module, "step_generator", twice)
    with pytest.raises(KeyboardInterrupt):
        train(config, verbose=False)
    assert signal.getsignal(signal.SIGINT) is before


def test_resuming_with_other_settings_names_each_with_both_values(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    interrupt_at(monkeypatch, {3})
    with pytest.raises(Interrupted):
        train(config, verbose=False)
    other = replace(config, lr=0.5, seed=9)
    with pytest.raises(ConfigError, match=r"lr was 0\.001, is 0\.5; seed was 0, is 9"):
        train(other, resume=True)
    moved = config.folder.rename(tmp_path / "moved")
    result = train(replace(config, out=str(moved), workers=0, checkpoint_steps=3), resume=True)
    assert result["epochs"] == 2


def test_resuming_on_changed_data_is_refused(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, method="plain")
    interrupt_at(monkeypatch, {3})
    with pytest.raises(Interrupted):
        train(config, verbose=False)
    tiny_data(tmp_path, train=91)
    with pytest.raises(CheckpointError, match=r"training data is not what .* was trained with"):
        train(config, resume=True)


def test_a_finished_run_is_left_alone(tmp_path, capsys):
    config = tiny_config(tmp_path, epochs=1)
    result = train(config, verbose=False)
    before = {p: p.stat().st_mtime_ns for p in config.folder.rglob("*")}
    assert train(config, resume=True) == result
    assert "is finished" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in config.folder.rglob("*")} == before


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path):
    config = tiny_config(tmp_path, epochs=1)
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole, verbose=False)
    config.folder.mkdir()
    config.save(config.folder / "config.json")
    (config.folder / "metrics.jsonl").write_text('{"epoch": 1, "half a li')
    train(config, resume=True, verbose=False)
    assert outcome(config.folder) == outcome(whole.folder)


def test_a_shortened_log_is_refused(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    interrupt_at(monkeypatch, {9})
    with pytest.raises(Interrupted):
        train(config, verbose=False)
    (config.folder / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl has 0 bytes"):
        train(config, resume=True)


def test_a_folder_in_use_by_another_process_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_lock, "LOCK_PATIENCE_S", 0.0)
    config = tiny_config(tmp_path)
    config.folder.mkdir()
    with _lock.locked_folder(config.folder), pytest.raises(TrainError, match="another process"):
        train(config)


def test_state_json_holds_what_a_reader_looks_for(tmp_path):
    config = tiny_config(tmp_path, epochs=1)
    train(config, verbose=False)
    state = json.loads((checkpoint.latest(config.folder) / checkpoint.STATE).read_text())
    assert state["step"] == 7
    assert state["state"]["progress"]["epoch"] == 1
    assert state["state"]["config"]["lr"] == 1e-3
    assert set(state["state"]["inputs"]) == {"training data", "test data", "bank"}
