"""Tiny runs for the tests of `ckd.train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ckd import models
from ckd.bank import BankWriter
from ckd.data import Dataset, load
from ckd.train import Config, checkpoint, train

STUDENT = "vit:patch=4,width=16,layers=1,heads=2"
TIMINGS = (
    "time_s",
    "images_per_s",
    "eval_time_s",
    "peak_rss_mib",
    "start_rss_mib",
)


def tiny_data(
    folder: Path, *, train: int = 90, test: int = 20, classes: int = 3, size: int = 8
) -> Path:
    """An .npz of small gray images whose brightness depends on their class."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"class_names": np.array([f"class {c}" for c in range(classes)])}
    for split, count in (("train", train), ("test", test)):
        labels = np.arange(count) % classes
        noise = rng.integers(0, 120, (count, size, size))
        arrays[f"{split}_images"] = (noise + 60 * labels[:, None, None]).astype(np.uint8)
        arrays[f"{split}_labels"] = labels
    path = folder / "tiny.npz"
    np.savez(path, **arrays)
    return path


def tiny_bank(folder: Path, dataset: Dataset, dim: int = 12, **settings: Any) -> Path:
    """A bank of random embeddings that lean towards their class."""
    path = folder / "bank"
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(len(dataset), dim, generator=generator)
    embeddings[torch.arange(len(dataset)), dataset.labels] += 3.0
    settings = {
        "fingerprint": dataset.fingerprint,
        "class_names": dataset.class_names,
        **settings,
    }
    with BankWriter(path, dim, **settings) as writer:
        writer.write(dataset.sample_ids, embeddings, dataset.labels)
    return path


def tiny_teacher(folder: Path, classes: int | None = 3) -> Path:
    """An untrained teacher: its outputs are arbitrary, but always the same."""
    path = folder / "teacher.safetensors"
    torch.manual_seed(1)
    spec = "vit:patch=4,width=24,layers=1,heads=2"
    model = models.create(spec, num_classes=classes, image_size=8, in_channels=1)
    models.save(model, path, class_names=[f"class {c}" for c in range(classes or 0)])
    return path


def tiny_config(folder: Path, **settings: Any) -> Config:
    """Seven steps per epoch, the last one short; makes data, bank and teacher in `folder` once."""
    path = folder / "tiny.npz"
    if not path.exists():
        tiny_data(folder)
        tiny_bank(folder, load(path))
        tiny_teacher(folder)
    defaults: dict[str, Any] = {
        "data": str(path),
        "bank": str(folder / "bank"),
        "teacher": str(folder / "teacher.safetensors"),
        "student": STUDENT,
        "out": str(folder / "run"),
        "epochs": 2,
        "batch_size": 14,
        "lr": 1e-3,
        "device": "cpu",
        "log_to": ("none",),
    }
    return Config(**{**defaults, **settings})


def resume_in_process(config: Config) -> None:
    """The target of a process that the test kills."""
    torch.set_num_threads(1)
    train(config, resume=True, verbose=False)


def outcome(run: Path) -> dict[str, Any]:
    """The results in which equal runs must agree to the byte."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in TIMINGS:
            line.pop(name, None)
    path = checkpoint.latest(run)
    assert path is not None
    return {
        "student": (run / "student.safetensors").read_bytes(),
        "checkpoint": (path / checkpoint.TENSORS).read_bytes(),
        "step": path.name,
        "metrics": [list(line.items()) for line in lines],  # in order
    }
