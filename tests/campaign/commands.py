"""The commands that are killed and disturbed, on tiny data; each, run again, goes on."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from ckd import models
from ckd._lock import LOCK_FILE
from ckd.bank import neighbours, npy
from ckd.bank.build import build_bank
from ckd.bank.manifest import MANIFEST_NAME, read_manifest
from ckd.bank.shards import map_shard
from ckd.data import load
from ckd.neighbours import build_neighbours
from ckd.train import Config, checkpoint, loop, report, train
from ckd.train.stored import STUDENT, read_result
from tests.bank_tools import CLASSES, files_of, sample
from tests.campaign.calls import Calls, Plan
from tests.campaign.child import Failure, Result, in_child
from tests.train_runs import outcome, tiny_config


class Command(NamedTuple):
    """`run` makes a folder or goes on with it; `result` must equal that of an undisturbed run."""

    name: str
    run: Callable[[Path], Any]
    result: Callable[[Path], Any]
    progress: Callable[[Path], int]  # verifies the folder, complete or not


class Prepared(NamedTuple):
    """A command with the folders from which a case starts, and what an undisturbed run gives."""

    command: Command
    starts: tuple[Path, ...]  # an empty one, and one of a run that died half way
    floors: tuple[int, ...]  # their progress
    expected: Any
    calls: dict[tuple[Path, bool], list[str]]  # (start, no_flock) -> names of its calls


def commands(inputs: Path) -> list[Command]:
    """The commands; their inputs are made in `inputs`."""
    inputs.mkdir()
    ids, rows, labels = sample()
    for name, values in (("ids", ids), ("rows", rows), ("labels", labels)):
        np.save(inputs / f"{name}.npy", values.numpy())
    (inputs / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    config = tiny_config(inputs, checkpoint_steps=3, ema=0.9, distill="contrastive,mse")
    teacher = models.load(inputs / "teacher.safetensors")
    images = load(config.data)
    return [
        Command("import", lambda path: import_bank(inputs, path), bank_result, _bank_progress),
        Command(
            "build",
            lambda path: build_bank(
                images, teacher, path, batch_size=20, rows_per_shard=32, progress=False
            ),
            bank_result,
            _bank_progress,
        ),
        Command(
            "train",
            lambda path: resume(replace(config, out=str(path))),
            run_result,
            _run_progress,
        ),
        Command("student", lambda path: _save(teacher, path), files_of, _student_progress),
    ]


def import_bank(inputs: Path, path: Path, rows: Path | None = None) -> Any:
    """Import a bank, and find its nearest rows."""
    names = {"labels": inputs / "labels.npy", "ids": inputs / "ids.npy"}
    names["class_names"] = inputs / "classes.txt"
    bank = npy.import_npy(rows or inputs / "rows.npy", path, **names, rows_per_shard=16)
    build_neighbours(path, k=3, exact=True, rows_per_part=20, progress=False)
    return bank


def resume(config: Config) -> None:
    """Train, or go on; without curves.png, which takes matplotlib a second."""
    with mock.patch.object(loop, "draw_curves"):
        train(config, resume=True, verbose=False)


def bank_result(bank: Path) -> dict[str, bytes]:
    """The files. A process that died after its last write leaves a lock file, which is harmless."""
    files = [path for path in bank.rglob("*") if path.is_file() and not _is_lock(path)]
    return {str(path.relative_to(bank)): path.read_bytes() for path in files}


def _is_lock(path: Path) -> bool:
    return path.name.startswith(LOCK_FILE)


def run_result(run: Path) -> Any:
    """`outcome`, result.json without times, and the names of all files."""
    result = read_result(run)
    kept = {k: v for k, v in result.items() if "time" not in k and "rss" not in k}
    kept.pop("images_per_s")
    paths = [path for path in run.rglob("*") if not _is_lock(path)]
    names = {str(path.relative_to(run)): path.is_dir() for path in paths}
    return outcome(run), kept, names


def _save(teacher: Any, path: Path) -> None:
    path.mkdir(exist_ok=True)
    models.save(teacher, path / STUDENT, class_names=[f"class {c}" for c in range(3)])


def _bank_progress(path: Path) -> int:
    if not (path / MANIFEST_NAME).exists():
        return 0
    manifest = read_manifest(path)
    for record in manifest.shards:
        map_shard(path, record, manifest.dim, "full")
    done = manifest.rows + manifest.complete
    if neighbours.exist(path):
        found = neighbours.read_manifest(path / neighbours.FOLDER)
        neighbours.map_parts(path / neighbours.FOLDER, found, "full")
        done += found.rows_done
    return done


def _run_progress(run: Path) -> int:
    path = checkpoint.latest(run)
    if (run / report.RESULT).exists():
        models.load(run)
        return 1 << 30
    return 0 if path is None else int(checkpoint.load(path).path.name.removeprefix("step-"))


def _student_progress(path: Path) -> int:
    if not (path / STUDENT).exists():
        return 0
    models.load(path)
    return 1


def goes_on(prepared: Prepared, root: Path, path: Path, floor: int, *, no_flock: bool) -> Result:
    """What became of a folder after a death or an error, and of the same command run again."""
    command = prepared.command
    left = in_child(command.progress, path)
    if left.value is None or left.value < floor:
        return Result("lost", f"{left.failure or left.death or left.value} instead of {floor}")

    def again() -> Any:
        disturbed(command, root, path, Plan(no_flock=no_flock))
        return command.result(path)

    ended, kind = in_child(again), "finished"
    if unlocked_as_told(path, ended.failure):
        ended, kind = in_child(again), "finished, lock deleted as told"
    if ended.value is None:
        return Result("not finished", f"run again: {ended.failure or ended.death}")
    other = difference(ended.value, prepared.expected)
    return Result("other result", other) if other else Result(kind)


def unlocked_as_told(path: Path, failure: Failure | None) -> bool:
    """Delete the lock files of a folder if the message says so: the owner died before it wrote its
    name, or could not delete it."""
    told = False
    for lock in [file for file in path.rglob("*") if _is_lock(file)]:
        if failure is not None and failure.typed and str(lock.parent / LOCK_FILE) in failure.text:
            lock.unlink()
            told = True
    return told


def difference(value: Any, expected: Any, where: str = "") -> str:
    """The first place in which two results differ, in words; "" if they are equal."""
    if isinstance(value, dict) and isinstance(expected, dict):
        if odd := value.keys() ^ expected.keys():
            return f"{where}: more or fewer: {sorted(odd)}"
        pairs = [(f"{where}/{name}", value[name], expected[name]) for name in value]
    elif isinstance(value, (list, tuple)) and len(value) == len(expected):
        pairs = [(f"{where}/{i}", v, e) for i, (v, e) in enumerate(zip(value, expected))]
    else:
        shown = ["bytes" if isinstance(v, bytes) else f"{v!r:.100}" for v in (value, expected)]
        return "" if value == expected else f"{where}: {' for '.join(shown)}"
    return next(filter(None, (difference(v, e, name) for name, v, e in pairs)), "")


def disturbed(command: Command, root: Path, path: Path, plan: Plan) -> list[str]:
    """Run the command under a plan, in this process; returns the names of its calls."""
    calls = Calls(root, plan)
    command.run(path)
    return calls.names


@functools.cache  # for two stages
def prepare(root: Path) -> list[Prepared]:
    """Everything that the stages `kills` and `faults` need, in the folder `root`."""
    torch.set_num_threads(1)
    made = []
    for command in commands(root / "inputs"):
        folder = root / command.name
        whole, half = folder / "whole", folder / "half"
        folder.mkdir()
        command.run(folder / "warm")  # imports, in this process
        ended = in_child(_undisturbed, command, whole)
        assert ended.failure is None, ended.failure
        expected = ended.value
        middle = len(_names(command, root, folder / "counted", Plan())) // 2
        if command.name == "student":
            shutil.copytree(whole, half)
            torch.manual_seed(7)
            older = models.create(
                "vit:patch=4,width=8,layers=1,heads=2", num_classes=3, image_size=8, in_channels=1
            )
            models.save(older, half / STUDENT)
        else:
            in_child(disturbed, command, root, half, Plan(middle))
        starts, calls = (folder / "absent", half), {}
        floors = tuple(in_child(command.progress, start).value for start in starts)
        for start in starts:
            for no_flock in (False, True):
                copy = fresh(start, folder / f"copy-{start.name}-{no_flock}")
                calls[start, no_flock] = _names(command, root, copy, Plan(no_flock=no_flock))
        made.append(Prepared(command, starts, floors, expected, calls))
    return made


def _undisturbed(command: Command, path: Path) -> Any:
    command.run(path)
    return command.result(path)


def _names(command: Command, root: Path, path: Path, plan: Plan) -> list[str]:
    ended = in_child(disturbed, command, root, path, plan)
    assert ended.value is not None, ended
    return ended.value


def fresh(start: Path, path: Path) -> Path:
    """A copy of the folder `start` at `path`; none if there is none."""
    if os.path.lexists(path):
        shutil.rmtree(path)
    if start.exists():
        shutil.copytree(start, path, symlinks=True)
    return path
