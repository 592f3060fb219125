"""The files that the package reads back, and for each the code that reads it."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from ckd import compare, models
from ckd.bank import EmbeddingBank
from ckd.train import loop, report
from ckd.train.metrics import METRICS
from ckd.train.stored import read_result, stored_config
from tests.campaign.child import Ended, Result, in_child
from tests.campaign.commands import commands, difference, fresh, import_bank, resume, run_result
from tests.train_runs import tiny_config

CASE, INPUTS = Path("case"), Path("inputs")  # in the sandbox
SLACK = 48 << 20  # bytes of memory that a reader may take beyond those of an undamaged file
SECONDS = 10.0


class Late(Exception):
    """Damaged metrics that were found only after a step of training."""


class Target(NamedTuple):
    """A file in a folder `origin`, and `read`, which raises or returns what it found there."""

    origin: Path
    file: str
    read: Callable[[], Any]
    expected: Any
    growth: int  # of the memory of `read` for undamaged files

    @property
    def size(self) -> int:
        path = self.origin / self.file
        return path.stat().st_size if path.is_file() else 0

    def judge(self, ended: Ended, *, exact: bool = True, names: tuple[str, ...] = ()) -> Result:
        """Whether a reader of damaged files kept the promise.

        exact: it may not accept other content. names: of which its error must have one, besides
        the file's own.
        """
        if ended.death:
            return Result("hang" if ended.death == "hang" else "death", ended.death)
        if (failure := ended.failure) is not None:
            if not failure.typed:
                return Result("untyped", str(failure))
            if not any(name in failure.text for name in (self.file, *names)):
                return Result("unnamed", str(failure))
        if ended.growth > self.growth + 2 * self.size + SLACK:
            return Result("memory", f"{ended.growth >> 20} MiB for {self.size} bytes")
        if failure is not None:
            return Result("named error")
        told = difference(ended.value, self.expected) if exact else ""
        return Result("silent", told) if told else Result("accepted")


class Targets:
    """The targets, and the folder in which all their cases run.

    Runs hold their own path and times: with relative paths, in the working directory `sandbox`, and
    made by a clock that counts, their files are the same on every day and machine.
    """

    def __init__(self, root: Path) -> None:
        torch.set_num_threads(1)
        self.root = root / "targets"
        self.sandbox, self.inputs = self.root / "sandbox", self.root / "inputs"
        self.case = self.sandbox / CASE
        self.root.mkdir()
        commands(self.inputs)
        bank, part, half, trained, finished = (
            self.root / name for name in ("bank", "part", "half", "trained", "finished")
        )
        for folder, make in (
            (bank, import_case),
            (part, _import_part),
            (half, lambda: _train(until=9)),
            (finished, _train),
        ):
            self.empty()
            self.run(make)
            self.case.rename(folder)
        shutil.copytree(finished, trained)
        for name in ("result.json", "student.safetensors"):
            (trained / name).unlink()
        self.all = [
            *self._of(bank, _files(bank), open_bank),
            *self._of(part, _files(part), finish_bank),
            *self._of(half, _files(half), resume_run),
            *self._of(half, ["checkpoint/step-00000009/state.json", "metrics.jsonl"], resume_run),
            *self._of(trained, ["metrics.jsonl", "config.json"], resume_run),
            *self._of(finished, ["result.json", "config.json"], compare_run),
            *self._of(finished, ["student.safetensors"] * 4, load_student),
        ]

    def _of(self, origin: Path, files: list[str], read: Callable[[], Any]) -> list[Target]:
        self.copy(origin)
        ended = self.run(read)
        assert ended.value is not None, (origin, ended)
        return [Target(origin, file, read, ended.value, ended.growth) for file in files]

    def empty(self) -> None:
        """Empty the sandbox, but for a link to the inputs."""
        fresh(self.root / "nothing", self.sandbox).mkdir()
        (self.sandbox / "inputs").symlink_to(self.inputs)

    def copy(self, origin: Path) -> Path:
        """A new sandbox with a copy of `origin` as the case; returns its path."""
        self.empty()
        return fresh(origin, self.case)

    def run(self, task: Callable[[], Any], *, seconds: float = SECONDS) -> Ended:
        """Run `task` in a child, in the sandbox."""

        def inside() -> Any:
            os.chdir(self.sandbox)
            return task()

        return in_child(inside, seconds=seconds)


targets_in = functools.cache(Targets)  # for two stages


def import_case() -> Any:
    """Import the bank, or resume."""
    return import_bank(INPUTS, CASE)


def _import_part() -> None:
    """An import that dies after its second shard."""
    replace, calls = os.replace, []

    def dying(*args: Any) -> None:
        calls.append(args)
        replace(*args) if len(calls) < 6 else os._exit(9)

    os.replace = dying  # type: ignore[assignment]
    import_case()


def _train(until: int = 1000) -> None:
    """A run that dies before the step `until`."""
    original, ticks = loop.step_generator, itertools.count()

    def dying(seed: int, at: int, device: Any) -> Any:
        return original(seed, at, device) if at < until else os._exit(9)

    loop.step_generator = dying
    time.monotonic = lambda: next(ticks) / 64
    report.PeakMemory.read = lambda _: {"peak_rss_mib": 90.0, "start_rss_mib": 50.0}
    settings = {"checkpoint_steps": 3, "ema": 0.9, "distill": "contrastive,mse"}
    resume(tiny_config(INPUTS, out=str(CASE), **settings))


def _files(folder: Path) -> list[str]:
    found = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
    return [name for name in found if not name.startswith(".")]


def open_bank() -> Any:
    """Everything that a bank holds."""
    bank = EmbeddingBank.open(CASE)
    bank.class_counts(), bank.centroids()
    tensors = (bank.embeddings(), bank.labels, bank.sample_ids)
    found = bank.neighbours()
    tensors += (found.rows, found.weights, found.lse, found.mean)
    left = found.temperature, found.left_out_mean, found.left_out_max
    return [t.numpy().tobytes() for t in tensors], dict(bank.meta), bank.class_names, left


def finish_bank() -> Any:
    """Resume the import, and open the bank."""
    import_case()
    return open_bank()


def resume_run() -> Any:
    """Resume as `python -m ckd.train --resume` does; damaged metrics must show before a step."""
    config = stored_config(CASE)
    taken = []
    original = loop.optimizer_step

    def counted(*args: Any) -> Any:
        values = original(*args)
        taken.append(values)
        return values

    with mock.patch.object(loop, "optimizer_step", counted):
        try:
            resume(config)
        except Exception as error:
            if taken and METRICS in str(error):
                raise Late(f"after {len(taken)} steps: {error!r}") from error
            raise
    return run_result(CASE)


def compare_run() -> Any:
    """The two tables, and what a second `--resume` of the finished run returns."""
    result = {**read_result(CASE), "run": "r"}
    tables = compare.table([result]), compare.seed_table(compare.group_seeds([CASE]))
    resume(stored_config(CASE))
    return result, stored_config(CASE), tables


def load_student() -> Any:
    """The weights and the description of a student, and of its map to the teacher."""
    student = models.load_student(CASE)
    model = student.model
    weights = {
        name: (t.dtype, t.shape, t.numpy().tobytes()) for name, t in student.state_dict().items()
    }
    described = (model.spec, model.num_classes, model.image_size, model.in_channels, model.mean)
    names = [one.name for one in student.teachers], models.files.class_names(CASE)
    return weights, described, model.class_names, names, str(model.resize)
