"""Runs the program that an export prints where ckd cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ckd.export import Exported, Format, export_student
from ckd.export.programs import IMAGE
from ckd.models import Student, TeacherMap
from tests.test_models_student import teacher_map

NAMES = ("ant", "b'ee\"\n", "ç")
_BEFORE = "import sys; sys.modules['ckd'] = None\n"
_AFTER = """
import numpy, torch
told = {name: torch.as_tensor(globals()[name]).detach().numpy() for name in sys.argv[1:]}
numpy.savez("outputs.npz", **told)
"""


def photo(folder: Path) -> Path:
    """A turned image that is not square."""
    pixels = np.random.default_rng(3).integers(0, 256, (23, 37, 3), dtype=np.uint8)
    path = folder / "photo.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def with_maps(model: object, maps: list[dict[str, object]]) -> Student:
    """A student in evaluation mode whose batch norms have seen something."""
    from ckd.models import Model

    assert isinstance(model, Model)
    shape = (8, model.in_channels, model.image_size, model.image_size)
    with torch.no_grad():
        model.train()(torch.randn(shape, generator=torch.Generator().manual_seed(4)))
    made: list[TeacherMap] = [teacher_map(**one) for one in maps]
    return Student(model, made).eval().requires_grad_(False)


def outputs_without_ckd(exported: Exported, image: Path, names: list[str]) -> dict[str, Tensor]:
    """These variables of the printed program, run on this image in another process."""
    folder = exported.files[-1].parent
    code = exported.program.replace(IMAGE, repr(str(image)))
    assert code != exported.program
    command = [sys.executable, "-c", _BEFORE + code + _AFTER, *names]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "outputs.npz") as file:
        told = {name: torch.from_numpy(file[name]) for name in names}
    if "logits" in names:
        place = int(told["logits"].argmax())
        known = exported.metadata["class_names"]
        expected = known[place] if known else ""
        assert expected in done.stdout
    return told


def check_program(student: Student, folder: Path, name: str, format: Format) -> Exported:
    """The program gives ckd's logits and embedding of a photo, to the rounding of float32."""
    folder.mkdir(exist_ok=True)
    exported = export_student(student, folder / name, format)
    image = photo(folder)
    x = student.preprocess(Image.open(image))
    expected = {"embedding": student.embedding(x)}
    if student.num_classes is not None:
        expected["logits"] = student.logits(x)
    told = outputs_without_ckd(exported, image, [*expected])
    for which, value in expected.items():
        assert told[which].shape == value.shape
        error = (told[which] - value).norm() / value.norm()
        assert error < 1e-5, f"{which}: {error}"
    return exported
