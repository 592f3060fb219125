"""Bad input to `ckd predict` and `ckd export`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ckd._errors import ConfigError
from ckd.bank import BankError, BankWriter
from ckd.cli.command import parse
from ckd.data import DataError
from ckd.export import ExportError, export_student
from ckd.export.__main__ import Export
from ckd.models import ModelError, create, load_student, save
from ckd.predict.__main__ import Predict
from tests.bad_input import Case
from tests.test_models_student import student_file


def _student(folder: Path, classes: int | None = 3, maps: bool = True) -> Path:
    path = folder / "student.safetensors"
    student_file(path, [{}] if maps else [], classes)
    return path


def _image(folder: Path) -> Path:
    Image.new("RGB", (9, 9)).save(folder / "a.png")
    return folder / "a.png"


def _predict(
    *options: str, image: str | None = None, classes: int | None = 3, maps: bool = True
) -> Callable[[Path], Any]:
    """Predict an image in the folder; `{}` in an option is the folder."""

    def call(folder: Path) -> Any:
        shown = str(_image(folder)) if image is None else image.format(folder)
        line = [str(_student(folder, classes, maps)), *filter(None, [shown])]
        line += [option.format(folder) for option in options]
        return parse(Predict, [*line, "--device", "cpu"], "ckd predict").run()

    return call


def _by_bank(dim: int, labels: Any = None, maps: bool = True) -> Callable[[Path], Any]:
    def call(folder: Path) -> Any:
        with BankWriter(folder / "bank", dim) as writer:
            writer.write(torch.arange(3), torch.ones(3, dim), labels)
        return _predict("--bank", "{}/bank", maps=maps)(folder)

    return call


def _no_image(folder: Path) -> Any:
    (folder / "photos").mkdir()
    (folder / "photos" / "notes.txt").write_text("text")
    return _predict(image="{}/photos")(folder)


def _damaged_image(folder: Path) -> Any:
    (folder / "b.png").write_bytes(b"text")
    return _predict(image="{}/b.png")(folder)


def _export(*options: str) -> Callable[[Path], Any]:
    def call(folder: Path) -> Any:
        line = [str(_student(folder)), *(option.format(folder) for option in options)]
        return parse(Export, line, "ckd export").run()

    return call


def _export_of_a_model(folder: Path) -> Any:
    model: Any = create("resnet8:width=4", num_classes=3, image_size=8)
    return export_student(model, folder / "s.pt2")


def _unfinished(folder: Path) -> Any:
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text("{}")
    line = [str(folder / "run"), "--out", str(folder / "s.pt2")]
    return parse(Export, line, "ckd export").run()


def _of_a_library(folder: Path) -> Any:
    model = create("resnet8:width=4", num_classes=3, image_size=8)
    model.spec = "timm:resnet18"
    save(model, folder / "student.safetensors")
    return load_student(folder)


CASES = [
    Case("no image", _predict(image=""), ConfigError, ("name at least one image or folder",)),
    Case("no such image", _predict(image="{}/x.png"), ConfigError, ("x.png: there is no such",)),
    Case("folder without images", _no_image, ConfigError, ("photos holds no images", ".png")),
    Case("no image file", _damaged_image, DataError, ("1 of 1 files could not be predicted",)),
    Case("top 0", _predict("--top", "0"), ConfigError, ("--top must be at least 1, got 0",)),
    Case("batch 0", _predict("--batch-size", "0"), ConfigError, ("--batch-size must be",)),
    Case("csv and json", _predict("--csv", "--json"), ConfigError, ("--csv and --json",)),
    Case("out", _predict("--out", "{}/a.txt"), ConfigError, ("ends in .csv or .json",)),
    Case("no folder", _predict("--out", "{}/no/a.csv"), ConfigError, ("there is no folder",)),
    Case("by alone", _predict("--by", "means"), ConfigError, ("how to use --bank",)),
    Case("by", _predict("--by", "meens"), ConfigError, ("unknown by 'meens'", "means")),
    Case("no class head", _predict(classes=None), ModelError, ("no class head", "--bank")),
    Case("bank of another width", _by_bank(5), BankError, ("width 5", "width 12")),
    Case("bank without labels", _by_bank(12), BankError, ("no row of the bank", "label")),
    Case(
        "student without a map",
        _by_bank(12, torch.tensor([0, 1, 2]), maps=False),
        ModelError,
        ("no map between its space and the teacher's", "leave out --bank"),
    ),
    Case("export: suffix", _export("--out", "{}/a.pt"), ExportError, ("ends in none of", ".onnx")),
    Case(
        "export: format",
        _export("--out", "{}/a", "--format", "onnxx"),
        ConfigError,
        ("unknown format 'onnxx'", "onnx"),
    ),
    Case(
        "export: itself",
        _export("--out", "{}/student.safetensors"),
        ConfigError,
        ("is the student itself",),
    ),
    Case("export: no student", _export_of_a_model, ExportError, ("got ResNet", "load_student")),
    Case("export: unfinished", _unfinished, ModelError, ("not finished", "ckd train --resume")),
    Case(
        "a library's student", _of_a_library, ModelError, ("ckd predict", "timm:resnet18 --weights")
    ),
]
