"""`--log-to`: what each service gets, also after a resume, and what happens when one fails.

The services are fakes of the parts of wandb's and mlflow's documented interfaces that are used.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckd.train import Config, ConfigError, Interrupted, TrainError, loggers, loop, train
from tests.train_runs import outcome, tiny_config

pytestmark = pytest.mark.usefixtures("quick_runs")


class FakeWandB(types.ModuleType):
    """wandb.init, Settings and Run; `logged` is what the server has of each run, by id and step."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.logged: dict[str, dict[int, Mapping[str, float]]] = {}
        self.inits: list[dict[str, Any]] = []
        self.finished: list[int] = []
        self.fails: set[str] = set()

    def Settings(self, *, console: str, silent: bool) -> dict[str, Any]:
        return {"console": console, "silent": silent}

    def init(self, *, id: str, resume: str, **options: Any) -> FakeWandB:
        self._check("init")
        assert resume == "allow"
        self.inits.append({"id": id, **options})
        self.logged.setdefault(id, {})
        return self

    def log(self, data: dict[str, float], step: int) -> None:
        self._check("log")
        print("what wandb prints")
        run = self.logged[self.inits[-1]["id"]]
        assert step > max(run, default=0), "logged twice"
        run[step] = data

    def finish(self, exit_code: int) -> None:
        self._check("finish")
        self.finished.append(exit_code)

    def _check(self, name: str) -> None:
        if name in self.fails:
            raise ConnectionError(f"no network\nfor {name}")


class FakeMLflow(types.ModuleType):
    """MlflowClient and the entities Metric and Param."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.entities = types.SimpleNamespace(
            Metric=lambda key, value, timestamp, step: types.SimpleNamespace(**locals()),
            Param=lambda key, value: (key, value),
        )
        self.runs: dict[str, Any] = {}
        self.experiments: list[str] = []

    def MlflowClient(self) -> FakeMLflow:
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        known = name in self.experiments
        return types.SimpleNamespace(experiment_id=name) if known else None

    def create_experiment(self, name: str) -> str:
        self.experiments.append(name)
        return name

    def create_run(self, experiment_id: str, run_name: str) -> Any:
        assert experiment_id in self.experiments
        run_id = f"{len(self.runs):032x}"
        self.runs[run_id] = {"name": run_name, "status": "RUNNING", "metrics": [], "params": {}}
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))

    def update_run(self, run_id: str, status: str) -> None:
        self.runs[run_id]["status"] = status

    def set_terminated(self, run_id: str, status: str) -> None:
        self.update_run(run_id, status)

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        self.runs[run_id]["metrics"] += metrics
        self.runs[run_id]["params"] |= dict(params)

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return [metric for metric in self.runs[run_id]["metrics"] if metric.key == key]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandB:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMLflow:
    fake = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    return fake


def lines(config: Config) -> list[dict[str, Any]]:
    text = (config.folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def state(config: Config) -> dict[str, Any]:
    return json.loads((config.folder / "loggers.json").read_text())


def interrupted(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and stop at the end of epoch 2, before the checkpoint of it."""
    train_epoch = loop.train_epoch

    def stopping(run: Any, stop: Any) -> None:
        train_epoch(run, stop)
        if run.progress.epoch == 1:
            raise Interrupted("stop")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_epoch", stopping)
        with pytest.raises(Interrupted):
            train(config, verbose=False)


def test_wandb_gets_every_epoch_once_and_a_resume_goes_on_in_its_run(
    tmp_path: Path, wandb: FakeWandB, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config = tiny_config(tmp_path, epochs=3, log_to="wandb")
    interrupted(config, monkeypatch)
    train(config, resume=True, verbose=False)
    first, second = wandb.inits
    assert first["id"] == second["id"] == state(config)["wandb"]["id"]
    assert first["project"] == "ckd"
    assert first["config"]["epochs"] == 3
    assert first["settings"] == {"console": "off", "silent": True}
    assert wandb.logged == {first["id"]: {line["step"]: line for line in lines(config)}}
    assert wandb.finished == [1, 0]
    assert "what wandb prints" not in capsys.readouterr().out  # which is for one JSON document


def test_mlflow_gets_every_epoch_once_even_if_a_kill_came_before_it_was_noted(
    tmp_path: Path, mlflow: FakeMLflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, epochs=3, log_to=("mlflow",))
    with monkeypatch.context() as patch:
        patch.setattr(loggers, "atomic_write", write_only_the_first(loggers.atomic_write))
        interrupted(config, monkeypatch)
    assert state(config)["mlflow"]["step"] == 0
    (run,) = mlflow.runs.values()
    assert run["status"] == "KILLED"
    train(config, resume=True, verbose=False)
    assert mlflow.experiments == ["mine"]
    assert len(mlflow.runs) == 1
    assert (run["name"], run["status"]) == ("run", "FINISHED")
    losses = [(one.step, one.value) for one in run["metrics"] if one.key == "loss"]
    assert losses == [(line["step"], line["loss"]) for line in lines(config)]
    assert run["params"]["lr"] == "0.001"


def write_only_the_first(write: Any) -> Any:
    calls: list[Path] = []

    def first(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) == 1:
            write(path, data)

    return first


def test_a_logger_that_is_added_by_a_resume_gets_what_was_before(
    tmp_path: Path, wandb: FakeWandB, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, epochs=3)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "finish", lambda *_: {})
        train(config, verbose=False)
    assert not (config.folder / "loggers.json").exists()
    train(replace(config, log_to=("wandb",)), resume=True, verbose=False)
    (logged,) = wandb.logged.values()
    assert [*logged.values()] == lines(config)


def test_a_logger_that_a_resume_leaves_out_goes_on_in_its_run_later(
    tmp_path: Path, wandb: FakeWandB, mlflow: FakeMLflow
) -> None:
    record = {"step": 7, "loss": 0.5}
    config = tiny_config(tmp_path)
    for number, names in enumerate([("wandb",), ("mlflow",), ("wandb",)], start=1):
        records = [{**record, "step": 7 * step} for step in range(1, number + 1)]
        with loggers.Loggers(replace(config, log_to=names), tmp_path, records):
            pass
    assert len({one["id"] for one in wandb.inits}) == 1
    assert [*next(iter(wandb.logged.values()))] == [7, 14, 21]
    assert [one.step for one in next(iter(mlflow.runs.values()))["metrics"]] == [7, 7, 14, 14]


def test_a_new_run_in_the_place_of_another_is_a_new_run_of_the_service(
    tmp_path: Path, wandb: FakeWandB
) -> None:
    config = tiny_config(tmp_path, epochs=1, log_to=("wandb",))
    train(config, verbose=False)
    (config.folder / "result.json").unlink()
    for step in (config.folder / "checkpoint").iterdir():
        step.rename(tmp_path / "elsewhere")
    train(config, verbose=False)
    assert len({one["id"] for one in wandb.inits}) == 2


def test_a_logger_that_fails_is_one_warning_and_gets_what_it_missed(
    tmp_path: Path, wandb: FakeWandB, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = tiny_config(tmp_path, epochs=4, out=str(tmp_path / "quiet"))
    train(quiet, verbose=False)
    monkeypatch.setattr(loggers, "RETRY_S", 0.0)
    end_epoch = loop.end_epoch

    def ends(run: Any, memory: Any) -> Any:
        wandb.fails = {"log"} if run.progress.epoch in (1, 2) else set()
        return end_epoch(run, memory)

    monkeypatch.setattr(loop, "end_epoch", ends)
    config = tiny_config(tmp_path, epochs=4, log_to=("wandb",))
    with pytest.warns(UserWarning, match="--log-to") as caught:
        train(config, verbose=False)
    (warning,) = caught
    assert str(warning.message).startswith(
        "--log-to wandb failed (ConnectionError: no network for log): the run goes on"
    )
    (logged,) = wandb.logged.values()
    assert [*logged.values()] == lines(config)
    assert outcome(config.folder)["student"] == outcome(quiet.folder)["student"]


def test_a_service_that_is_gone_is_left_alone_for_a_while_and_at_the_end_tried_once_more(
    tmp_path: Path, wandb: FakeWandB, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def log(data: Any, step: int) -> None:
        calls.append(step)
        raise TimeoutError

    wandb.log = log  # type: ignore[method-assign]
    wandb.fails = {"finish"}
    config = tiny_config(tmp_path, epochs=4, log_to=("wandb",))
    with pytest.warns(UserWarning, match="--log-to wandb failed") as caught:
        assert train(config, verbose=False)["epochs"] == 4
    assert len(caught) == 1
    assert calls == [7, 7]


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_package_that_is_missing_names_its_extra_and_leaves_no_folder(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    config = tiny_config(tmp_path, log_to=("wandb", name) if name == "tensorboard" else (name,))
    if name == "tensorboard":  # the one before it is ended
        monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandB())
    with pytest.raises(ImportError, match=rf"--log-to {name} needs .*pip install 'ckd\[{name}\]'"):
        train(config, verbose=False)
    assert not config.folder.exists()
    if name == "tensorboard":
        assert wandb.finished == [1]


def test_a_service_that_cannot_start_is_an_error_and_leaves_no_folder(
    tmp_path: Path, wandb: FakeWandB
) -> None:
    wandb.fails = {"init"}
    config = tiny_config(tmp_path, log_to=("wandb",))
    with pytest.raises(TrainError, match=r"--log-to wandb cannot start .*no network for init"):
        train(config, verbose=False)
    assert not config.folder.exists()


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"[]",
        b'{"wandb": {"id": "a", "step": 1}}\n',
        loggers.sealed({"wandb": {"id": "../../x", "step": 1}}),
        loggers.sealed({"wandb": {"id": 3, "step": 1}}),
        loggers.sealed({"wandb": {"id": "a", "step": "1"}}),
        loggers.sealed({"wandb": {"id": "a"}}),
        loggers.sealed({"wandb": "a"}),
    ],
)
def test_a_damaged_note_of_the_loggers_begins_new_runs_with_a_warning(
    tmp_path: Path, wandb: FakeWandB, damage: bytes
) -> None:
    config = tiny_config(tmp_path)
    record = {"step": 7, "loss": 0.5, "test_accuracy": None}
    (tmp_path / "loggers.json").write_bytes(damage)
    with (
        pytest.warns(UserWarning, match=r"loggers\.json is damaged .*: the loggers begin new runs"),
        loggers.Loggers(replace(config, log_to=("wandb",)), tmp_path, [record]),
    ):
        pass
    assert list(wandb.logged.values()) == [{7: {"step": 7, "loss": 0.5}}]  # None is no number


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("auto", "wandb"), "auto or none alone"),
        (("none", "mlflow"), "auto or none alone"),
        ((), "auto or none alone"),
        (("tensorbord",), "unknown log to 'tensorbord'; --log-to takes, nearest first: tensorboa"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Config(method="plain", log_to=given).check()


def test_the_setting_survives_config_json_and_that_of_version_0_1_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config = Config(method="plain", log_to=("wandb", "mlflow"))
    config.save(path)
    assert Config.load(path) == config
    for old, new in ((True, "auto"), (False, "none")):
        settings = {**config.to_dict(), "tensorboard": old}
        del settings["log_to"]
        assert Config.from_dict(settings, path).log_to == (new,)


def test_auto_is_tensorboard_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    class Board:
        id = ""

        def start(self, config: Config, folder: Path, step: int) -> None:
            started.append(folder.name)

        def close(self, completed: bool) -> None:
            pass

    monkeypatch.setattr(loggers, "LOGGERS", {"tensorboard": Board})
    config = tiny_config(tmp_path, log_to=("auto",))
    for spec in (None, object()):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        with loggers.Loggers(config, tmp_path, []):
            assert started == ([tmp_path.name] if spec else [])


def test_tensorboard_holds_each_epoch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = tiny_config(tmp_path, epochs=3, log_to=("tensorboard",))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensorboard's own
        interrupted(config, monkeypatch)
        train(config, resume=True, verbose=False)
        events = accumulator.EventAccumulator(str(config.folder / "tensorboard"))
        events.Reload()
    steps = [event.step for event in events.Scalars("loss")]
    assert steps == [line["step"] for line in lines(config)]
