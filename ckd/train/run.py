"""A run: its folder, the modules it trains, and its progress."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ckd import data, models
from ckd._json import JsonError, read_object
from ckd._lock import locked_folder
from ckd.data import Augment, Dataset
from ckd.train import checkpoint, report
from ckd.train.config import Config
from ckd.train.errors import CheckpointError, ConfigError, TrainError
from ckd.train.methods import Method
from ckd.train.metrics import METRICS
from ckd.train.schedule import parameter_groups
from ckd.train.stored import (
    CONFIG,
    FIRST_FILES,
    has_begun,
    refuse_other_settings,
    resume_command,
    stored_config,
)


@dataclass
class Progress:
    """The position of a run, and the sums of its current epoch."""

    epoch: int = 0  # epochs that are trained, evaluated and logged
    step: int = 0  # optimizer steps
    rows: int = 0  # images seen in the current epoch
    sums: dict[str, float] = field(default_factory=dict)  # of each loss term over these images
    time_s: float = 0.0  # of training on them, without evaluation and checkpoints
    metrics_bytes: int = 0  # size of metrics.jsonl
    metrics_xxh3: str = ""  # its hash; "" if there is no line


@dataclass
class Run:
    """A run that is set up: data, student, method and optimizer."""

    config: Config
    device: torch.device
    train_set: Dataset
    test_set: Dataset | None  # None: no test split, which a training set without labels may lack
    student: Any
    forward: Callable[[Tensor], models.ModelOutput]  # the student, compiled if asked
    method: Method
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    maps: nn.ModuleList  # of the method, between the student and its teachers
    averages: dict[str, AveragedModel]  # with --ema: of the student, and of the maps if any
    augment: Augment
    progress: Progress = field(default_factory=Progress)
    records: list[dict[str, Any]] = field(default_factory=list)  # the lines of metrics.jsonl

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules that a checkpoint stores, beside the optimizer."""
        return {"student": self.student, "method": self.method, **self.averages}

    @property
    def exported(self) -> models.Student:
        """The student that is evaluated and saved, with its maps: their averages with --ema."""
        modules: dict[str, Any] = {"ema": self.student, "ema_maps": self.maps}
        averages = {name: average.module for name, average in self.averages.items()}
        return models.Student(*(modules | averages).values())

    def update_averages(self) -> None:
        """Take the step that was just made into the averages."""
        for average, module in zip(self.averages.values(), (self.student, self.maps)):
            average.update_parameters(module)

    @property
    def scored_images(self) -> int:
        """The number of test images on which the accuracy is measured."""
        if self.test_set is None or self.student.num_classes is None:
            return 0
        return self.test_set.labelled

    @property
    def steps_per_epoch(self) -> int:
        batches = data.training_batches(len(self.train_set), self.config.batch_size)
        return math.ceil(len(batches) / self.config.accumulate)

    @property
    def inputs(self) -> dict[str, str]:
        """Hashes of the data and of the teacher or bank; a resume must find the same."""
        sets = {"training data": self.train_set, "test data": self.test_set}
        hashes = {name: one.fingerprint for name, one in sets.items() if one is not None}
        return {**hashes, **self.method.inputs}

    @property
    def notes(self) -> list[str]:
        """What is missing in this run, for the terminal."""
        total, labelled = len(self.train_set), self.train_set.labelled
        if not self.config.label_weight and self.config.targets != "centroids":
            labelled = 0
        notes = [*self.method.notes]
        if labelled < total:
            notes.append(f"{labelled:,} of {total:,} training images are used with their labels")
        if self.student.num_classes is None:
            notes.append("the student has no class head, since nothing would train it")
        if self.test_set is None:
            notes.append(f"{self.config.data} has no test split: nothing is scored")
        elif not self.test_set.labelled:
            notes.append("no test image has a label: there is no test accuracy")
        return notes


@contextmanager
def run_folder(config: Config, *, resume: bool) -> Iterator[Path]:
    """The run folder, locked: a new one with config.json, or one that `config` may resume.

    If the block fails before anything of the run is worth keeping, what it made is removed: its
    files, and the folder if that is then empty.

    Raises ConfigError if the folder holds a run and `resume` is False, the run has other settings,
    or its config.json is another program's; TrainError if another process trains in it.
    """
    folder = config.folder
    before = {*os.listdir(folder)} if folder.is_dir() else set()
    with ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(folder))
        except BlockingIOError as error:
            raise TrainError(
                f"another process is training in {folder}; {error.strerror}"
            ) from error
        except FileExistsError as error:
            raise ConfigError(f"--out {folder} is a file; name a folder") from error
        # A run without a checkpoint (it failed early, say) may be overwritten.
        if checkpoint.latest(folder) is None and not (folder / report.RESULT).exists():
            _refuse_anothers_files(folder)
            config.save(folder / CONFIG)
        elif resume:
            refuse_other_settings(folder, stored_config(folder), config)
            try:
                Config.load(folder / CONFIG)
            except (ConfigError, FileNotFoundError):
                if (folder / CONFIG).is_symlink():  # to a device, say: it is not written to
                    (folder / CONFIG).unlink()
                config.save(folder / CONFIG)
        else:
            raise ConfigError(
                f"{folder} already holds a run; go on with it: {resume_command(folder)}, "
                "or choose another folder with --out"
            )
        try:
            yield folder
        except BaseException as error:
            # An error of a checkpoint says how to go on.
            if not has_begun(folder) and not isinstance(error, CheckpointError):
                _remove(folder / name for name in FIRST_FILES if name not in before)
            raise


def _refuse_anothers_files(folder: Path) -> None:
    """Raise ConfigError for a config.json of another program, as a model's folder has one too, and
    for a metrics.jsonl without a config.json, which each run writes first."""
    name = METRICS
    try:
        values, _ = read_object(folder / CONFIG)
        name = CONFIG
        own = {"method", "student", "data"} <= values.keys()
    except FileNotFoundError:
        own = not os.path.lexists(folder / METRICS)
    except (OSError, JsonError):  # a damaged one
        own = True
    if not own:
        raise ConfigError(
            f"--out {folder} holds a {name} that ckd did not write, and would replace; name "
            "another folder"
        )


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def set_up(config: Config, device: torch.device, method_type: type[Method]) -> Run:
    """Load the data and make the student, its method and its optimizer on `device`."""
    train_set, test_set = _load(config, device)
    channels, height, _ = train_set.image_shape
    has_head = method_type.trains_class_head(config, train_set)
    if not has_head and not config.distils:
        why = f": {config.data} has none" if config.label_fraction else " (--label-fraction 0)"
        raise ConfigError(
            f"--method {config.method} has nothing to learn from: no labels are used{why}, and "
            "there is no distillation term; use --method embed-kd with --bank and a "
            "--distill-weight above 0"
        )
    torch.manual_seed(config.seed)
    student: Any = models.create(
        config.student,
        num_classes=(len(train_set.class_names) or None) if has_head else None,
        image_size=height,
        in_channels=channels,
    )
    # Channels last: a training step of a ResNet-20 or 56 takes 20 to 25 % less (one core of an AMD
    # EPYC, batch 64, torch 2.13); a vision transformer is as fast either way.
    student = student.to(device, memory_format=torch.channels_last)
    method = method_type.build(config, student, train_set, device).to(device)
    maps = nn.ModuleList(method.teachers())
    groups = parameter_groups((student, method), config.weight_decay, decay_all=config.paper_compat)
    padding = height // 8 if config.crop_padding is None else config.crop_padding
    return Run(
        config=config,
        device=device,
        train_set=train_set,
        test_set=test_set,
        student=student,
        forward=torch.compile(student) if config.compile else student,
        method=method,
        optimizer=torch.optim.AdamW(groups, lr=config.lr, fused=True),
        scaler=torch.amp.GradScaler(device.type, enabled=config.amp == "fp16"),
        maps=maps,
        averages=_averages({"ema": student, "ema_maps": maps}, config.ema),
        augment=Augment(padding, config.flip),
    )


def _load(config: Config, device: torch.device) -> tuple[Dataset, Dataset | None]:
    """The training set, with the labels that are used, and the test set.

    A training set without labels needs no test set. Raises ConfigError unless both have square
    images of one size, and the same classes.
    """
    options: dict[str, Any] = {
        "image_size": config.image_size,
        "max_pixels": config.max_image_pixels,
    }
    train_set, test_set = data.load(config.data, "train", **options).to(device), None
    try:
        test_set = data.load(config.data, "test", **options).to(device)
    except data.MissingSplit:
        if train_set.labelled:
            raise
    shapes = [one.image_shape for one in (train_set, test_set) if one is not None]
    if shapes[0][1] != shapes[0][2] or shapes[0] != shapes[-1]:
        train, test = (f"{width} x {height}" for _, height, width in (shapes[0], shapes[-1]))
        raise ConfigError(
            f"images must be square and of one size, {config.data} has {train} pixels for training "
            f"and {test} for testing; pass --image-size"
        )
    if test_set is not None and test_set.class_names != train_set.class_names:
        raise ConfigError(
            f"{config.data} has other classes for testing than for training: "
            f"{', '.join(sorted({*test_set.class_names} ^ {*train_set.class_names}))}"
        )
    return data.keep_labels(train_set, config.label_fraction, config.seed), test_set


def _averages(modules: dict[str, nn.Module], decay: float) -> dict[str, AveragedModel]:
    """Exponential moving averages of the modules' weights, and of batch-norm statistics with them;
    none of a module without weights."""
    return {
        name: AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        for name, module in modules.items()
        if decay and module.state_dict()
    }
