"""benchmarks/common: workers and the memory gauge; and the imports between folders."""

from __future__ import annotations

import ast
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.memory import Memory, peak_mib_of
from common.workers import KILLED, Failed, Worker
from tests.worker_tasks import Counter

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MIB = 1 << 20
COMMANDS = {path.stem for path in BENCHMARKS.glob("*.py")}
# A folder may import itself, these folders and ckd; a command all folders, but no other command.
LAYERS = {
    "common": set[str](),
    "loss": {"common"},
    "training": {"common"},
    "students": {"common"},
    "gpu": {"common", "loss", "training"},
}


@pytest.mark.parametrize(
    "path", sorted(BENCHMARKS.rglob("*.py")), ids=lambda path: str(path.relative_to(BENCHMARKS))
)
def test_module_imports_only_what_lies_below(path: Path) -> None:
    own = path.relative_to(BENCHMARKS).parts[0]
    allowed = LAYERS[own] | {own} if own in LAYERS else set(LAYERS)
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(str(node.module))
    found = {name.split(".")[0] for name in names} & (COMMANDS | set(LAYERS))
    assert found <= allowed, f"{own} imports {found - allowed}, which is not below it"


def test_the_check_on_a_gpu_starts_where_torch_cannot_be_imported() -> None:
    code = f"import sys; sys.modules['torch'] = None; sys.path.insert(0, {str(BENCHMARKS)!r}); "
    code += "import gpu_check, gpu.__main__"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_worker_answers_in_order_and_outlives_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    worker = Worker(Counter, 5)
    worker.send("add", 1)
    assert worker.ask("add", 2) == 8
    with pytest.raises(Failed, match="TypeError: unsupported operand") as failure:
        worker.ask("add", "one")
    assert failure.value.result == str(failure.value)
    assert worker.ask("add", 0) == 8
    worker.stop()
    assert not worker.is_alive()
    assert "Traceback" in capfd.readouterr().err


def test_what_a_worker_cannot_make_is_the_reason_of_a_call() -> None:
    worker = Worker(Counter, -1)
    with pytest.raises(Failed) as failure:
        worker.ask("add", 1)
    assert str(failure.value) == "ValueError: count must be at least 0, got -1"
    worker.stop()


@pytest.mark.parametrize(
    ("number", "reason", "result"),
    [
        (signal.SIGKILL, "killed by signal 9", KILLED),
        (signal.SIGABRT, "killed by signal 6", "killed by signal 6"),
    ],
)
def test_a_worker_that_dies_says_of_what(number: int, reason: str, result: str) -> None:
    worker = Worker(Counter, 0)
    for call in ("die", "add"):  # every call to a dead worker fails
        with pytest.raises(Failed) as failure:
            worker.ask(call, number)
        assert (str(failure.value), failure.value.result) == (reason, result)


def test_a_worker_that_gives_nothing_in_time_is_killed() -> None:
    worker = Worker(Counter, 0)
    assert worker.ask("add", 1, seconds=60) == 1
    with pytest.raises(Failed, match="nothing came for 0 s"):
        worker.ask("hang", seconds=0.1)
    assert not worker.is_alive()


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_peak_is_what_a_call_needs_at_most_above_what_is_held() -> None:
    held = torch.ones(48 * MIB, dtype=torch.uint8)

    def call() -> None:
        for mib in (64, 96, 64):
            torch.ones(mib * MIB, dtype=torch.uint8)

    peak = peak_mib_of(call, "cpu")
    assert peak is not None
    assert 94 < peak < 112
    assert len(held) == 48 * MIB


@linux
def test_what_was_needed_before_the_restart_or_is_called_held_does_not_count() -> None:
    memory = Memory("cpu")
    torch.ones(256 * MIB, dtype=torch.uint8)
    memory.restart()
    block = torch.ones(64 * MIB, dtype=torch.uint8)
    memory.held += len(block)
    peak = memory.peak_mib()
    assert peak is not None
    assert -2 < peak < 16


def test_where_the_system_does_not_say_there_is_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_mib_of(lambda: None, "cpu") is None


def test_on_a_gpu_the_peak_is_the_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name, value in (
        ("synchronize", None),
        ("empty_cache", None),
        ("memory_allocated", 100 * MIB),
        ("reset_peak_memory_stats", None),
        ("max_memory_allocated", 150 * MIB),
    ):

        def fake(*_: object, name: str = name, value: int | None = value) -> int | None:
            calls.append(name)
            return value

        monkeypatch.setattr(torch.cuda, name, fake)
    assert peak_mib_of(lambda: calls.append("call"), "cuda") == 50
    assert [name for name in calls if name != "synchronize"] == [
        *("empty_cache", "memory_allocated", "reset_peak_memory_stats"),
        *("call", "max_memory_allocated"),
    ]
