"""Shared by the benchmark commands: flags and their checks, output files, clean exits."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from ckd import models
from ckd.models import catalog
from common.report import Record


def run(main: Callable[[], int]) -> NoReturn:
    """Exit with the status that `main` returns. A signal is raised as an exception, so that every
    `finally` runs and no process or temporary folder outlives the command."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of the tables, `head` say, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose description is the first line of the command's docstring."""
    summary, *_ = (doc or "").splitlines()
    return argparse.ArgumentParser(description=summary)


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="threads of torch (default: %(default)s)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    choices, words = ("cpu", "cuda"), "(default: %(default)s)"
    parser.add_argument("--device", choices=choices, default=default, help=words)


def add_files(parser: argparse.ArgumentParser, **others: str) -> None:
    """Add --out, --show, and `others`: names and help of further output files."""
    parser.add_argument("--out", type=Path, help="write everything measured to this JSON file")
    for name, words in others.items():
        parser.add_argument(f"--{name}", type=Path, help=words)
    parser.add_argument("--show", type=Path, help="print the tables of an --out file, and exit")


def parse(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    check: Callable[[argparse.Namespace], None],
    benchmark: str,
) -> argparse.Namespace:
    """Parse the arguments of a parser with `add_files`. With --show, `options.record` is the record
    of that `benchmark`; else `check` fills in defaults. A ValueError is a usage error."""
    options = parser.parse_args(arguments)
    try:
        check_outputs(options)
        if options.show:
            options.record = read_record(options.show, benchmark)
        else:
            check(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def check_outputs(options: argparse.Namespace) -> None:
    """Raise ValueError if an output file cannot be written; called before any measurement."""
    for name in ("out", "csv", "plot"):
        if getattr(options, name, None) is not None:
            check_output(f"--{name}", getattr(options, name))
    if getattr(options, "plot", None) and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'ckd[plots]'")


def check_output(flag: str, path: Path) -> None:
    folder = path.parent
    if path.exists() and not path.is_file():
        raise ValueError(f"{flag}: expected a file to write, got a folder or device, {path}")
    if not folder.is_dir():
        raise ValueError(f"{flag}: expected a file in a folder that exists, got {path}")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{flag}: expected a file in a folder that can be written, got {path}")


def check_least(options: argparse.Namespace, **least: int) -> None:
    """Raise ValueError if an option is below its least value."""
    for name, value in least.items():
        if getattr(options, name) < value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag}: expected at least {value}, got {getattr(options, name)}")


def check_device(options: argparse.Namespace) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected cpu, got cuda: torch sees no GPU")


def check_seconds(seconds: float) -> None:
    if not 0 < seconds < math.inf:
        raise ValueError(f"--seconds: expected a positive number, got {seconds}")


def check_names(flag: str, names: list[str]) -> None:
    """Raise ValueError if a name is given twice."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{flag}: expected each name once, got {name!r} {names.count(name)} times"
            )


def check_model(flag: str, name: str, size: int, others: str = "") -> None:
    """Raise ValueError unless `name` is a model spec that takes images of this size; the size is
    not checked for timm: and hf:, slow to create. `others`: further values, for the error."""
    if size < 1:
        raise ValueError(f"--image-size: expected at least 1, got {size}")
    if not catalog.is_spec(name):
        raise ValueError(
            f"{flag}: expected {others}a model spec ({', '.join(models.known())}), got {name!r}"
        )
    if catalog.is_library(name):
        return
    try:
        with torch.device("meta"):  # shapes without memory
            models.create(name, num_classes=2, image_size=size, in_channels=3)
    except models.ModelError as error:
        raise ValueError(f"{flag}: expected a model for {size} px, got {error}") from error


def read_record(path: Path, benchmark: str) -> Record:
    """Read an --out file of `benchmark`. Raises ValueError that names --show and the file."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--show: {path} cannot be read: {error}") from error
    if not isinstance(record, dict) or record.get("benchmark") != benchmark:
        raise ValueError(
            f"--show: expected a file that bench_{benchmark}.py --out wrote, got {path}"
        )
    return record


def show(options: argparse.Namespace, print_record: Callable[[Record], None]) -> int:
    """Print the record of --show; returns the exit status: 2, with the reason on stderr, if the
    record is incomplete."""
    try:
        print_record(options.record)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        print(f"--show: {options.show} is damaged ({reason})", file=sys.stderr)
        return 2
    return 0
