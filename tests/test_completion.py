"""`ckd completion`: its scripts, executed by the shells that are installed."""

from __future__ import annotations

import functools
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ckd import cli
from ckd.cli.completion import SCRIPTS, script
from ckd.cli.flags import flags, subcommands

script = functools.cache(script)


def shell(name: str) -> str:
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"needs {name}")
    return program


def in_bash(line: str, folder: Path) -> list[str]:
    """The replies of bash to TAB at the end of this line, split as readline splits it."""
    words = line.replace("=", " = ").split(" ")
    (folder / "ckd.bash").write_text(script("bash"))
    program = 'source ckd.bash; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _ckd; '
    program += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        [shell("bash"), "--norc", "-c", program, "bash", *words],
        capture_output=True,
        text=True,
        cwd=folder,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


# The line, and all words that complete it; None: files, which bash adds to an empty reply.
LINES = [
    ("ckd tr", ["train"]),
    ("ckd --v", ["--version"]),
    ("ckd bank ", ["build", "info", "verify", "neighbours"]),
    ("ckd bank ne", ["neighbours"]),
    ("ckd help ba", ["bank"]),
    ("ckd train --epo", ["--epochs"]),
    ("ckd train --lr 1e-3 --no-fl", ["--no-flip"]),
    ("ckd train --method ", ["plain", "logit-kd", "teacher-kd", "embed-kd"]),
    ("ckd train --method=emb", ["embed-kd"]),
    ("ckd train --method=", ["plain", "logit-kd", "teacher-kd", "embed-kd"]),
    ("ckd train --bank ", None),
    ("ckd train --bank=ba", None),
    ("ckd train --epochs ", None),
    ("ckd bank build --split ", ["train", "test"]),
    ("ckd bank info --pl", ["--plot"]),
    ("ckd bank info ", None),
    ("ckd bank verify --fu", ["--full"]),
    ("ckd completion ", ["bash", "zsh", "fish"]),
    ("ckd completion f", ["fish"]),
    ("ckd nonsense ", None),
    ("ckd train $(touch${IFS}made) ", None),
]


@pytest.mark.parametrize(("line", "words"), LINES, ids=[line for line, _ in LINES])
def test_bash_completes(line: str, words: list[str] | None, tmp_path: Path) -> None:
    assert in_bash(line, tmp_path) == (words or [])
    assert not (tmp_path / "made").exists()


def test_bash_completes_files_by_itself(tmp_path: Path) -> None:
    (tmp_path / "ckd.bash").write_text(script("bash"))
    done = subprocess.run(
        [shell("bash"), "--norc", "-c", "source ckd.bash; complete -p ckd"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert "-o default" in done.stdout
    assert "-F _ckd ckd" in done.stdout


@pytest.mark.parametrize(
    ("line", "words"),
    [(line, words) for line, words in LINES if words and "=" not in line],
    ids=[line for line, words in LINES if words and "=" not in line],
)
def test_fish_completes(line: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "ckd.fish").write_text(script("fish"))
    done = subprocess.run(
        [shell("fish"), "--no-config", "-c", 'source ckd.fish; complete -C "$argv[1]"', line],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert sorted(row.split("\t")[0] for row in done.stdout.splitlines()) == sorted(words)


@pytest.mark.parametrize("name", [*SCRIPTS])
def test_the_shell_parses_its_script(name: str, tmp_path: Path) -> None:
    (tmp_path / "script").write_text(script(name))
    done = subprocess.run([shell(name), "-n", "script"], capture_output=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("name", [*SCRIPTS])
def test_every_flag_of_every_command_is_completed(name: str) -> None:
    text = script(name)
    for module, _ in cli.COMMANDS.values():
        command = importlib.import_module(module).COMMAND
        for one in (subcommands(command) or {"": command}).values():
            for flag in flags(one):
                for long in flag.names:
                    assert (f"-l {long[2:]}" if name == "fish" else long) in text


def test_the_script_names_no_program_but_ckd_and_the_shells_own() -> None:
    for name in SCRIPTS:  # no TAB starts Python
        assert "python" not in script(name).replace("`python -m ckd.bank build`", "")


def test_the_command_prints_the_script_and_refuses_other_shells(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == script("bash")
    assert cli.main(["completion", "bsh"]) == 2
    assert "unknown shell 'bsh'; known, nearest first: bash" in capsys.readouterr().err


def test_the_module_is_a_program_too() -> None:
    command = [sys.executable, "-m", "ckd.cli.completion", "fish"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout == script("fish")
