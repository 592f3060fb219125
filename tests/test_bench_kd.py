"""benchmarks/bench_kd.py: all four methods by the trainer, figures derived from times, files."""

from __future__ import annotations

import csv
import functools
import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_kd
from common import workers
from common.workers import Process, finish, take_turns
from training import report, tasks
from training.gauge import EnergyMeter, Enough, Gauge
from training.tasks import Setting

SETTINGS = {"epoch_images": 1000, "batch_size": 10}
TINY = [
    *("--student", "vit:patch=8,width=16,layers=1,heads=2", "--teacher", "resnet8:width=4"),
    *("--image-size", "16", "--batch-size", "4", "--steps", "2", "--seconds", "5"),
    *("--threads", "1", "--device", "cpu"),
]


def planted(method: str, step: float, mib: float | None, joules: float | None = None) -> Any:
    quantiles = {"p20": step, "p50": step, "p80": step, "steps": 3}
    return {"method": method, "step_s": quantiles, "peak_mib": mib, "image_j": joules}


def planted_case() -> dict[str, Any]:
    about = {"weights": "random", "image_size": 224, "embedding_dim": 8, "parameters": 9}
    rows = [
        planted("plain", 0.5, 100.0, 2.0),
        planted("logit-kd", 2.0, None, 8.0),
        planted("teacher-kd", 3.0, 400.0, None),
        planted("embed-kd", 1.0, 200.0, 4.0),
    ]
    case = {"teacher": "ViT-B/16", "image_size": 32, "about": about, "rows": rows}
    return case | {"bank": planted("bank", 4.0, 50.0)}


class Inline:
    """Stands in for Process in this process: six processes would be slow to import torch."""

    def __init__(self, setting: Setting, task: Any, *arguments: Any) -> None:
        self.proceed = lambda: task(lambda: None, *arguments)


def test_measures_every_method_by_the_trainer_and_shows_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.case.start", Inline)
    out, table = tmp_path / "kd.json", tmp_path / "kd.csv"
    assert bench_kd.main([*TINY, "--out", str(out), "--csv", str(table)]) == 0
    printed = capsys.readouterr().out
    record = json.loads(out.read_text())
    (case,) = record["cases"]
    assert case["about"] | {"parameters": 0} == {
        "weights": "random",
        "image_size": 16,
        "embedding_dim": 16,
        "parameters": 0,
    }
    assert [row["method"] for row in case["rows"]] == list(bench_kd.METHODS)
    for row in (*case["rows"], case["bank"]):
        assert row["step_s"]["steps"] == 2
        assert 0 < row["step_s"]["p20"] <= row["step_s"]["p50"] <= row["step_s"]["p80"]
        assert row["image_j"] is None
        assert row["epoch_s_extrapolated"] == pytest.approx(50_000 / 4 * row["step_s"]["p50"])
    assert str(tmp_path) not in out.read_text(), "paths of this machine"
    assert "random weights" in printed
    assert "synthetic" in printed
    lines = list(csv.DictReader(table.open()))
    assert [line["method"] for line in lines] == [*bench_kd.METHODS, "bank"]
    assert {line["torch"] for line in lines} == {torch.__version__}
    assert bench_kd.main(["--show", str(out)]) == 0
    assert capsys.readouterr().out == printed


def test_epochs_ratios_and_break_even_of_planted_numbers() -> None:
    case = planted_case()
    report.derive(case, SETTINGS)
    plain, logit, teacher, embed = case["rows"]
    assert [row["epoch_s_extrapolated"] for row in case["rows"]] == [50, 200, 300, 100]
    assert case["bank"]["images_per_s"] == 2.5
    assert case["bank"]["epoch_s_extrapolated"] == 400
    assert [row["time_of_embed"] for row in case["rows"]] == [0.5, 2, 3, 1]
    assert [row["memory_of_embed"] for row in case["rows"]] == [0.5, None, 2, 1]
    assert [row["epoch_j_extrapolated"] for row in case["rows"]] == [2000, 8000, None, 4000]
    assert logit["energy_of_embed"] == 2
    assert logit["break_even_epochs"] == 400 / (200 - 100)
    assert teacher["break_even_epochs"] == 400 / (300 - 100)
    assert plain["break_even_epochs"] is None
    assert embed["break_even_epochs"] is None


def test_a_method_that_is_no_slower_never_pays_for_a_bank(
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = planted_case()
    case["rows"][2] = planted("teacher-kd", 1.0, 400.0)
    report.derive(case, SETTINGS)
    assert case["rows"][2]["break_even_epochs"] is None
    report.show_case(case, SETTINGS | {"student": "vit"})
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| teacher-kd")]
    assert line.endswith("| unknown or never |")


class Planted:
    """Stands in for Process: gives a fixed result after `turns` turns."""

    def __init__(self, result: dict[str, Any], turns: int = 1, log: list[str] | None = None):
        self.result, self.turns, self.log = result, turns, [] if log is None else log

    def set_up(self) -> None:
        self.log.append(f"{self.result['name']} set up")

    def proceed(self) -> dict[str, Any] | None:
        self.turns -= 1
        self.log.append(str(self.result.get("name")))
        return None if self.turns else self.result


def test_failures_are_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(setting: Setting, task: Any, *arguments: Any) -> Planted:
        if task is tasks.make_teacher:
            return Planted(planted_case()["about"])
        if task is tasks.measure_bank or arguments[0] == "teacher-kd":
            return Planted({"failed": "out of memory"})
        return Planted({k: v for k, v in planted("", 1.0, 10.0).items() if k != "method"})

    monkeypatch.setattr("training.case.start", start)
    out, table = tmp_path / "kd.json", tmp_path / "kd.csv"
    assert bench_kd.main([*TINY, "--out", str(out), "--csv", str(table)]) == 0
    (case,) = json.loads(out.read_text())["cases"]
    assert [row.get("failed") for row in case["rows"]] == [None, None, "out of memory", None]
    assert case["rows"][1]["break_even_epochs"] is None
    printed = capsys.readouterr().out
    assert "| teacher-kd | out of memory |" in printed
    assert "Bank: out of memory" in printed
    assert [line["failed"] for line in csv.DictReader(table.open())].count("out of memory") == 2


def test_a_teacher_that_cannot_be_made_fails_all_that_need_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def start(setting: Setting, task: Any, *arguments: Any) -> Planted:
        if task is tasks.make_teacher:
            return Planted({"failed": "transformers is missing"})
        assert arguments[0] == "plain"
        return Planted({k: v for k, v in planted("", 1.0, 1.0).items() if k != "method"})

    monkeypatch.setattr("training.case.start", start)
    out = tmp_path / "kd.json"
    assert bench_kd.main([*TINY, "--out", str(out)]) == 1
    (case,) = json.loads(out.read_text())["cases"]
    assert ["failed" in row for row in case["rows"]] == [False, True, True, True]
    assert case["bank"]["failed"] == "transformers is missing"


def test_embeddings_of_random_weights_fit_into_a_bank(tmp_path: Path) -> None:
    setting = Setting(str(tmp_path), "vit", "resnet56", 32, 16, 2, 1.0, "off", False, 1, "cpu")
    tasks.write_images(setting)
    about = tasks.make_teacher(lambda: None, setting)
    assert about["weights"] == "random"
    teacher = tasks.models.load(setting.teacher_file)
    images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        embeddings = teacher(tasks.models.prepare(teacher, images)).embedding
    assert embeddings.abs().max() < 1000  # float16 holds 65,504


def test_processes_take_turns_and_one_without_memory_is_tried_again_alone() -> None:
    log: list[str] = []
    begun: list[Planted] = []

    def greedy() -> Any:
        alone = bool(begun)
        result = {"name": "b", "alone": True} if alone else {"name": "b", "failed": "out of memory"}
        begun.append(Planted(result, 1, log))
        return begun[-1]

    start: dict[str, Any] = {
        "a": lambda: Planted({"name": "a"}, 3, log),
        "b": greedy,
        "c": lambda: Planted({"name": "c"}, 2, log),
    }
    results = take_turns(start)
    assert log == ["a", "b", "c", "a", "c", "a", "b"]
    assert list(results) == ["a", "b", "c"]
    assert results["b"] == {"name": "b", "alone": True}

    log.clear()
    take_turns({name: start[name] for name in "ac"}, together=True)
    assert log == ["a set up", "c set up", "a", "c", "a", "c", "a"]


def answer_or_die(turn_over: Any, number: int) -> dict[str, Any]:
    turn_over()
    if number == 0:
        os.kill(os.getpid(), 9)
    return {"threads": torch.get_num_threads(), "number": number}


@pytest.mark.slow
def test_a_process_answers_after_its_turns_or_its_death_is_the_reason() -> None:
    process = Process(answer_or_die, 5, threads=2)
    assert process.proceed() is None
    assert process.proceed() == {"threads": 2, "number": 5}
    ahead = Process(answer_or_die, 6, threads=1)
    ahead.set_up()
    assert ahead.pipe.poll(60)  # it has come to its first turn
    assert ahead.proceed() is None
    assert ahead.proceed() == {"threads": 1, "number": 6}
    assert finish(Process(answer_or_die, 0, threads=1)) == {"failed": "killed, out of memory?"}


def test_an_error_in_the_process_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    class Pipe:
        sent: Any = None

        def recv(self) -> Any:
            if self.sent is not None:
                raise EOFError  # the parent closed the pipe
            return "call", (), True

        def send(self, answer: Any) -> None:
            self.sent = answer

    def fail(turn_over: Any, error: Exception) -> None:
        raise error

    threads = torch.get_num_threads()
    for error, reason in (
        (ValueError("a reason\nand more"), "ValueError: a reason"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (torch.OutOfMemoryError("CUDA"), "out of memory"),
    ):
        pipe = Pipe()
        held = functools.partial(fail, error=error)
        workers._serve(pipe, workers._Function, (held,), threads)  # type: ignore[arg-type]
        assert pipe.sent == ("failed", reason)
    assert "a reason" in capsys.readouterr().err


class NoMemory:
    """Memory that counts its restarts."""

    device = torch.device("cpu")
    restarts = 0

    def restart(self) -> None:
        self.restarts += 1

    def peak_mib(self) -> float:
        return 7.0


@pytest.mark.parametrize(("steps", "seconds", "measured"), [(5, 1e9, 5), (5, 0.0, 2)])
def test_gauge_measures_so_many_steps_after_the_warm_up(
    steps: int, seconds: float, measured: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory: Any = NoMemory()
    turns: list[int] = []
    monkeypatch.setattr("training.gauge.TURN", 0.0)  # turns of one step
    gauge = Gauge(
        memory,
        lambda: turns.append(1),
        warm_up=3,
        steps=steps,
        seconds=seconds,
        batch_size=4,
    )
    for _ in range(3 + measured - 1):
        assert gauge() is False
    with pytest.raises(Enough):
        gauge()
    assert memory.restarts == 1
    assert len(turns) == measured
    assert gauge.result()["step_s"]["steps"] == measured
    assert gauge.result()["peak_mib"] == 7.0


def test_energy_is_the_difference_of_the_device_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = iter([5_000, 12_500, 20_000, 20_500])  # mJ; two turns of a meter
    nvml: Any = types.ModuleType("pynvml")
    nvml.NVMLError = RuntimeError
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: next(counter)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    properties = types.SimpleNamespace(uuid="1-2-3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    meter = EnergyMeter(torch.device("cuda"))
    for joules in (7.5, 8.0):
        meter.start()
        meter.stop()
        assert meter.joules == joules
    absent = EnergyMeter(torch.device("cpu"))
    absent.start()
    absent.stop()
    assert absent.joules is None


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is missing"
)
def test_vits_are_built_from_their_shape_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tasks.VITS, "ViT-B/32", (16, 1, 2, 32))
    spec = tasks._spec("ViT-B/32", str(tmp_path))
    model = tasks.models.create(spec, num_classes=5, image_size=None)
    assert (model.embedding_dim, model.image_size, model.num_classes) == (16, 224, 5)


def test_figure_has_the_papers_numbers_beside_the_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    case = planted_case()
    report.derive(case, SETTINGS)
    about = {"processor": "a processor", "threads": 1, "date": "2024-01-01"}
    record = {"machine": about, "settings": SETTINGS, "cases": [case, case | {"image_size": 64}]}
    report.plot(record, tmp_path / "kd.png")
    assert (tmp_path / "kd.png").read_bytes().startswith(b"\x89PNG")


def test_figure_without_matplotlib_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        bench_kd.main([*TINY, "--plot", "kd.png"])
    assert "--plot needs matplotlib: pip install 'ckd[plots]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--teacher", "ViT-H/14"], "--teacher: expected one of ViT-B/32, ViT-B/16, "),
        (["--teacher", "resnet57"], "--teacher: expected a model for 32 px, got "),
        (["--student", "vit:patch=5"], "--student: expected a model for 32 px, got "),
        (["--student", "ViT-B/32"], "--student: expected a model spec (vit, "),
        (["--image-size", "0"], "--image-size: expected at least 1, got 0"),
        (["--image-size", "large"], "--image-size: invalid int value: 'large'"),
        (["--methods", "plain,best"], "--methods: one of plain, logit-kd, "),
        (["--batch-size", "1"], "--batch-size: expected at least 2, got 1"),
        (["--steps", "1"], "--steps: expected at least 2, got 1"),
        (["--seconds", "nan"], "--seconds: expected a positive number, got nan"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--epoch-images", "0"], "--epoch-images: expected at least 1, got 0"),
        (["--amp", "int8"], "--amp: invalid choice: 'int8'"),
        (["--show", "/nowhere/kd.json"], "--show: /nowhere/kd.json cannot be read"),
        (["--show", __file__], "cannot be read"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_arguments_are_named(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        bench_kd.main(["--image-size", "32", *arguments])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_results_of_another_benchmark_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "loss.json"
    other.write_text('{"benchmark": "loss"}')
    with pytest.raises(SystemExit):
        bench_kd.main(["--show", str(other)])
    assert "--show: expected a file that bench_kd.py --out wrote" in capsys.readouterr().err
