"""python -m ckd.train: train a student, resume or evaluate a run; without arguments, the demo."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ckd._hints import check_choices
from ckd.cli.command import parse as parse_flags
from ckd.cli.command import run
from ckd.train.config import Config
from ckd.train.demo import Demo
from ckd.train.errors import ConfigError, Interrupted
from ckd.train.evaluation import evaluate_source
from ckd.train.loop import train
from ckd.train.run import CONFIG

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
class Command:
    """Train a student. Without any argument: a demonstration on handwritten digits."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    resume: _OptionalPath | None = None
    """Go on with RUN; or, without RUN, with the one that this command began, if it did."""
    eval: str | None = None
    """Only score this run folder, .safetensors file or model spec on the test data."""

    def run(self) -> None:
        if self.eval is not None:
            check_choices(self.config)
            print(evaluate_source(self.config, self.eval))
            return
        result = train(self.config, resume=self.resume is not None)
        print(
            f"{self.config.folder}: test accuracy {result['test_accuracy']:.2%} after "
            f"{result['epochs']} epochs, {result['train_time_s']:.0f} s of training"
        )


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """The command line; the exit status."""
    return run(
        lambda given: parse(given, prog) if given else Demo(),
        argv,
        interrupted="interrupted; what the last checkpoint holds is safe",
        interruptions=(KeyboardInterrupt, Interrupted),
    )


def parse(argv: Sequence[str], prog: str = PROG) -> Command:
    """Flags, over the settings of the run folder that is resumed or evaluated, if one is named."""
    command = _parse(argv, prog, Config())
    folder = stored_run(command)
    if folder is None:
        return command
    stored = Config.load(folder / CONFIG)
    if command.resume is not None:
        stored = dataclasses.replace(stored, out=str(folder))  # it may have been moved
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
        folder = Path(command.eval)
        return folder if (folder / CONFIG).exists() else None
    if command.resume is None:
        return None
    folder = Path(command.resume) if command.resume else command.config.folder
    if (folder / CONFIG).exists():
        return folder
    if command.resume:
        raise ConfigError(
            f"--resume {folder}: no run is there ({CONFIG} is missing); to begin one, give its "
            f"settings and --out {folder}"
        )
    return None


if __name__ == "__main__":
    sys.exit(main())
