"""Run folders as they are found on disk: whether one holds a run, its settings and its result."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, TypedDict

from ckd._errors import warn
from ckd._json import JsonError, check_types
from ckd.train import checkpoint, loggers, report
from ckd.train.config import Config, differences
from ckd.train.errors import CheckpointError, ConfigError, TrainError
from ckd.train.metrics import METRICS

CONFIG, STUDENT = "config.json", "student.safetensors"
# What a run makes in its folder before its first checkpoint.
FIRST_FILES = (
    *(CONFIG, METRICS, checkpoint.FOLDER),
    *(loggers.STATE, loggers.TensorBoard.FOLDER, loggers.WandB.FOLDER),
)
NONFINITE = "nonfinite.json"


class State(TypedDict):
    """What a checkpoint holds beside tensors."""

    config: dict[str, Any]
    inputs: dict[str, str]
    progress: dict[str, Any]
    scaler: dict[str, Any]


def read_result(folder: Path) -> dict[str, Any]:
    """result.json of a finished run. Raises TrainError for any other folder."""
    try:
        return report.read_result(folder)
    except FileNotFoundError:
        if is_run(folder) and not has_begun(folder):
            raise TrainError(
                f"the run {folder} is not finished: it has no checkpoint yet; wait for it if it "
                "is running, else train it anew or delete the folder"
            ) from None
        if is_run(folder):
            raise TrainError(
                f"the run {folder} is not finished; go on with: {resume_command(folder)}"
            ) from None
        raise TrainError(f"{folder} is not a run folder: it has no {CONFIG}") from None


def stored_config(folder: Path) -> Config:
    """The settings of a run: config.json, or, if that is damaged, those in its checkpoint.

    Raises TrainError for a folder without a run, ConfigError and CheckpointError for damage.
    """
    try:
        return Config.load(folder / CONFIG)
    except (ConfigError, FileNotFoundError) as error:
        problem = error
    path = checkpoint.latest(folder)
    if path is None and isinstance(problem, FileNotFoundError):
        raise TrainError(f"{folder} is not a run folder: it has no {CONFIG}") from None
    if path is None:
        raise problem
    try:
        state = checked_state(checkpoint.load_state(path), path)
    except CheckpointError:
        if isinstance(problem, ConfigError):
            raise problem from None
        raise
    if isinstance(problem, ConfigError):
        warn(f"{problem}; the settings are read from {path}", stacklevel=1)
    return Config.from_dict(state["config"], path)


def is_run(folder: Path) -> bool:
    """Whether the folder holds a run, finished or not."""
    return (folder / CONFIG).exists() or checkpoint.latest(folder) is not None


def has_begun(folder: Path) -> bool:
    """Whether a run left something of its training: a checkpoint or result to go on from, or the
    batch that stopped it."""
    files = (folder / report.RESULT, folder / NONFINITE)
    return checkpoint.latest(folder) is not None or any(file.exists() for file in files)


def resume_command(folder: Path) -> str:
    """The command that resumes a run."""
    return f"python -m ckd.train --resume {shlex.quote(str(folder))}"


def checked_state(state: dict[str, Any], path: Path) -> State:
    try:
        return check_types(state, State)
    except JsonError as error:
        raise misfit(path, str(error)) from error


def misfit(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a checkpoint of this run: {what}; begin another run")


def refuse_other_settings(where: Path, old: Config, new: Config) -> None:
    """Raise ConfigError if `new` may not resume the run with the settings `old`, read from
    `where`."""
    changed = differences(old, new)
    if changed:
        listed = "; ".join(f"{name} was {a!r}, is {b!r}" for name, (a, b) in changed.items())
        raise ConfigError(
            f"{where} was begun with other settings: {listed}. Resume with the old ones, or begin "
            "another run with another --out"
        )
