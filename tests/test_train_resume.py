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
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import xxhash

from ckd import _lock
from ckd._json import sealed
from ckd.train import (
    CheckpointError,
    Config,
    ConfigError,
    Interrupted,
    TrainError,
    checkpoint,
    train,
)
from ckd.train import loop as loop_module
from ckd.train.__main__ import main
from ckd.train.metrics import MetricsLog
from tests.test_files import make_odd_file
from tests.train_runs import outcome, resume_in_process, tiny_config, tiny_data

pytestmark = pytest.mark.usefixtures("quick_runs")

REPOSITORY = Path(__file__).parents[1]

# Together: every method's state, students without dropout and with batch norm, and every option
# that adds state.
VARIANTS: dict[str, dict[str, Any]] = {
    "embed-kd": {},
    "contrast with all rows": {"targets": "samples"},
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


def check_resumes(config: Config, monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """A run that is interrupted in these two steps, and resumed, ends as one that is not."""
    whole = replace(config, out=str(config.folder.with_name("whole")))
    train(whole, verbose=False)
    interrupt_at(monkeypatch, steps)
    for count in range(3):
        try:
            train(config, resume=count > 0, verbose=False)
            break
        except Interrupted:
            pass
    assert count == 2
    assert outcome(config.folder) == outcome(whole.folder)


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
        *("--data", config.data, "--bank", *config.bank, "--student", config.student),
        *("--out", str(config.folder), "--epochs", "500", "--batch-size", "14"),
        *("--log-to", "none", "--checkpoint-steps", "5"),
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


@pytest.mark.parametrize("damage", ["flip", "delete", "folder", "link to a fifo"])
def test_a_damaged_log_is_found_before_the_first_step(tmp_path, monkeypatch, damage):
    config = tiny_config(tmp_path)
    interrupt_at(monkeypatch, {9})
    with pytest.raises(Interrupted):
        train(config, verbose=False)
    file = config.folder / "metrics.jsonl"
    data = bytearray(file.read_bytes())
    file.unlink()
    if damage == "flip":
        data[data.index(b'"test_accuracy": ') + 17] ^= 1  # 0.5 becomes 1.5
        file.write_bytes(data)
    elif damage != "delete":
        make_odd_file(damage, file)
    monkeypatch.setattr(loop_module, "optimizer_step", lambda *_: pytest.fail("trained"))
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl"):
        train(config, resume=True)


def test_a_log_that_is_damaged_during_training_is_not_read(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    write = MetricsLog.write

    def damaging(self, record):
        written = write(self, record)
        self.path.write_bytes(b"\xff" * written[0])
        return written

    monkeypatch.setattr(MetricsLog, "write", damaging)
    assert train(config, verbose=False)["epochs"] == 2


@pytest.mark.parametrize("damage", [None, b"", b"null", "flip", "link to a fifo"])
def test_a_damaged_config_json_is_restored_from_the_checkpoint(tmp_path, monkeypatch, damage):
    config = tiny_config(tmp_path)
    train(replace(config, out=str(tmp_path / "whole")), verbose=False)
    interrupt_at(monkeypatch, {9})
    with pytest.raises(Interrupted):
        train(config, verbose=False)
    file = config.folder / "config.json"
    data = file.read_bytes()
    file.unlink()
    if isinstance(damage, bytes):
        file.write_bytes(damage)
    elif damage == "flip":
        file.write_bytes(data.replace(b"14,", b"15,"))
    elif damage:
        make_odd_file(damage, file)
    with warnings.catch_warnings(record=True) as caught:
        assert main(["--resume", str(config.folder)]) == 0
    assert bool(caught) == (damage is not None)
    assert file.read_bytes() == data
    assert outcome(config.folder) == outcome(tmp_path / "whole")


def test_the_folder_on_the_command_line_is_the_run(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    train(config, verbose=False)
    file = config.folder / "config.json"
    replace(config, out=str(tmp_path / "elsewhere")).save(file)
    (config.folder / "result.json").unlink()
    before = set(tmp_path.iterdir())
    assert main(["--resume", str(config.folder)]) == 0
    assert (config.folder / "result.json").exists()
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config", {}),
        ("config", []),
        ("inputs", {"training data": 1}),
        ("inputs", {}),
        ("progress", {"epoch": 1}),
        *(("epoch", value) for value in (-1, 3, 10**400, None, "1", 0)),
        *(("rows", value) for value in (-1, 90, 1 << 63)),
        ("step", 1 << 63),
        ("metrics_bytes", -1),
        ("metrics_bytes", 1 << 62),
        ("sums", {"loss": 10**400}),
        ("sums", {"loss": []}),
    ],
)
def test_state_that_fits_its_checksum_but_not_the_run_is_refused(
    tmp_path, monkeypatch, name, value
):
    config = tiny_config(tmp_path)
    interrupt_at(monkeypatch, {9})
    with pytest.raises(Interrupted):
        train(config, verbose=False)
    file = checkpoint.latest(config.folder) / checkpoint.STATE
    content = json.loads(file.read_text())
    del content["checksum"]
    state = content["state"]
    (state if name in state else state["progress"])[name] = value
    file.write_bytes(sealed(content))
    with pytest.raises((CheckpointError, ConfigError), match=r"step-00000010|metrics"):
        train(config, resume=True, verbose=False)


def test_a_resume_sweeps_what_a_kill_left(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    interrupt_at(monkeypatch, {9})
    with pytest.raises(Interrupted):
        train(config, verbose=False)
    left = [config.folder / ".tmp-student.safetensors", config.folder / ".tmp-result.json"]
    for file in left:
        file.write_text("half")
    left.append(config.folder / checkpoint.FOLDER / ".tmp-step-00000007")
    left[-1].mkdir()
    train(config, resume=True, verbose=False)
    assert not [file for file in left if file.exists()]


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


def test_a_finished_run_without_its_student_is_finished_again(tmp_path):
    config = tiny_config(tmp_path)
    train(config, verbose=False)
    student = config.folder / "student.safetensors"
    data = student.read_bytes()
    student.unlink()
    train(config, resume=True, verbose=False)
    assert student.read_bytes() == data


@pytest.mark.parametrize("value", ["x", None, [1], {}, 10**400])
@pytest.mark.parametrize("name", ["peak_rss_mib", "loss", "test_loss", "lr"])
def test_metrics_of_another_type_are_refused(tmp_path, monkeypatch, name, value):
    config = tiny_config(tmp_path)
    interrupt_at(monkeypatch, {9})
    with pytest.raises(Interrupted):
        train(config, verbose=False)
    log = config.folder / "metrics.jsonl"
    log.write_text(json.dumps({**json.loads(log.read_text()), name: value}) + "\n")
    file = checkpoint.latest(config.folder) / checkpoint.STATE
    content = json.loads(file.read_text())
    del content["checksum"]
    content["state"]["progress"]["metrics_bytes"] = log.stat().st_size
    content["state"]["progress"]["metrics_xxh3"] = xxhash.xxh3_64_hexdigest(log.read_bytes())
    file.write_bytes(sealed(content))
    with pytest.raises(CheckpointError, match=rf"metrics\.jsonl, line 1 is damaged: .*{name}"):
        train(config, resume=True, verbose=False)
