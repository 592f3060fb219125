"""Trains the student of a cell in a worker process, and measures it."""

from __future__ import annotations

import functools
import json
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import ckd
from ckd import data
from ckd._device import pick_device
from ckd._files import atomic_write
from ckd.bank import EmbeddingBank
from ckd.eval import evaluate_student
from ckd.train import Config, train
from common.report import Record
from students.cells import FIGURES, PLAIN, Cell
from students.material import IMAGES, bank_folder, labelled_images


@dataclass(frozen=True)
class Plan:
    """What all cells share.

    end: the time.time() after which no further cell begins. reference: the setting whose cells also
    measure the teacher's own rows, which no student changes.
    """

    folder: Path
    student: str
    epochs: int
    batch_size: int
    lr: float
    amp: str
    device: str
    threads: int
    end: float
    reference: str

    def config(self, cell: Cell) -> Config:
        images, epochs = self.folder / IMAGES, self.epochs
        bank = None
        if cell.setting in PLAIN:
            images = labelled_images(images, cell.percent, cell.seed)
            epochs = round(epochs * PLAIN[cell.setting])
        else:
            bank = str(bank_folder(self.folder, cell.teacher, "train"))
        fields: dict[str, Any] = {
            **{"student": self.student, "epochs": epochs, "batch_size": self.batch_size},
            **{"lr": self.lr, "weight_decay": 0.05, "warmup_epochs": 0.5, "amp": self.amp},
            **{"data": str(images), "bank": bank, "device": self.device, "log_to": ("none",)},
            "out": str(self.folder / "runs" / cell.name),
        }
        return Config(**fields, **cell.fields)

    def result(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.name}.json"


def finished(plan: Plan, cell: Cell) -> Record | None:
    """The record of a cell that was measured before."""
    try:
        return json.loads(plan.result(cell).read_text())
    except FileNotFoundError:
        return None


def run(plan: Plan, cell: Cell) -> Iterator[Record]:
    """Train the student of a cell and measure it; nothing after `plan.end`."""
    if time.time() > plan.end:
        return
    torch.set_num_threads(plan.threads)
    tqdm.set_lock(threading.RLock())  # not a semaphore, which outlives a killed worker
    began = time.monotonic()
    with warnings.catch_warnings():
        # Of plain's images, which are repeated on purpose.
        warnings.filterwarnings("ignore", message="(?s).*are copies of others")
        config = plan.config(cell)
        trained = train(config, resume=True, verbose=False)
    record = {
        **cell._asdict(),
        "train_s": trained["train_time_s"],
        **measure(plan, cell, trained),
        "cell_s": time.monotonic() - began,
    }
    atomic_write(plan.result(cell), (json.dumps(record) + "\n").encode())
    yield record


def measure(plan: Plan, cell: Cell, trained: Record) -> Record:
    """`figures` of `ckd.eval` by name, None where there is none, and `teachers_own` ones."""
    if cell.setting in PLAIN:
        return {"figures": {"class_head": trained["test_accuracy"]}, "teachers_own": {}}
    images = str(plan.folder / IMAGES)
    bank, test_bank = _bank(plan.folder, cell.teacher, "train"), None
    if cell.setting == plan.reference:
        test_bank = _bank(plan.folder, cell.teacher, "test")
    report = evaluate_student(
        ckd.load_student(plan.folder / "runs" / cell.name).to(pick_device(plan.device)),
        _images(images, "train"),
        _images(images, "test"),
        bank,
        test_bank=test_bank,
        figures=FIGURES,
        label_fraction=cell.percent / 100,
        seed=cell.seed,
        batch_size=plan.batch_size,
        progress=False,
    )
    own = {} if test_bank is None else {figure.name: figure.teacher for figure in report.figures}
    return {
        "figures": {figure.name: figure.value for figure in report.figures},
        "teachers_own": own,
    }


@functools.cache
def _images(path: str, split: str) -> data.Dataset:
    return data.load(path, split)


@functools.cache
def _bank(folder: Path, teacher: str, split: str) -> EmbeddingBank:
    return EmbeddingBank.open(bank_folder(folder, teacher, split))
