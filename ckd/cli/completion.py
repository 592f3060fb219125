"""`ckd completion bash|zsh|fish`: a script that completes commands, flags, choices and files."""

from __future__ import annotations

import importlib
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import tyro

from ckd._errors import ConfigError
from ckd._hints import unknown
from ckd.cli import COMMANDS
from ckd.cli.command import parse, run
from ckd.cli.flags import Flag, flags, subcommands
from ckd.cli.help import HELP

Shell = Literal["bash", "zsh", "fish"]

# Words of a command, as in ("bank", "build") -> its flags; of ("bank",) -> its subcommands.
Leaves = Mapping[tuple[str, ...], Sequence[Flag]]
Unions = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Completion:
    """Print a script for your shell, in which TAB then completes the commands of ckd, their flags,
    the values of flags with few of them, and files. Print it again after an update of ckd.

    To keep it: in bash, into the file ~/.local/share/bash-completion/completions/ckd (make the
    folder; or into any file that ~/.bashrc reads with `source`); in zsh, into a file _ckd in a
    folder of $fpath (or into any file that ~/.zshrc reads with `source` after compinit); in fish,
    into ~/.config/fish/completions/ckd.fish.

    Example:
        ckd completion bash > ~/.local/share/bash-completion/completions/ckd
        source <(ckd completion bash)    # in this shell alone
    """

    shell: tyro.conf.Positional[Shell]
    """The shell: bash, zsh or fish."""

    def run(self) -> None:
        if self.shell not in SCRIPTS:
            raise ConfigError(unknown("shell", self.shell, SCRIPTS))
        print(script(self.shell), end="")


COMMAND = Completion


def main(argv: Sequence[str] | None = None, prog: str = "python -m ckd.cli.completion") -> int:
    """Run the command line; returns the exit status."""
    return run(lambda given: parse(Completion, given, prog), argv)


def script(shell: Shell) -> str:
    """The completion script. It holds all that it completes, so that no TAB starts Python."""
    leaves: dict[tuple[str, ...], Sequence[Flag]] = {}
    unions: dict[str, Sequence[str]] = {"help": [*COMMANDS]}
    for name, (module, _) in COMMANDS.items():
        # Of the module itself, which is this one where it runs as a program.
        command = Completion if module == __spec__.name else importlib.import_module(module).COMMAND
        if inner := subcommands(command):
            unions[name] = [*inner]
            for word, one in inner.items():
                leaves[name, word] = [*flags(one), HELP]
        else:
            leaves[name,] = [*flags(command), HELP]
    return SCRIPTS[shell](leaves, unions)


def _bash(leaves: Leaves, unions: Unions) -> str:
    def cases() -> Iterator[str]:
        for path, found in leaves.items():
            at = " ".join(path)
            for one in found:
                # A word with a colon or an equals sign is several words to bash.
                if one.choices and one.names:
                    for name in one.names:
                        yield f'"{at} {name}") words="{" ".join(one.choices)}" ;;'
                elif one.metavar and one.names and not one.files:
                    yield f'"{at} {one.names[0]}") words=" " ;;'
                elif one.files and one.names:
                    yield f'"{at} {one.names[0]}") return ;;'

    def lists() -> Iterator[str]:
        for path, found in leaves.items():
            names = " ".join(name for one in found for name in one.names)
            choices = " ".join(word for one in found if not one.names for word in one.choices)
            yield f'"{" ".join(path)}") flags="{names}" words="{choices}" ;;'
        for name, inner in unions.items():
            yield f'"{name}") flags="--help" words="{" ".join(inner)}" ;;'

    two = "|".join(dict.fromkeys(path[0] for path in leaves if len(path) == 2))
    newline = "\n        "
    return f"""\
# Completion of ckd for bash; made by `ckd completion bash`.
_ckd() {{
    local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}"
    local at="${{COMP_WORDS[1]}}" words="" flags=""
    COMPREPLY=()
    if [[ $COMP_CWORD -eq 1 ]]; then
        COMPREPLY=($(compgen -W "{" ".join(COMMANDS)} help --help --version" -- "$cur"))
        return
    fi
    # --flag=value is three words.
    if [[ $cur == "=" ]]; then
        cur=""
    elif [[ $prev == "=" ]]; then
        prev="${{COMP_WORDS[COMP_CWORD-2]}}"
    fi
    case "$at" in
        {two}) [[ $COMP_CWORD -gt 2 ]] && at="$at ${{COMP_WORDS[2]}}" ;;
    esac
    case "$at $prev" in
        {newline.join(cases())}
    esac
    if [[ -z $words ]]; then
        case "$at" in
        {newline.join(lists())}
        esac
    fi
    # With no reply, bash completes files.
    if [[ $words == " " ]]; then
        compopt +o default 2>/dev/null
    elif [[ $cur == -* && -n $flags ]]; then
        COMPREPLY=($(compgen -W "$flags" -- "$cur"))
    else
        COMPREPLY=($(compgen -W "$words" -- "$cur"))
    fi
}}
complete -o default -o bashdefault -F _ckd ckd
"""


def _zsh(leaves: Leaves, unions: Unions) -> str:
    def quoted(text: str) -> str:
        for character in "\\[]:":
            text = text.replace(character, "\\" + character)
        return text

    def values(one: Flag) -> str:
        if one.choices:
            return f"({' '.join(one.choices)})"
        return "_files" if one.files else ""

    def spec(one: Flag) -> Iterator[str]:
        text = quoted(_short(one.text))
        label = quoted(one.field)
        if not one.names:
            yield shlex.quote(f"*:{label}:{values(one)}")
        for name in one.names:
            optional = ":" if one.metavar.startswith("[") else ""
            value = f"{optional}:{label}:{values(one)}" if one.metavar else ""
            equals = "=" if one.metavar and name.startswith("--") else ""
            yield shlex.quote(f"*{name}{equals}[{text}]{value}")

    def arguments(found: Sequence[Flag]) -> str:
        lines = [line for one in found for line in spec(one)]
        return "_arguments \\\n                " + " \\\n                ".join(lines)

    newline = "\n        "
    described = [shlex.quote(f"{name}:{summary}") for name, (_, summary) in COMMANDS.items()]
    inner = [f"{name}) inner=({' '.join(words)}) ;;" for name, words in unions.items()]
    cases = [f"'{' '.join(path)}') {arguments(found)} ;;" for path, found in leaves.items()]
    return f"""\
#compdef ckd
# Completion of ckd for zsh; made by `ckd completion zsh`.
_ckd() {{
    local at=$words[2]
    local -a commands inner
    commands=(
        {newline.join(described)}
        'help:describe a command'
    )
    if (( CURRENT == 2 )); then
        _describe command commands
        return
    fi
    case $at in
        {newline.join(inner)}
    esac
    if (( $#inner )); then
        if (( CURRENT == 3 )); then
            compadd -a inner
            return
        fi
        at="$at $words[3]"
        shift words
        (( CURRENT-- ))
    fi
    shift words
    (( CURRENT-- ))
    case $at in
        {newline.join(cases)}
    esac
}}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _ckd "$@"
else
    compdef _ckd ckd
fi
"""


def _fish(leaves: Leaves, unions: Unions) -> str:
    def lines() -> Iterator[str]:
        for name, (_, summary) in COMMANDS.items():
            yield f"complete -c ckd -n '__ckd_exactly' -a {name} -d {_fish_quoted(summary)}"
        yield "complete -c ckd -n '__ckd_exactly' -a help -d 'describe a command'"
        yield "complete -c ckd -n '__ckd_exactly' -l version -d 'print the version'"
        for name, inner in unions.items():
            yield f"complete -c ckd -n '__ckd_exactly {name}' -a '{' '.join(inner)}'"
        for path, found in leaves.items():
            at = f"complete -c ckd -n '__ckd_at {' '.join(path)}'"
            for one in found:
                text = _fish_quoted(_short(one.text))
                takes = f" -x -a '{' '.join(one.choices)}'" if one.choices else " -x"
                takes = " -r -F" if one.files else takes if one.metavar else ""
                for name in one.names:
                    form = f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
                    yield f"{at} {form}{takes} -d {text}"
                if not one.names:
                    words = f"-a '{' '.join(one.choices)}'" if one.choices else "-F"
                    yield f"{at} {words}"

    return f"""\
# Completion of ckd for fish; made by `ckd completion fish`.
function __ckd_at
    set -l words (commandline -opc)
    set -e words[1]
    set -l length (count $argv)
    test (count $words) -ge $length
    and test "$words[1..$length]" = "$argv"
end
function __ckd_exactly
    set -l words (commandline -opc)
    set -e words[1]
    test "$words" = "$argv"
end
complete -c ckd -f
{chr(10).join(lines())}
"""


def _fish_quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _short(text: str) -> str:
    """The beginning of a flag's text, as a shell shows it beside the flag."""
    begin = text.partition(". ")[0].partition(";")[0].rstrip(".")
    return textwrap.shorten(begin, 60, placeholder=" ...")


SCRIPTS: Mapping[str, Callable[[Leaves, Unions], str]] = {
    "bash": _bash,
    "zsh": _zsh,
    "fish": _fish,
}
assert tuple(SCRIPTS) == get_args(Shell)

if __name__ == "__main__":
    sys.exit(main())
