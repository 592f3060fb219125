"""How a run is saved in a checkpoint, and restored from one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ckd._json import JsonError, as_dataclass, is_number
from ckd.train import checkpoint
from ckd.train.config import Config
from ckd.train.errors import CheckpointError
from ckd.train.metrics import read_metrics
from ckd.train.run import Progress, Run
from ckd.train.stored import State, checked_state, misfit, refuse_other_settings, resume_command


def save(run: Run) -> None:
    """Save a checkpoint. Raises CheckpointError, which gives the command that resumes."""
    state: State = {
        "config": run.config.to_dict(),
        "inputs": run.inputs,
        "progress": dataclasses.asdict(run.progress),
        "scaler": run.scaler.state_dict(),
    }
    folder = run.config.folder
    try:
        checkpoint.save(
            folder, run.progress.step, checkpoint.pack(run.modules, run.optimizer), state
        )
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. Once that is put right, go on with: {resume_command(folder)}"
        ) from error


def restore(run: Run) -> None:
    """Restore the newest checkpoint; a run without one starts from the beginning.

    Raises CheckpointError if it is damaged or was made from other data, ConfigError if it has
    other settings.
    """
    folder = run.config.folder
    path = checkpoint.latest(folder)
    if path is None:
        checkpoint.sweep(folder)
        return
    saved = checkpoint.load(path)
    state = checked_state(saved.state, path)
    refuse_other_settings(path, Config.from_dict(state["config"], path), run.config)
    for name in (*run.inputs, *(state["inputs"].keys() - run.inputs.keys())):
        stored, now = (inputs.get(name) for inputs in (state["inputs"], run.inputs))
        if stored != now:
            raise CheckpointError(
                f"the {name} is not what {path} was trained with: hash {stored} then, "
                f"{now} now; restore it, or begin another run"
            )
    progress = _checked_progress(state["progress"], run, path)
    run.records = read_metrics(folder, progress.metrics_bytes, progress.metrics_xxh3, path)
    if len(run.records) != progress.epoch:
        raise misfit(path, f"{len(run.records)} lines of metrics for {progress.epoch} epochs")
    checkpoint.unpack(saved, run.modules, run.optimizer)
    try:
        run.scaler.load_state_dict(state["scaler"])
    except (RuntimeError, KeyError, TypeError) as error:
        raise misfit(path, f"its scaler is {state['scaler']}") from error
    run.progress = progress
    checkpoint.sweep(folder)  # not before: an older checkpoint may be the only one intact


def _checked_progress(values: dict[str, Any], run: Run, path: Path) -> Progress:
    try:
        progress = as_dataclass(Progress, values)
    except JsonError as error:
        raise misfit(path, f"its progress: {error}") from error
    sizes = {
        "epoch": run.config.epochs,
        "rows": len(run.train_set) - 1,
        "step": run.config.epochs * run.steps_per_epoch,
    }
    for name, most in sizes.items():
        if not 0 <= (value := getattr(progress, name)) <= most:
            raise misfit(path, f"{name} {value} of {most}")
    numbers = (progress.time_s, *progress.sums.values())
    if progress.metrics_bytes < 0 or not all(map(is_number, numbers)):
        raise misfit(path, f"its progress is {values}")
    return progress
