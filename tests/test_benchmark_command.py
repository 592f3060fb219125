"""common/command.py: arguments refused before any measurement, and how a command stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

import bench_kd
import bench_loss
import bench_trainer
from common import command

BENCHMARKS = Path(bench_kd.__file__).parent
ALL = [bench_loss, bench_kd, bench_trainer]
NAMES = {bench_loss: "loss", bench_kd: "kd", bench_trainer: "trainer"}


def refusal(bench: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        bench.main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("bench", ALL)
def test_outputs_that_cannot_be_written_are_refused_first(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = str(tmp_path / "absent" / "result.json")
    said = refusal(bench, capsys, "--out", absent)
    assert f"--out: expected a file in a folder that exists, got {absent}" in said
    said = refusal(bench, capsys, "--out", str(tmp_path))
    assert f"--out: expected a file to write, got a folder or device, {tmp_path}" in said
    assert "got a folder or device, /dev/null" in refusal(bench, capsys, "--out", "/dev/null")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match=r"--csv: .* that can be written"):
        command.check_output("--csv", tmp_path / "rows.csv")


@pytest.mark.parametrize("bench", ALL)
@pytest.mark.parametrize("content", ["[]", "null", "0", "{}", '{"benchmark": "other"}', "{"])
def test_files_of_something_else_are_not_shown(
    bench: ModuleType, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    file.write_text(content)
    said = refusal(bench, capsys, "--show", str(file))
    assert "--show: " in said
    assert str(file) in said


@pytest.mark.parametrize("bench", ALL)
def test_files_that_lack_something_are_called_damaged(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps({"benchmark": NAMES[bench], "machine": {}}))
    assert bench.main(["--show", str(file)]) == 2
    assert f"--show: {file} is damaged (KeyError: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bench", "arguments", "words"),
    [
        (bench_loss, ["--seconds", "inf"], "--seconds: expected a positive number, got inf"),
        (bench_loss, ["--providers", "cpu,cpu"], "--providers: expected each name once, got 'cpu'"),
        (bench_loss, ["--case", "call", "--case", "call"], "--case: expected each name once"),
        (bench_loss, ["--case", "call", "--plot", "a.png"], "--plot: a curve needs two cases"),
        (bench_kd, ["--methods", "plain,plain"], "--methods: expected each name once"),
        (bench_trainer, ["--student", "nope"], "--student: expected a model spec (vit, "),
        (bench_trainer, ["--image-size", "33"], "--student: expected a model for 33 px, got "),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_mistakes_are_named(
    bench: ModuleType, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(bench, capsys, *arguments)


MAIN = """
import signal, sys, tempfile, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.path.insert(0, {folder!r})
from common import command

def main():
    with tempfile.TemporaryDirectory(dir={place!r}) as folder:
        print(folder, flush=True)
        time.sleep(60)
    return 0

command.run(main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_no_folder(number: signal.Signals, tmp_path: Path) -> None:
    code = MAIN.format(folder=str(BENCHMARKS), place=str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert folder.is_dir()
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in said
    assert not folder.exists()


def test_what_keeps_a_core_busy_ends_with_its_parent() -> None:
    code = (
        f"import sys, time; sys.path.insert(0, {str(BENCHMARKS)!r}); import bench_loss\n"
        "if __name__ == '__main__':\n"
        "    with bench_loss.busy(1):\n"
        "        import multiprocessing as m; print(m.active_children()[0].pid, flush=True)\n"
        "        time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        time.sleep(1)
        process.kill()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and _state(child) != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
