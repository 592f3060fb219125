"""The help of the commands, and the one line that a misused command prints."""

from __future__ import annotations

import dataclasses
import importlib
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

import ckd
from ckd import cli
from ckd.cli.command import Output, parse
from ckd.cli.flags import flags, subcommands
from ckd.cli.headings import HEADINGS, OUTPUT_FLAGS, command_name
from ckd.cli.help import command_help

ROOT = Path(__file__).parents[1]


def commands() -> dict[str, Any]:
    """The dataclass of each command, subcommands included, by its words."""
    found = {}
    for name, (module, _) in cli.COMMANDS.items():
        command = importlib.import_module(module).COMMAND
        inner = subcommands(command)
        found |= {f"{name} {word}": one for word, one in inner.items()} or {name: command}
    return found


def helped(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    return cli_output([*line.split(), "--help"], capsys)


def test_commands_stand_under_headings_with_an_example_each(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = helped("", capsys).splitlines()
    headings = [line for line in lines if re.fullmatch(r"[a-z].*:", line)]
    assert headings == [f"{heading}:" for heading in cli.GROUPS]
    for name, entry in cli.ENTRIES.items():
        at = next(i for i, line in enumerate(lines) if line.startswith(f"  {name} "))
        assert lines[at + 1].strip() == entry.example
        assert name in entry.example.split()[:4] or f"(ckd {name} " in entry.example


@pytest.mark.parametrize("line", ["", "bank", *commands()])
def test_help_fits_80_columns_is_plain_and_shows_an_example(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = helped(line, capsys)
    assert max(map(len, text.splitlines())) <= 80
    assert text.isascii()
    assert text.isprintable() or set(text) - {"\n"} <= set(map(chr, range(32, 127)))
    examples = re.findall(r"^ +(?:source <\()?ckd .*", text, re.MULTILINE)
    assert examples
    for example in examples:  # each runs what it helps with
        assert line in example


@pytest.mark.parametrize("example", [e.example for e in cli.ENTRIES.values()])
def test_the_flags_of_examples_exist(example: str) -> None:
    words = example.removeprefix("source <(").rstrip(")").split()[1:]
    known = commands()
    name = next(n for n in (" ".join(words[:2]), words[0]) if n in known)
    names = {name for flag in flags(known[name]) for name in flag.names}
    assert {word for word in words if word.startswith("--")} <= names


@pytest.mark.parametrize("name", [*HEADINGS])
def test_every_flag_of_a_grouped_command_has_one_heading(name: str) -> None:
    own = [flag.field for flag in flags(commands()[name]) if flag.names]
    grouped = [field for fields in HEADINGS[name].values() for field in fields]
    assert sorted(grouped) == sorted(set(own) - {*OUTPUT_FLAGS})


@pytest.mark.parametrize("name", [*commands()])
def test_help_describes_every_field(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = commands()[name]
    text = helped(name, capsys)
    for flag in flags(command):
        assert flag.text, flag.field
        assert flag.usage in text
        assert " ".join(flag.text.split()[:3]) in " ".join(text.split())


@pytest.mark.parametrize(
    ("prog", "name"),
    [
        ("ckd train", "train"),
        ("python -m ckd bank build", "bank build"),
        ("python -m ckd.bank build", "bank build"),
        ("python -m ckd.train", "train"),
    ],
)
def test_a_command_has_one_name_however_it_is_called(prog: str, name: str) -> None:
    assert command_name(prog) == name


@dataclass(frozen=True, kw_only=True)
class Sample(Output):
    """Do a thing."""

    name: str = "\x1b[31mred"
    """The name."""
    rate: float = 0.0
    """A rate."""
    many: tuple[int, ...] = (1, 2)
    """Some numbers."""
    way: Literal["a", "b"] | None = None
    """The way;
    default: by chance."""
    deep: bool = True
    """Whether deep."""


def test_defaults_are_shown_unless_the_text_names_them_and_cannot_command_the_terminal() -> None:
    lines = command_help(Sample, "ckd sample").splitlines()
    shown = {line.split()[0]: line.partition("(default: ")[2] for line in lines if "--" in line}
    assert shown["--name"] == "\\x1b[31mred)"
    assert (shown["--rate"], shown["--many"], shown["--json"]) == ("0.0)", "1 2)", "")
    assert "  --way {None,a,b}        The way; default: by chance." in lines
    assert "  --deep, --no-deep       Whether deep. (default: on)" in lines


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "train --epoch 3",
            "; known, nearest first: --epochs, --warmup-epochs, --teacher, ...; see",
        ),
        ("train --epochs x", "--epochs: expected an integer, got 'x'"),
        ("train --lr fast --no-flip", "--lr: expected a number, got 'fast'"),
        ("train --image-size big", "--image-size: expected an integer, got 'big'"),
        ("train --epochs", "--epochs needs a value"),
        ("train --no-flip yes", "unexpected yes"),
        ("train --tyro-print-completion bash", "unknown flag '--tyro-print-completion'"),
        ("eval", "STUDENT is missing: A run folder"),
        ("bank", "it takes build, info, verify or neighbours"),
        ("bank inof x", "unknown command 'inof'; known, nearest first: info, "),
        ("bank --json", "unknown command '--json'"),
        ("bank info", "BANK is missing: The folder of the bank"),
        ("bank build --teacher x", "--out PATH is missing: "),
        ("bank info x --per-class 1e3", "--per-class: expected an integer, got '1e3'"),
        ("info \x1b[31mred", "unexpected \\x1b[31mred"),
    ],
)
def test_misuse_is_one_line_that_names_the_remedy_and_status_2(
    line: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(line.split(" "))
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err.count("\n")) == (2, "", 1)
    words = line.split()[:2] if "info x" in line or "build" in line else line.split()[:1]
    prog = " ".join(["ckd", *words])
    assert err.startswith(f"error: {prog}")
    assert says in err
    assert re.search(rf"; see {prog}( info)? --help\n$", err)


def test_what_follows_two_dashes_is_no_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["info", "--", "--help"])
    assert caught.value.code == 2
    assert "--help" in capsys.readouterr().err


def test_help_is_also_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["help"], ["help", "bank"], ["help", "bank", "info"]):
        with_word = cli_output(words, capsys)
        assert with_word == cli_output([*words[1:], "--help"], capsys)
        assert with_word.startswith("usage: ckd")
    assert cli.main(["help", "trian"]) == 2
    assert "nearest first: train" in capsys.readouterr().err


def cli_output(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        status = cli.main(words)
    except SystemExit as stop:
        status = stop.code  # type: ignore[assignment]
    assert status == 0
    return capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ckd {ckd.__version__}\n"
    assert cli.main(["--verison"]) == 2
    assert "nearest first: --version" in capsys.readouterr().err


def on_a_terminal(code: str) -> str:
    """What a program prints to stdout and stderr, which are a pseudo-terminal."""
    master, slave = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM", "COLUMNS")}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=ROOT,
        env=environment,
    ):
        os.close(slave)
        return b"".join(_all_of(master)).decode()


def _all_of(master: int) -> Iterator[bytes]:
    with os.fdopen(master, "rb", buffering=0) as stream:
        while True:
            try:
                block = stream.read(4096)
            except OSError:  # Linux's end of a pseudo-terminal
                return
            if not block:
                return
            yield block


BOLD = "\x1b[1m"
LINES = [["--help"], ["bank", "--help"], ["info", "--help"], ["info", "--nonsense"], ["trian"]]
VARIABLES: list[tuple[dict[str, str], bool]] = [
    ({"TERM": "xterm-256color"}, True),
    ({"TERM": "xterm-256color", "NO_COLOR": ""}, True),
    ({"TERM": "xterm-256color", "NO_COLOR": "1"}, False),
    ({"TERM": "dumb"}, False),
    ({}, False),
]


def test_a_terminal_shows_bold_headings_unless_plain_text_is_asked_for() -> None:
    code = f"""
import os
from ckd import cli
for variables, _ in {VARIABLES}:
    os.environ.update(variables)
    for line in {LINES}:
        try: cli.main(line)
        except SystemExit: pass
    for name in variables: del os.environ[name]
    print("then", flush=True)
"""
    texts = on_a_terminal(code).split("then\r\n")
    for text, (variables, bold) in zip(texts, VARIABLES, strict=False):
        assert "unknown command 'trian'" in text
        assert "unknown flag '--nonsense'" in text
        assert text.count("usage:") == 3
        assert text.count(f"{BOLD}usage:") == 3 * bold, variables
        assert set(re.findall(r"\x1b[^m]*m", text)) == ({BOLD, "\x1b[0m"} if bold else set())


def test_fields_keep_the_meaning_of_tyros_marks() -> None:
    command = parse(Sample, ["--json", "--no-deep", "--many", "3"], "ckd sample")
    assert dataclasses.replace(command, name="") == Sample(
        name="", json=True, deep=False, many=(3,)
    )
