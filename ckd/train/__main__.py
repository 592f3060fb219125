"""python -m ckd.train: train a student, resume or evaluate a run; without arguments, the demo."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ckd._files import user_path
from ckd._hints import check_choices
from ckd._json import document
from ckd.cli.command import Output, run
from ckd.cli.command import parse as parse_flags
from ckd.train.config import Config
from ckd.train.demo import Demo
from ckd.train.errors import ConfigError, Interrupted
from ckd.train.evaluation import evaluate_source
from ckd.train.loop import train
from ckd.train.page import REPORT
from ckd.train.report import result_words
from ckd.train.stored import CONFIG, is_run, stored_config

PROG = "python -m ckd.train"

# `--resume` or `--resume RUN`
_OptionalPath = Annotated[
    str,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[RUN]",
        instance_from_str=lambda given: given[0] if given else "",
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    ),
]


@dataclass(frozen=True)
class Command(Output):
    """Train a student, resume a run or score one. Without arguments: the demo on digits."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    resume: _OptionalPath | None = None
    """Resume RUN; without RUN, resume the run in the --out folder, or begin it."""
    eval: str | None = None
    """Do not train: score this run folder, .safetensors file or model spec on the test data."""

    def run(self) -> None:
        if self.eval is not None:
            check_choices(self.config)
            scores = evaluate_source(self.config, self.eval)
            print(document(scores._asdict()) if self.json else scores)
            return
        result = train(self.config, resume=self.resume is not None)
        folder, epochs = self.config.folder, result["epochs"]
        if self.json:
            print(document({"run": str(folder), **result}))
            return
        # Runs that an earlier version finished have no report.
        report = f"; see {folder / REPORT}" if (folder / REPORT).exists() else ""
        print(
            f"{folder}: {result_words(result)} after {epochs} epoch{'s' * (epochs > 1)}, "
            f"{result['train_time_s']:.0f} s of training{report}"
        )


COMMAND = Command


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command line; returns the exit status."""
    return run(
        lambda given: parse(given, prog) if given else Demo(),
        argv,
        interrupted="interrupted; the last checkpoint, if there is one, is intact",
        interruptions=(KeyboardInterrupt, Interrupted),
    )


def parse(argv: Sequence[str], prog: str = PROG) -> Command:
    """Parse the flags; the settings stored with a run that is resumed or evaluated are defaults."""
    command = _parse(argv, prog, Config())
    folder = stored_run(command)
    if folder is None:
        return command
    stored = stored_config(folder)
    if command.eval is not None:  # the student, to which the settings of its teacher do not apply
        stored = dataclasses.replace(stored, teacher_weights=None, teacher_classes=None, pool=None)
    if command.resume is not None:
        stored = dataclasses.replace(stored, out=str(folder))  # the folder may have been moved
    if command.config.bank:  # in place of the stored ones: --bank adds to its default
        stored = dataclasses.replace(stored, bank=())
    command = _parse(argv, prog, stored)
    if command.resume is not None and command.config.folder != folder:
        raise ConfigError(
            f"--resume names the run {folder}, --out names {command.config.folder}; leave out one"
        )
    return command


def _parse(argv: Sequence[str], prog: str, defaults: Config) -> Command:
    return parse_flags(Command, argv, prog, default=Command(defaults))


def stored_run(command: Command) -> Path | None:
    """The folder whose config.json gives the defaults of this command, if there is one."""
    if command.eval is not None:
        folder = user_path(command.eval)
        return folder if is_run(folder) else None
    if command.resume is None:
        return None
    folder = user_path(command.resume) if command.resume else command.config.folder
    if is_run(folder):
        return folder
    if command.resume:
        raise ConfigError(
            f"--resume {folder}: no run is there ({CONFIG} is missing); to begin one, give its "
            f"settings and --out {folder}"
        )
    return None


if __name__ == "__main__":
    sys.exit(main())
