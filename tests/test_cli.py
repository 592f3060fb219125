"""`ckd COMMAND`: the table of commands, their help, errors and exit statuses."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ckd
from ckd import cli
from ckd.bank.__main__ import main as bank_main
from ckd.cli.command import parse, run
from ckd.cli.status import printable_output
from ckd.train import Interrupted, demo
from ckd.train import __main__ as train_command
from tests.train_runs import tiny_config

ROOT = Path(__file__).parents[1]
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
COMMAND_LINES = [
    *([name] for name in cli.COMMANDS),
    *(["bank", n] for n in ("build", "info", "verify", "neighbours")),
]


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_the_list_of_commands_has_a_line_for_each(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: ckd COMMAND ..."
    listed = [line.split(maxsplit=1) for line in lines if re.match(r"  \S", line)]
    assert listed == [[name, summary] for name, (_, summary) in cli.COMMANDS.items()]
    assert {"train", "demo", "bank", "compare", "info"} <= {name for name, _ in listed}


def test_an_unknown_command_is_status_2_with_the_nearest_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["trian", "--epochs", "3"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: unknown command 'trian'; known, nearest first: train, ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("line", COMMAND_LINES, ids=" ".join)
def test_help_names_the_command_as_it_was_called(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*line, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: ckd {' '.join(line)} [-h]")


@pytest.mark.parametrize("name", ["train", "bank", "compare", "info"])
def test_help_of_the_module_form_names_the_module(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(cli.COMMANDS[name][0]).main(["--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m ckd.{name} [-h]")


@pytest.mark.parametrize(
    "line", [["train"], ["demo"], ["bank", "info", "x"], ["compare"], ["info"]]
)
def test_an_unknown_flag_is_status_2_of_every_command(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*line, "--nonsense"])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "--nonsense" in err


def test_info_reports_and_takes_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    assert "auto takes" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        cli.main(["info", "everything"])
    assert caught.value.code == 2
    assert "everything" in capsys.readouterr().err


def test_bank_describes_a_bank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ckd.BankWriter(tmp_path / "bank", 4) as writer:
        writer.write(torch.arange(3), torch.ones(3, 4), torch.zeros(3, dtype=torch.int64))
    assert cli.main(["bank", "info", str(tmp_path / "bank")]) == 0
    assert "3 x 4 float16" in capsys.readouterr().out
    assert cli.main(["bank", "verify", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'nowhere'} is not a bank")


def test_train_and_compare_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quick_runs: None
) -> None:
    config = tiny_config(tmp_path)
    argv = ["--data", config.data, "--student", config.student, "--out", str(config.folder)]
    argv += ["--method", "plain", "--epochs", "1", "--device", "cpu", "--log-to", "none"]
    assert cli.main(["train", *argv]) == 0
    accuracy = json.loads((config.folder / "result.json").read_text())["test_accuracy"]
    assert f"test accuracy {100 * accuracy:.2f} % (" in capsys.readouterr().out
    assert cli.main(["compare", str(config.folder)]) == 0
    assert f"{accuracy:.2%}" in capsys.readouterr().out
    assert cli.main(["train", *argv]) == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize("line", [["demo"], ["train"]], ids=" ".join)
def test_demo_is_train_without_arguments(line: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[Path] = []
    monkeypatch.setattr(demo, "run_demo", places.append)
    assert cli.main(line) == 0
    assert places == [Path("runs/demo")]


def test_demo_takes_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[Path] = []
    monkeypatch.setattr(demo, "run_demo", places.append)
    assert cli.main(["demo", "--out", "elsewhere"]) == 0
    assert places == [Path("elsewhere")]


class Raises:
    """A command that ends with an error."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def run(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        ckd.CkdError("one\n  two"),
        ckd.BankError("one\n\ntwo"),
        ImportError("one two"),
        OSError("one two"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_the_user_are_one_line_and_status_2(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(lambda argv: Raises(error), []) == 2
    assert capsys.readouterr() == ("", "error: one two\n")


@pytest.mark.parametrize("error", [RuntimeError("bug"), AssertionError(), ValueError(), KeyError()])
def test_a_bug_keeps_its_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(error)) as caught:
        run(lambda argv: Raises(error), [])
    assert caught.value is error
    assert capsys.readouterr() == ("", "")


def test_a_tilde_in_a_path_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    command = parse(demo.Demo, ["--out=~/runs/demo"], "ckd demo")
    assert command.out == Path("/home/me/runs/demo")


def test_ctrl_c_is_status_130_and_says_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(lambda argv: Raises(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr() == ("", "\ninterrupted\n")

    monkeypatch.setattr("ckd.bank.__main__.EmbeddingBank", Raises(KeyboardInterrupt()))
    monkeypatch.setattr(Raises, "open", lambda self, path, **_: self.run(), raising=False)
    assert bank_main(["verify", "bank"]) == 130
    assert "goes on from the last full shard" in capsys.readouterr().err

    for stop, says in ((KeyboardInterrupt(), "last checkpoint"), (Interrupted("go on"), "go on")):
        monkeypatch.setattr(train_command, "train", lambda *_, stop=stop, **__: Raises(stop).run())
        assert cli.main(["train", "--method", "plain"]) == 130
        assert says in capsys.readouterr().err


def program(code: str, **options: Any) -> subprocess.Popen[bytes]:
    """A process in which `command`, whose body is `code`, is called as a command of ckd is."""
    code = f"def command():\n    {code}\nimport sys; sys.exit(exit_status(command))"
    code = f"from ckd.cli.status import exit_status; from ckd import CkdError\n{code}"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT} | options
    return subprocess.Popen([sys.executable, "-c", code], **options)


@pytest.mark.parametrize(
    "variables",
    [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "cp1252"}, C_LOCALE],
    ids=["ascii", "cp1252", "C locale"],
)
def test_characters_that_the_terminal_lacks_are_escaped(variables: dict[str, str]) -> None:
    code = r"print('run/\udcff \u65e5\xb2'); raise CkdError('no \u65e5')"
    out, err = program(code, env={**os.environ, **variables}).communicate()
    squared = b"\xb2" if variables.get("PYTHONIOENCODING") == "cp1252" else rb"\xb2"
    assert out == rb"run/\udcff \u65e5" + squared + b"\n"
    assert err == rb"error: no \u65e5" + b"\n"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("print('much' * 100_000)", 141),
        ("print('little')", 141),  # stays in the buffer until the end
        ("print('help'); raise SystemExit(0)", 141),
        ("print('now', flush=True)", 141),
        ("import sys; print('a bar', file=sys.stderr); print('more')", 141),
        ("raise CkdError('message')", 2),
        ("raise KeyboardInterrupt", 130),
    ],
)
def test_a_closed_pipe_ends_the_program_silently(code: str, status: int) -> None:
    read, write = os.pipe()
    processes = [program(code, stdout=write, stderr=e) for e in (subprocess.PIPE, write)]
    os.close(read)
    os.close(write)
    for process in processes:
        _, err = process.communicate()
        assert process.returncode == status
        assert b"Traceback" not in (err or b"")
        assert b"BrokenPipe" not in (err or b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_to_a_full_disk_is_an_error_of_one_line() -> None:
    for code in ("print('little')", "print('much' * 100_000)"):
        with open("/dev/full", "wb") as full:
            process = program(code, stdout=full)
        _, err = process.communicate()
        assert (process.returncode, err) == (2, b"error: [Errno 28] No space left on device\n")


def test_closed_streams_are_written_to_nevertheless() -> None:
    code = "import sys; print('x'); sys.stdout.write('y'); sys.stderr.write('z')"
    process = program(code, preexec_fn=lambda: (os.close(1), os.close(2)))
    assert process.communicate() == (b"", b"")
    assert process.returncode == 0


def test_every_way_in_guards_the_output() -> None:
    for line in (["ckd", "--help"], ["ckd.info"], ["ckd.train", "--help"]):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            [sys.executable, "-m", *line], stdout=write, stderr=subprocess.PIPE, cwd=ROOT
        )
        os.close(write)
        assert (done.returncode, done.stderr) == (141, b"")


def test_python_m_ckd_is_a_program_with_an_exit_status() -> None:
    command = [sys.executable, "-m", "ckd", "bank", "info", "/nonexistent"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: /nonexistent is not a bank")


def test_the_console_script_is_the_command_line() -> None:
    tomllib = pytest.importorskip("tomllib")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["ckd"].partition(":")
    assert getattr(importlib.import_module(module), name) is cli.main


@pytest.mark.parametrize(
    ("line", "left_out"),
    [
        (["--help"], ["tyro", "ckd.train", "ckd.bank.build", "ckd.data", "ckd.models", "ckd.info"]),
        (["info"], ["ckd.train", "ckd.bank.build", "ckd.data", "ckd.models", "ckd.compare"]),
    ],
    ids=["help", "info"],
)
def test_a_command_imports_no_other(line: list[str], left_out: list[str]) -> None:
    code = f"import sys; from ckd import cli; cli.main({line}); "
    code += f"sys.exit([m for m in {left_out} if m in sys.modules] or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


HOSTILE = "\x1b]0;owned\x07\x1b[31mred\x9b2J\u202etxt\rover"


def test_names_in_files_cannot_command_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [HOSTILE, "b"]
    with ckd.BankWriter(tmp_path / "bank", 4, teacher=HOSTILE, class_names=names) as writer:
        writer.write(torch.arange(3), torch.ones(3, 4), torch.tensor([0, 0, 1]))
    assert cli.main(["bank", "info", str(tmp_path / "bank")]) == 0
    assert cli.main(["bank", "info", str(tmp_path / HOSTILE)]) == 2
    out, err = capsys.readouterr()
    escaped = HOSTILE.encode("unicode_escape").decode()
    assert out.count(escaped) == 2
    assert escaped in err
    assert not set(out + err) & (set(HOSTILE) - set(escaped))


def test_the_progress_bar_may_return_to_the_start_of_its_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with printable_output():
        print("\tbar\r\x1b[A", file=sys.stderr)
        print("\ttable\r")
    assert capsys.readouterr() == ("\ttable\\r\n", "\tbar\r\\x1b[A\n")
