"""Bad input to the trainer: settings, data and teachers that do not fit, checkpoints, the disk."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckd import data, models
from ckd.bank import BankError, BankWriter
from ckd.data import DataError
from ckd.models import ModelError
from ckd.train import CheckpointError, Config, ConfigError, TrainError, checkpoint, loop, train
from ckd.train.stored import read_result
from tests.bad_input import Case
from tests.train_runs import tiny_bank, tiny_config, tiny_data, tiny_teacher


def set_to(**settings: Any) -> Callable[[Path], Any]:
    """A tiny run with these settings."""
    return lambda tmp_path: train(tiny_config(tmp_path, **settings), verbose=False)


def without_classes(**settings: Any) -> Callable[[Path], Any]:
    """A tiny run on images without labels or classes."""

    def call(tmp_path: Path) -> None:
        config = tiny_config(tmp_path, **settings)
        with np.load(config.data) as file:
            images = file["train_images"]
        np.savez(config.data, train_images=images)
        train(config, verbose=False)

    return call


def without_package(name: str) -> Callable[[Path], Any]:
    """A tiny run that logs to a service whose package is missing."""

    def call(tmp_path: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            train(tiny_config(tmp_path, log_to=(name,)), verbose=False)

    return call


def killed_at_once(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.folder.mkdir()
    config.save(config.folder / "config.json")
    read_result(config.folder)


def bank_with(**settings: Any) -> Callable[[Path], Any]:
    """A tiny run with a bank that does not fit."""

    def call(tmp_path: Path) -> None:
        config = tiny_config(tmp_path)
        other = tmp_path / "other"
        other.mkdir()
        path = tiny_bank(other, data.load(config.data), **settings)
        train(replace(config, bank=str(path)), verbose=False)

    return call


def bank_of_other_data(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    path = tiny_bank(other, data.load(tiny_data(other, train=91)))
    train(replace(config, bank=str(path)), verbose=False)


def bank_of_a_part(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    dataset, path = data.load(config.data), tmp_path / "part"
    names = dataset.class_names
    with BankWriter(path, 12, fingerprint=dataset.fingerprint, class_names=names) as writer:
        writer.write(dataset.sample_ids[:50], torch.ones(50, 12), dataset.labels[:50])
    train(replace(config, bank=str(path)), verbose=False)


def bank_in_another_order(tmp_path: Path) -> None:
    """Rows in another order than the data, with row numbers as ids (an import without ids)."""
    config = tiny_config(tmp_path)
    dataset, path = data.load(config.data), tmp_path / "reversed"
    with BankWriter(path, 12, class_names=dataset.class_names) as writer:
        writer.write(dataset.sample_ids, torch.ones(90, 12), dataset.labels.flip(0))
    train(replace(config, bank=str(path)), verbose=False)


def second_bank(path: str) -> Callable[[Path], Any]:
    """A tiny run with a further bank."""

    def call(tmp_path: Path) -> None:
        config = tiny_config(tmp_path)
        train(replace(config, bank=(*config.bank, path)), verbose=False)

    return call


def teacher_of_classes(count: int | None) -> Callable[[Path], Any]:
    """logit-kd with a teacher that has this many classes, not three; None: no class head."""

    def run(tmp_path: Path) -> Any:
        config = tiny_config(tmp_path, method="logit-kd")
        other = tmp_path / "other"
        other.mkdir()
        path = tiny_teacher(other, classes=count)
        train(replace(config, teacher=str(path)), verbose=False)

    return run


def oblong_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (20, 8, 12), dtype=np.uint8), np.arange(20) % 2
    path = tmp_path / "oblong.npz"
    np.savez(path, **{f"{s}_images": images for s in ("train", "test")},
             **{f"{s}_labels": labels for s in ("train", "test")})  # fmt: skip
    train(Config(method="plain", data=str(path), out=str(tmp_path / "run")), verbose=False)


def finished(tmp_path: Path) -> Config:
    config = tiny_config(tmp_path, epochs=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw_curves", lambda *args: None)  # which takes longer than the run
        train(config, verbose=False)
    return config


def begun_twice(tmp_path: Path) -> None:
    train(finished(tmp_path), verbose=False)


def resumed_with(**settings: Any) -> Callable[[Path], Any]:
    return lambda tmp_path: train(replace(finished(tmp_path), **settings), resume=True)


def damaged(name: str) -> Callable[[Path], Any]:
    """Resume a run whose last checkpoint has a flipped bit in one of its files."""

    def call(tmp_path: Path) -> None:
        config = finished(tmp_path)
        (config.folder / "result.json").unlink()  # as if killed before the very end
        path = checkpoint.latest(config.folder)
        assert path is not None
        changed = bytearray((path / name).read_bytes())
        changed[len(changed) // 2] ^= 16
        (path / name).write_bytes(changed)
        train(config, resume=True, verbose=False)

    return call


def refused_by_the_system(code: int, resumable: bool) -> Callable[[Path], Any]:
    """The disk is full, or access denied, when a checkpoint is saved; an older one must survive."""

    def call(tmp_path: Path) -> None:
        config = tiny_config(tmp_path, checkpoint_steps=3)
        genuine, saves = os.rename, []

        def rename(source: Any, target: Any, **options: Any) -> None:
            saves.append(target)
            if len(saves) > resumable:
                raise OSError(code, os.strerror(code))
            genuine(source, target, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "rename", rename)
            try:
                train(config, verbose=False)
            finally:
                path = checkpoint.latest(config.folder)
                assert (path is not None) == resumable
                assert path is None or checkpoint.load(path).state["progress"]["step"] == 3

    return call


def read_only_place(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)

    def refuse(path: Any, *args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "mkdir", refuse)
        train(config, verbose=False)


def file_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    train(tiny_config(tmp_path), verbose=False)


def damaged_config(tmp_path: Path) -> None:
    config = finished(tmp_path)
    (config.folder / "config.json").write_text("{")
    shutil.rmtree(config.folder / "checkpoint")  # from which it would be restored
    train(config, resume=True)


def unfinished(tmp_path: Path) -> None:
    config = finished(tmp_path)
    (config.folder / "result.json").unlink()
    read_result(config.folder)


def not_a_student(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    models.load(config.folder.parent)


CASES = [
    Case("unknown method", set_to(method="embed-dk"), ConfigError,
         ("unknown method 'embed-dk'", "nearest first: embed-kd, ", "plain")),
    Case("unknown student", set_to(student="resnet21"), ModelError, ("resnet21", "resnet20")),
    Case("unknown data set", set_to(data="digit"), DataError, ("digit", "digits")),
    Case("unknown targets", set_to(targets="centroid"), ConfigError, ("nearest first: centroids",)),
    Case("unknown precision", set_to(amp="bfloat16"), ConfigError, ("amp", "bf16", "fp16", "off")),
    Case("unknown device", set_to(device="gpu"), ConfigError,
         ("--device must be auto, cpu, cuda", "got gpu")),
    Case("unknown logger", set_to(log_to=("wandbb",)), ConfigError,
         ("unknown log to 'wandbb'; --log-to takes, nearest first: wandb",)),
    Case("a logger beside none", set_to(log_to=("none", "wandb")), ConfigError,
         ("--log-to takes auto or none alone",)),
    Case("a logger that is not installed", without_package("mlflow"), ImportError,
         ("--log-to mlflow needs mlflow", "pip install 'ckd[mlflow]'")),
    Case("no epochs", set_to(epochs=0), ConfigError, ("--epochs must be at least 1, got 0",)),
    Case("pooling of no teacher", set_to(pool="mean"), ConfigError,
         ("--pool goes with --method teacher-kd",)),
    Case("contrast within batches of one image", set_to(method="teacher-kd", batch_size=1),
         ConfigError, ("teacher-kd", "--batch-size must be at least 2")),
    Case("empty batches", set_to(batch_size=0), ConfigError, ("--batch-size must be at least 1",)),
    Case("learning rate zero", set_to(lr=0.0), ConfigError, ("--lr must be above 0, got 0.0",)),
    Case("learning rate NaN", set_to(lr=float("nan")), ConfigError, ("--lr", "got nan")),
    Case("fraction of the labels above one", set_to(label_fraction=1.5), ConfigError,
         ("--label-fraction must be at least 0 and at most 1, got 1.5",)),
    Case("plain without labels", set_to(method="plain", label_fraction=0.0), ConfigError,
         ("nothing to learn from", "no labels are used (--label-fraction 0)", "embed-kd")),
    Case("no labels and no distillation", set_to(distill_weight=0.0, label_fraction=0.0),
         ConfigError, ("nothing to learn from", "--distill-weight above 0")),
    Case("centroids with labels for some images",
         set_to(targets="centroids", label_fraction=0.1), ConfigError,
         ("--label-fraction 0.1 leaves labels out that the bank has", "--targets samples")),
    Case("centroids without labels", set_to(targets="centroids", label_fraction=0.0), ConfigError,
         ("no label of tiny is used", "--targets samples")),
    Case("logit-kd without classes", without_classes(method="logit-kd"), ConfigError,
         ("tiny has no classes", "teacher-kd or embed-kd")),
    Case("plain without classes", without_classes(method="plain"), ConfigError,
         ("nothing to learn from", "tiny.npz has none")),
    Case("smoothing of one", set_to(label_smoothing=1.0), ConfigError,
         ("--label-smoothing must be at least 0 and below 1",)),
    Case("logit scale beyond its maximum", set_to(logit_scale=101.0), ConfigError,
         ("--logit-scale must be above 0 and at most 100, got 101",)),
    Case("warm-up longer than the run", set_to(warmup_epochs=3.0), ConfigError,
         ("--warmup-epochs must be at most --epochs (2), got 3.0",)),
    Case("embed-kd without a bank", set_to(bank=None), ConfigError,
         ("needs --bank", "python -m ckd.bank build")),
    Case("teacher-kd without a teacher", set_to(method="teacher-kd", teacher=None), ConfigError,
         ("teacher-kd", "name it with --teacher")),
    Case("unknown term of the loss", set_to(distill="contrastive,cosin=1"), ConfigError,
         ("unknown term 'cosin'; --distill takes, nearest first: cosine",)),
    Case("negative weight of a term", set_to(distill="cosine=-1"), ConfigError,
         ("the weight of cosine must be a number above 0, got '-1'",)),
    Case("terms without a bank's method", set_to(distill="cosine", method="plain"), ConfigError,
         ("--distill goes with --method embed-kd",)),
    Case("a head that no term uses", set_to(head="mlp", targets="samples"), ConfigError,
         ("--head goes with --distill cosine, mse or soft",)),
    Case("nothing to learn from", set_to(method="plain", label_weight=0.0), ConfigError,
         ("--label-weight 0 leaves nothing to learn from", "--bank")),
    Case("logits of a bank without a class head", set_to(distill="logits"), ConfigError,
         ("holds none", "python -m ckd.bank build --teacher SPEC")),
    Case("similarities without neighbours", set_to(distill="soft"), (BankError, ConfigError),
         ("neighbours", "python -m ckd.bank neighbours")),
    Case("bank that is named twice", set_to(bank=("a", "b", "a")), ConfigError,
         ("--bank names a twice",)),
    Case("weights of other banks", set_to(bank=("a", "b"), bank_weights=(1.0,)), ConfigError,
         ("--bank-weights must be one number for each --bank (2), got 1",)),
    Case("bank of weight zero", set_to(bank=("a", "b"), bank_weights=(1.0, 0.0)), ConfigError,
         ("--bank-weights must be above 0, got 0.0", "leave out the bank")),
    Case("second bank that is not there", second_bank("nowhere"), BankError,
         ("nowhere is not a bank",)),
    Case("bank that is not there", set_to(bank="nowhere"), BankError, ("nowhere is not a bank",)),
    Case("bank of other data", bank_of_other_data, BankError, ("fingerprint", "this data has")),
    Case("bank of other classes", bank_with(class_names=["a", "b", "c"]), BankError,
         ("class 0 is 'a'", "'class 0' in the data")),
    Case("bank of a part of the data", bank_of_a_part, ConfigError,
         ("not in the bank", "--targets centroids needs no row for every image")),
    Case("centroids of few rows without centroids", set_to(centroids_per_class=5), ConfigError,
         ("--centroids-per-class needs --targets centroids",)),
    Case("bank whose ids are not those of the data", bank_in_another_order, ConfigError,
         ("sample_id 0 is of class 2 there and of class 0 in the data", "--ids",
          "--targets centroids")),
    Case("teacher without a class head", teacher_of_classes(None), ConfigError,
         ("the data has 3", "teacher.safetensors has none; fine-tune it")),
    Case("teacher of other classes", teacher_of_classes(5), ConfigError,
         ("the data has 3 (class 0, class 1, class 2)", "has 5 (class 0", "teacher-kd")),
    Case("oblong images", oblong_images, ConfigError, ("12 x 8", "--image-size")),
    Case("a run in the folder already", begun_twice, ConfigError,
         ("already holds a run", "--resume", "--out")),
    Case("resume with other settings", resumed_with(lr=0.5, student="resnet20"), ConfigError,
         ("lr was 0.001, is 0.5", "student was 'vit:", "is 'resnet20'")),
    Case("damaged tensors in a checkpoint", damaged("tensors.safetensors"), CheckpointError,
         ("step-00000007/tensors.safetensors does not match its checksum",)),
    Case("damaged state of a checkpoint", damaged("state.json"), CheckpointError,
         ("step-00000007/state.json",)),
    Case("damaged config.json", damaged_config, ConfigError,
         ("config.json is damaged", "begin another run")),
    Case("disk full at the first checkpoint", refused_by_the_system(errno.ENOSPC, False),
         CheckpointError, ("step-00000003", "No space left", "no older one", "--resume")),
    Case("disk full at a later checkpoint", refused_by_the_system(errno.ENOSPC, True),
         CheckpointError, ("step-00000006", "No space left", "step-00000003 is intact")),
    Case("permission denied for a checkpoint", refused_by_the_system(errno.EACCES, True),
         CheckpointError, ("step-00000006", "Permission denied", "step-00000003 is intact")),
    Case("permission denied for the run folder", read_only_place, PermissionError, ("run",)),
    Case("a file where the run folder should be", file_for_a_folder, ConfigError,
         ("is a file", "--out")),
    Case("comparing an unfinished run", unfinished, TrainError,
         ("not finished", "python -m ckd.train --resume")),
    Case("comparing a run without a checkpoint", killed_at_once, TrainError,
         ("not finished", "no checkpoint yet", "train it anew")),
    Case("comparing what is no run", lambda tmp_path: read_result(tmp_path), TrainError,
         ("is not a run folder",)),
    Case("a folder that holds no student", not_a_student, ModelError, ("no student.safetensors",)),
]  # fmt: skip
