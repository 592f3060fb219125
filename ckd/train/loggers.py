"""Where the numbers of a run go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

To add a service, write a class with the methods of Logger, put it into LOGGERS and its name into
`ckd.train.config.LogTo`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ckd._console import is_quiet
from ckd._errors import warn
from ckd._files import atomic_write
from ckd._hints import require
from ckd._json import JsonError, check_types, read_object, sealed, unsealed
from ckd.train.config import Config
from ckd.train.errors import TrainError

STATE = "loggers.json"  # of each logger: the id of its run in the service, the last step it took
PROJECT = "ckd"  # of the services, unless their environment variables name another
RETRY_S = 600.0  # between attempts at a service that failed: each may block until its own timeout
_ID = re.compile("[A-Za-z0-9_-]{1,64}")


class Logger(Protocol):
    """A service that keeps the numbers of runs. Each method may raise any error."""

    id: str
    """Of the run in the service: "" for a new one, or set before `start` to go on in that run."""

    def start(self, config: Config, folder: Path, step: int) -> None:
        """Begin or reopen the run; ImportError if the package is missing. step: the last one that
        was logged; numbers of later steps, of a run that was killed, are to be removed if any."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Keep the numbers of a step, which is later than all before it."""

    def close(self, completed: bool) -> None:
        """End the run, or, if it is not `completed`, leave it open for a resume."""


class TensorBoard:
    """Events in RUN/tensorboard."""

    id = ""
    FOLDER = "tensorboard"

    def start(self, config: Config, folder: Path, step: int) -> None:
        require("tensorboard", extra="tensorboard", purpose="--log-to tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / self.FOLDER), purge_step=step + 1)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def close(self, completed: bool) -> None:
        self._board.close()


class WandB:
    """A run of Weights & Biases, whose files are in RUN/wandb; WANDB_MODE=offline needs no
    network, WANDB_PROJECT and WANDB_ENTITY say where it belongs."""

    id = ""
    FOLDER = "wandb"

    def start(self, config: Config, folder: Path, step: int) -> None:
        wandb = require("wandb", extra="wandb", purpose="--log-to wandb")
        self.id = self.id or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            dir=str(folder),
            id=self.id,
            resume="allow",
            config=config.to_dict(),
            allow_val_change=True,  # --device, say, may differ on a resume
            # The console is left alone: ckd prints progress bars.
            settings=wandb.Settings(console="off", silent=is_quiet()),
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self, completed: bool) -> None:
        self._run.finish(exit_code=0 if completed else 1)


class MLflow:
    """A run of MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say where it belongs."""

    id = ""

    def start(self, config: Config, folder: Path, step: int) -> None:
        mlflow = require("mlflow", extra="mlflow", purpose="--log-to mlflow")
        self._mlflow, self._client = mlflow, mlflow.MlflowClient()
        self._held = 0  # the last step of a run that goes on
        if self.id:
            self._client.update_run(self.id, status="RUNNING")
            losses = self._client.get_metric_history(self.id, "loss")
            self._held = max((metric.step for metric in losses), default=0)
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(name)
        where = self._client.create_experiment(name) if known is None else known.experiment_id
        self.id = self._client.create_run(where, run_name=folder.name).info.run_id
        params = [
            mlflow.entities.Param(key, str(value)[:500])  # a longer value is refused
            for key, value in config.to_dict().items()
        ]
        self._client.log_batch(self.id, params=params)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        if step <= self._held:  # a kill came between it and the note of it in loggers.json
            return
        now = int(1000 * time.time())
        metrics = [
            self._mlflow.entities.Metric(name, float(value), now, step)
            for name, value in numbers.items()
        ]
        self._client.log_batch(self.id, metrics=metrics)

    def close(self, completed: bool) -> None:
        self._client.set_terminated(self.id, status="FINISHED" if completed else "KILLED")


LOGGERS: Mapping[str, Callable[[], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


class _State(NamedTuple):
    """A logger in loggers.json."""

    id: str
    step: int


class Loggers:
    """The loggers of a run. It calls `log` with records that a checkpoint holds, so that no step of
    a run that is resumed is trained and logged again; and each logger gets those it missed.

    What fails while the run trains is a warning, once for each logger; the records are kept, and
    tried again.
    """

    def __init__(self, config: Config, folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
        """Start the loggers of `config.log_to`; records: those before a resume.

        Raises ImportError that names the extra, TrainError for a logger that cannot start.
        """
        self._folder = folder
        self._records = list(records)
        self._loggers: dict[str, Logger] = {}
        self._retry_at: dict[str, float] = {}  # of those that failed
        names = config.log_to
        if names == ("auto",):
            names = ("tensorboard",) if importlib.util.find_spec("tensorboard") else ()
        # Loggers that this resume leaves out keep theirs.
        self._states = _stored(folder / STATE)
        for name in [name for name in names if name != "none"]:
            last = self._states.get(name, _State("", 0))
            if last.step and not records:  # of another run, which this one takes the place of
                last = _State("", 0)
            self._start(name, config, last)
        self._send()

    def _start(self, name: str, config: Config, last: _State) -> None:
        logger = LOGGERS[name]()
        logger.id = last.id
        try:
            with _notes_on_stderr():
                logger.start(config, self._folder, last.step)
        except ImportError:
            self.close(completed=False)
            raise
        except Exception as error:
            self.close(completed=False)
            raise TrainError(
                f"--log-to {name} cannot start ({_one_line(error)}); see to its settings, or leave "
                "it out"
            ) from error
        self._loggers[name] = logger
        self._save(name, last.step)

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(completed=kind is None)

    def log(self, record: Mapping[str, Any]) -> None:
        """Log a line of metrics.jsonl; values that are None are left out."""
        self._records.append(record)
        self._send()

    def _send(self, *, last: bool = False) -> None:
        for name, logger in self._loggers.items():
            if not last and time.monotonic() < self._retry_at.get(name, 0.0):
                continue
            try:
                for record in self._records:
                    if record["step"] > self._states[name].step:
                        with _notes_on_stderr():
                            logger.log(record["step"], _numbers(record))
                        self._save(name, record["step"])
            except Exception as error:  # noqa: BLE001 (no service may end the run)
                self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> None:
        if name not in self._retry_at:
            warn(
                f"--log-to {name} failed ({_one_line(error)}): the run goes on, its numbers are in "
                "metrics.jsonl, and the logger is tried again later",
                stacklevel=4,
            )
        self._retry_at[name] = time.monotonic() + RETRY_S

    def _save(self, name: str, step: int) -> None:
        """Note that a logger took this step."""
        self._states[name] = _State(self._loggers[name].id, step)
        content = {name: state._asdict() for name, state in self._states.items()}
        atomic_write(self._folder / STATE, sealed(content))

    def close(self, completed: bool) -> None:
        """End the loggers, after a last attempt to log what failed; never raises their errors."""
        self._send(last=True)
        for name, logger in self._loggers.items():
            try:
                with _notes_on_stderr():
                    logger.close(completed)
            except Exception as error:  # noqa: BLE001 (as in `_send`)
                self._failed(name, error)
        self._loggers = {}


def _stored(path: Path) -> dict[str, _State]:
    """The content of loggers.json; {} with a warning if it is damaged."""
    try:
        values, data = read_object(path)
        states: dict[str, dict[str, Any]] = check_types(
            unsealed(values, data), dict[str, dict[str, str | int]]
        )
        found = {name: _State(one["id"], one["step"]) for name, one in states.items()}
        for state in found.values():
            check_types(state, tuple[str, int])
            if state.id and not _ID.fullmatch(state.id):
                raise JsonError(f"{state.id!r:.40} is no id of a run")
        return found
    except FileNotFoundError:
        return {}
    except (JsonError, KeyError, OSError) as error:
        warn(
            f"{path} is damaged ({_one_line(error)}): the loggers begin new runs",
            stacklevel=4,
        )
        return {}


def _notes_on_stderr() -> contextlib.redirect_stdout[Any]:
    """What a logger prints: stdout may be for one JSON document."""
    return contextlib.redirect_stdout(sys.stderr)


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if value is not None}


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
