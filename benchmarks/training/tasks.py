"""The measurements of bench_kd.py, each for a process of its own.

They call the package's own code: `ckd.train` sets a run up and trains an epoch, `ckd.bank` builds a
bank. Both call back once a step, and the gauge reads the clock there.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ckd import data, models
from ckd._console import console
from ckd._device import pick_device
from ckd._hints import require
from ckd.bank import BankWriter
from ckd.bank.build import build_bank
from ckd.models import catalog
from ckd.train.config import Config
from ckd.train.device import torch_state
from ckd.train.loop import train_epoch
from ckd.train.methods import method_class
from ckd.train.run import set_up
from common.memory import Memory
from common.workers import Result
from training.gauge import Enough, Gauge, TurnOver

CLASSES = 100

# Vision transformers at 224 px: width, layers, heads, patch (Dosovitskiy et al. 2021, table 1).
VITS = {
    "ViT-B/32": (768, 12, 12, 32),
    "ViT-B/16": (768, 12, 12, 16),
    "ViT-L/32": (1024, 24, 16, 32),
    "ViT-L/16": (1024, 24, 16, 16),
}


@dataclass(frozen=True)
class Setting:
    """The settings that the measurements of one table share."""

    folder: str  # of the images, the teacher's file and the trainer's output
    student: str
    teacher: str
    image_size: int
    batch_size: int
    steps: int  # most steps to measure
    seconds: float  # stop measuring after this time
    amp: str
    compile: bool
    threads: int
    device: str

    @property
    def warm_up(self) -> int:
        """Steps before the measured ones: cuDNN tunes its algorithms, torch.compile compiles."""
        return 10 if self.device == "cuda" else 3 if self.compile else 1

    def gauge(self, memory: Memory, turn_over: TurnOver, before_first: int = 0) -> Gauge:
        """`before_first`: calls that come before the first step has ended."""
        return Gauge(
            memory,
            turn_over,
            warm_up=self.warm_up + before_first,
            steps=self.steps,
            seconds=self.seconds,
            batch_size=self.batch_size,
        )

    @property
    def images(self) -> Path:
        return Path(self.folder) / "images.npz"

    @property
    def teacher_spec(self) -> str:
        """The trainer's --teacher: a model's name, or the user's own path."""
        if self.teacher in VITS:
            return f"hf:{_vit_folder(self.teacher, self.folder)}"
        return self.teacher

    @property
    def teacher_weights(self) -> str | None:
        """The trainer's --teacher-weights: the file of random weights of a model by name."""
        return f"{self.folder}/teacher.safetensors" if catalog.is_spec(self.teacher_spec) else None

    @property
    def teacher_file(self) -> str:
        """The file of random weights, or the user's own path."""
        return self.teacher_weights or self.teacher


def write_images(setting: Setting) -> None:
    """Random uint8 images of CLASSES classes, enough that no measurement reaches their end."""
    rows = setting.batch_size * (setting.warm_up + setting.steps + 3)
    random = np.random.default_rng(0)
    size = setting.image_size
    arrays: dict[str, Any] = {
        "train_images": random.integers(0, 256, (rows, size, size, 3), dtype=np.uint8),
        "train_labels": np.arange(rows) % CLASSES,
        "test_images": np.zeros((1, size, size, 3), dtype=np.uint8),
        "test_labels": np.zeros(1, dtype=np.int64),
        "class_names": np.array([str(label) for label in range(CLASSES)]),
    }
    np.savez(setting.images, **arrays)


def make_teacher(turn_over: TurnOver, setting: Setting) -> Result:
    """Write a teacher with random weights for the trainer to load; returns a description.

    A teacher that the user names by a path keeps its weights.
    """
    file = setting.teacher_file
    stored = file == setting.teacher
    if stored:
        model = models.load(file)
    else:
        spec = _spec(setting.teacher, setting.folder)
        size = None if catalog.is_library(spec) else setting.image_size
        torch.manual_seed(0)
        model = models.create(spec, num_classes=CLASSES, image_size=size, in_channels=3)
        settle(model, setting)
        models.save(model, file)
    return {
        "weights": "stored" if stored else "random",
        "image_size": model.image_size,
        "embedding_dim": model.embedding_dim,
        "parameters": models.parameter_count(model),
    }


@torch.no_grad()
def settle(model: models.Model, setting: Setting) -> None:
    """Give batch normalisation the statistics of a batch: with its initial ones, the embeddings of
    a deep model with random weights overflow the float16 of a bank."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.momentum = None  # statistics become the mean over the batches seen: this one
    with np.load(setting.images) as arrays:
        images = torch.from_numpy(arrays["train_images"][:64]).permute(0, 3, 1, 2)
    model.train()
    model(models.prepare(model, images))
    model.eval()


def _spec(teacher: str, folder: str) -> str:
    """The model spec of a teacher; for one of VITS, hf: and a folder with its configuration."""
    if teacher not in VITS:
        return teacher
    return _vit_spec(VITS[teacher], _vit_folder(teacher, folder))


def _vit_folder(teacher: str, folder: str) -> Path:
    return Path(folder) / teacher.replace("/", "-")


def _vit_spec(shape: tuple[int, int, int, int], folder: Path) -> str:
    transformers: Any = require("transformers", extra="hf", purpose="a ViT as teacher")
    width, layers, heads, patch = shape
    transformers.ViTConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        patch_size=patch,
        image_size=224,
    ).save_pretrained(folder)
    return f"hf:{folder}"


def measure_training(
    turn_over: TurnOver, method: str, teacher_dim: int, setting: Setting
) -> Result:
    """Seconds per step, peak MiB and joules per image of the trainer's loop."""
    device = pick_device(setting.device)
    config = config_of(method, setting)
    if method == "embed-kd":
        write_bank(Path(f"{setting.folder}/bank"), teacher_dim)
    load_libraries(setting, device)
    with torch_state(config, device):
        memory = Memory(device)
        run = set_up(config, device, method_class(config))
        memory.held += sum(_nbytes(one) for one in (run.train_set, run.test_set) if one)
        gauge = setting.gauge(memory, turn_over)
        with console(quiet=True), contextlib.suppress(Enough):
            train_epoch(run, gauge)
    return gauge.result()


def measure_bank(turn_over: TurnOver, setting: Setting) -> Result:
    """The same for batches of the teacher's forward, by the code that builds banks."""
    device = pick_device(setting.device)
    load_libraries(setting, device)
    dataset = data.load(str(setting.images), "train")
    memory = Memory(device)
    # `prepare` is called when a batch begins, not when it has ended: the first call ends no batch.
    gauge = setting.gauge(memory, turn_over, before_first=1)

    def prepare(model: models.Model, images: Tensor) -> Tensor:
        gauge()
        return models.prepare(model, images)

    with contextlib.suppress(Enough):
        build_bank(
            dataset,
            models.load(setting.teacher_spec, weights=setting.teacher_weights),
            f"{setting.folder}/teacher-bank",
            batch_size=setting.batch_size,
            device=device,
            prepare=prepare,
            progress=False,
        )
    return gauge.result()


def config_of(method: str, setting: Setting) -> Config:
    """The settings that `python -m ckd.train` would get."""
    runs_teacher = method in ("logit-kd", "teacher-kd")
    config = Config(
        method=method,  # type: ignore[arg-type]  # `check` refuses others
        data=str(setting.images),
        student=setting.student,
        teacher=setting.teacher_spec if runs_teacher else None,
        teacher_weights=setting.teacher_weights if runs_teacher else None,
        bank=(f"{setting.folder}/bank",) if method == "embed-kd" else (),
        targets="centroids",  # as published: the paper's claims of cost are about them
        out=setting.folder,
        batch_size=setting.batch_size,
        amp=setting.amp,  # type: ignore[arg-type]
        compile=setting.compile,
        device=setting.device,
        checkpoint_minutes=1e9,
        log_to=("none",),
    )
    config.check()
    return config


def write_bank(path: Path, dim: int) -> None:
    """A bank with rows of the teacher's width; random ones, which cost the same."""
    labels = torch.arange(CLASSES)
    with BankWriter(path, dim, class_names=[str(label) for label in range(CLASSES)]) as writer:
        writer.write(labels, torch.randn(CLASSES, dim), labels)


def load_libraries(setting: Setting, device: torch.device) -> None:
    """Load and use libraries before memory is measured, so that no method is charged for them."""
    small: list[models.Model] = [
        models.create("vit:width=8,layers=1,heads=1", num_classes=2, image_size=8)
    ]
    if setting.teacher in VITS or setting.teacher.startswith("hf:"):
        # A folder for each process: several may be set up at the same time.
        spec = _vit_spec((8, 1, 1, 32), Path(setting.folder) / f"small-{os.getpid()}")
        small.append(models.create(spec, num_classes=2, image_size=None))
    elif setting.teacher.startswith("timm:"):
        importlib.import_module("timm")
    for model in small:
        model.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        size = model.image_size
        model(torch.zeros(2, 3, size, size, device=device)).logits.sum().backward()
        optimizer.step()


def _nbytes(dataset: data.Dataset) -> int:
    images = getattr(dataset, "images", None)
    return 0 if images is None else images.nbytes
