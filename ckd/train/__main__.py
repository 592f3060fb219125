"""python -m ckd.train: train a student, resume or evaluate a run; without arguments, the demo."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ckd import CkdError
from ckd._hints import check_choices
from ckd.cli import parsing
from ckd.train.config import Config
from ckd.train.demo import run_demo
from ckd.train.errors import ConfigError, Interrupted
from ckd.train.evaluation import evaluate_source
from ckd.train.loop import train
from ckd.train.run import CONFIG

# What a user can cause, and its message explains; anything else is a bug and keeps its traceback.
USER_ERRORS = (CkdError, ImportError, OSError)

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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit status: 0, 2 for an error, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if not argv:
            run_demo()
            return 0
        command = parse(argv)
        if command.eval is not None:
            check_choices(command.config)
            print(evaluate_source(command.config, command.eval))
            return 0
        result = train(command.config, resume=command.resume is not None)
        print(
            f"{command.config.folder}: test accuracy {result['test_accuracy']:.2%} after "
            f"{result['epochs']} epochs, {result['train_time_s']:.0f} s of training"
        )
        return 0
    except Interrupted as error:
        print(f"\n{error}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\ninterrupted; what the last checkpoint holds is safe", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse(argv: Sequence[str]) -> Command:
    """Flags, over the settings of the run folder that is resumed or evaluated, if one is named."""
    command = _cli(argv, Config())
    folder = stored_run(command)
    if folder is None:
        return command
    stored = Config.load(folder / CONFIG)
    if command.resume is not None:
        stored = dataclasses.replace(stored, out=str(folder))  # it may have been moved
    command = _cli(argv, stored)
    if command.resume is not None and command.config.folder != folder:
        raise ConfigError(
            f"--resume names the run {folder}, --out names {command.config.folder}; leave out one"
        )
    return command


def _cli(argv: Sequence[str], defaults: Config) -> Command:
    return parsing.parse(Command, argv, "python -m ckd.train", default=Command(defaults))


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
