"""gpu_check.py: each rung that fails becomes a row, and the next one runs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gpu_check
from common.workers import Failed, each
from gpu import right, table
from gpu.checks import Task
from gpu.device import Device
from gpu.job import Job, read_records
from gpu_check import Rung
from tests.worker_tasks import some_items

ROOT = Path(__file__).parents[1]
FAKES = {
    "fine": "job.line('4 TF/s'); job.row(ms=2.5)",
    "crash": "job.row(ms=1.0); raise RuntimeError('no such kernel')",
    "wrong": "job.wrong('d_weight is off by 3 %')",
    "killed": "job.row(ms=3.0); os.kill(os.getpid(), signal.SIGKILL)",
    "broken": "import no_such_module",
    "hang": "job.row(ms=4.0); job.line('half of it')\n"
    "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "    job.put(child=child.pid); time.sleep(600)",
    "absent": "raise NotHere('no GPU')",
}
Climb = Callable[..., tuple[int, dict[str, dict[str, Any]]]]


def rows_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The measurements without their times of measurement."""
    return [{key: value for key, value in row.items() if key != "at"} for row in record["rows"]]


@pytest.fixture
def climb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Climb:
    """A function that runs fake rungs; it returns the exit status and the records by name."""
    for name, body in FAKES.items():
        imports = "import os, signal, subprocess, sys, time\nfrom gpu.job import NotHere\n"
        (tmp_path / f"fake_{name}.py").write_text(f"{imports}def run(job):\n    {body}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_check, "GRACE", 0.3)
    monkeypatch.setattr(gpu_check, "LEAST", 0.1)

    def run(
        *names: str, budget: float = 60, seconds: float = 20
    ) -> tuple[int, dict[str, dict[str, Any]]]:
        options = argparse.Namespace(budget=budget, out=tmp_path, rehearse=False)
        options.data = options.teacher_weights = None
        rungs = [Rung(name, seconds, f"{name}.json", f"fake_{name}") for name in names]
        code = gpu_check.climb(rungs, options, tmp_path)
        return code, {n: read_records(tmp_path / f"{n}.json")[n] for n in names}

    return run


def test_each_way_to_fail_is_a_row_and_the_next_goes_on(
    climb: Climb, capsys: pytest.CaptureFixture[str]
) -> None:
    code, records = climb("crash", "wrong", "killed", "broken", "absent", "fine")
    assert code == 1
    statuses = {name: record["status"] for name, record in records.items()}
    assert statuses == {
        "crash": "crashed",
        "wrong": "WRONG",
        "killed": "killed",
        "broken": "crashed",
        "absent": "left out",
        "fine": "ok",
    }
    assert records["crash"]["reason"] == "RuntimeError: no such kernel"
    assert records["killed"]["reason"] == "by SIGKILL"
    assert rows_of(records["crash"]) == [{"ms": 1.0}]
    assert rows_of(records["killed"]) == [{"ms": 3.0}]
    assert "no_such_module" in str(records["broken"]["log"])
    shown = capsys.readouterr().out
    end = shown[shown.index("gpu_check:") :]
    for text in ("no such kernel", "WRONG d_weight is off by 3 %", "by SIGKILL", "4 TF/s"):
        assert text in end


def test_a_rung_that_hangs_is_stopped_with_all_that_it_started(climb: Climb) -> None:
    start = time.monotonic()
    code, records = climb("hang", "fine", seconds=2)
    assert code == 1
    assert time.monotonic() - start < 15
    hung = records["hang"]
    assert (hung["status"], rows_of(hung)) == ("out of time", [{"ms": 4.0}])
    assert hung["lines"] == ["half of it"]
    assert is_gone(int(str(hung["child"])))
    assert records["fine"]["status"] == "ok"


def is_gone(process: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_limits_shrink_to_what_is_left_of_the_budget(climb: Climb) -> None:
    code, records = climb("hang", "fine", budget=1.5)
    assert code == 1
    assert records["hang"]["status"] == "out of time"
    assert records["fine"]["status"] == "left out"
    assert records["fine"]["reason"] == "no time left"


def test_nothing_wrong_is_exit_status_0(climb: Climb) -> None:
    code, records = climb("fine", "absent")
    assert code == 0
    assert rows_of(records["fine"]) == [{"ms": 2.5}]


def test_a_signal_ends_the_rung_and_shows_the_table(tmp_path: Path) -> None:
    (tmp_path / "gpu_fake.py").write_text(
        "import gpu_check\n"
        "from gpu_check import Rung\n"
        "gpu_check.RUNGS = (Rung('hang', 60, 'hang.json', 'fake_hang'),)\n"
        f"gpu_check.main(['--out', {str(tmp_path)!r}])\n"
    )
    (tmp_path / "fake_hang.py").write_text(
        "import os, time\ndef run(job):\n    job.line('4 TF/s')\n    job.put(process=os.getpid())\n"
        "    time.sleep(600)\n"
    )
    paths = os.pathsep.join(map(str, (tmp_path, ROOT / "benchmarks")))
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "gpu_fake.py")],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
    )
    file = tmp_path / "hang.json"
    while "process" not in read_records(file).get("hang", {}):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    table = shown[shown.index("gpu_check:") :]
    assert "stopped" in table
    assert "4 TF/s" in table
    assert is_gone(int(read_records(file)["hang"]["process"]))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_a_rehearsal_of_some_rungs(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--rehearse"]
    command += ["--only", "machine", "tiles", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gpu_check: nothing wrong, 2 rungs" in done.stdout
    kernels = {row["kernel"] for row in read_records(tmp_path / "tiles.json")["tiles"]["rows"]}
    assert {"forward", "bank_gradient"} <= kernels
    assert len(list(tmp_path.iterdir())) == 3  # machine.json, tiles.json and summary.txt


def test_the_files_are_eight_at_most() -> None:
    names = {rung.file for rung in gpu_check.RUNGS} | {gpu_check.TABLE, "training.png"}
    assert len(names) <= 8


def test_the_table_fits_a_screen_and_keeps_what_is_wrong() -> None:
    many = {"status": "WRONG", "seconds": 1, "lines": ["x" * 300] * 60, "wrong": ["bad"] * 3}
    worse = {"status": "WRONG", "seconds": 1, "lines": [], "wrong": ["y" * 100] * 80}
    text = table.table({"a": many, "b": worse}, {"a": "a.json", "b": "b.json"}, 2.0)
    lines = text.splitlines()
    assert len(lines) <= table.MOST_LINES
    assert max(map(len, lines)) <= table.MOST_COLUMNS
    assert "WRONG bad; bad; bad" in text
    assert "83 WRONG" in lines[0]
    assert "more in b.json" in text


def test_a_task_that_raises_dies_or_hangs_costs_itself_alone() -> None:
    tasks = ("raises", "dies", "hangs", "works", "works too")
    found: dict[str, list[str]] = {task: [] for task in tasks}
    for task, item in each(some_items, tasks, workers=2, patience=5.0):
        found[task].append(str(item))
    assert found == {
        "raises": ["raises begins", "RuntimeError: no such kernel"],
        "dies": ["dies begins", "killed by signal 9"],
        "hangs": ["hangs begins", "nothing came for 5 s"],
        "works": ["works begins", "works ends"],
        "works too": ["works too begins", "works too ends"],
    }


def test_shapes_after_one_that_fails_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(rehearse=True, emulated=tmp_path)
    task = Task(device, "contrastive", "cuda", "half", ("W 64", "W 300", "W 768"))
    found = {"shape": "W 64", "errors": {"loss": (1e-6, 2e-6)}, "wrong": []}
    events = [(task, found), (task, Failed("killed by signal 11"))]
    monkeypatch.setattr(right, "each", lambda *arguments: iter(events))
    job = Job("right", tmp_path / "right.json", tmp_path, 60.0)
    table: right.Table = {}
    assert list(right.work([task], 3, table, job)) == [replace(task, names=("W 768",))]
    assert job.record["wrong"] == ["cuda half contrastive 'W 300': killed by signal 11"]
    assert "cuda half 1/1: loss 1e-06/0.5" in job.record["lines"][1]


def test_records_of_several_rungs_share_a_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        Job(name, tmp_path / "both.json", tmp_path, 5.0).row(value=name)
    found = json.loads((tmp_path / "both.json").read_text())
    assert {name: rows_of(record) for name, record in found.items()} == {
        "one": [{"value": "one"}],
        "two": [{"value": "two"}],
    }
    assert [path.name for path in tmp_path.iterdir()] == ["both.json"]
