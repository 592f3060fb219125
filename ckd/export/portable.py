"""A student as one network from pixels to logits and embeddings, and what is told of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ckd._errors import CkdError
from ckd._version import __version__
from ckd.models import Resize, Student
from ckd.models.base import agree

METADATA = "ckd.json"  # the name of the metadata in a file: a JSON object
FORMAT_VERSION = 1
_TOLERANCE = 1e-4  # of outputs, relative to the length of their row, for rounding in another order


class ExportError(CkdError, ValueError):
    """A student cannot be exported so; the message names the cause and another way."""


class Portable(nn.Module):
    """`images`, float32 [B, C, S, S] of pixels in 0..1, to a dict of outputs, by name:

    logits        [B, classes]; left out without a class head
    embedding     `Student.embedding`: in the first teacher's space [B, D] with a head, else the
                  student's own [B, W]
    embedding_1   the same for the second teacher, if it has a head; and so on

    The normalisation by mean and std is part of the network, so that no caller can get it wrong.
    """

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        model = self.student.model
        output = model((images - model.channel_mean) / model.channel_std)
        found = {} if output.logits is None else {"logits": output.logits}
        for name, number in embeddings_of(self.student):
            found[name] = self.student.to_embedding(output.embedding, number)
        return found


def embeddings_of(student: Student) -> Iterator[tuple[str, int]]:
    """The name of each embedding among the outputs, and the number of the teacher's map."""
    yield "embedding", 0
    for number, teacher in enumerate(student.teachers):
        if number > 0 and teacher.head is not None:
            yield f"embedding_{number}", number


def check_exportable(student: Student) -> None:
    """Raise ExportError for a student that prepares images as this module does not say."""
    model = student.model
    if model.resize != Resize() or model.flip_channels:
        raise ExportError(
            f"{student.spec} prepares images as its library does, which no student of a run does; "
            "export a trained run, or use the library's own export"
        )


def metadata(student: Student, *, normalised: bool) -> dict[str, Any]:
    """What a file tells of its student, as plain JSON values.

    normalised: whether the network itself applies mean and std.
    """
    size, channels = student.image_size, student.in_channels
    values = "pixels in 0..1" if normalised else "(pixels in 0..1 - mean) / std"
    outputs: dict[str, Any] = {}
    if student.num_classes is not None:
        outputs["logits"] = {"shape": ["batch", student.num_classes]}
    for name, number in embeddings_of(student):
        teacher = student.teachers[number] if student.teachers else None
        in_its_space = teacher is not None and teacher.head is not None
        width = teacher.dim if teacher and in_its_space else student.model.embedding_dim
        outputs[name] = {
            "shape": ["batch", width],
            "space": "teacher" if in_its_space else "student",
            "teacher": teacher.name if teacher else None,
        }
    return {
        "format_version": FORMAT_VERSION,
        "made_by": f"ckd {__version__}, torch {torch.__version__}",
        "student": student.spec,
        "class_names": list(student.class_names),
        "image_size": size,
        "in_channels": channels,
        "channels": "RGB" if channels == 3 else "gray" if channels == 1 else "unknown",
        "mean": list(student.mean),
        "std": list(student.std),
        "resize": "the centre square, scaled to image_size by Pillow's bicubic filter",
        "inputs": {
            "images": {
                "shape": ["batch", channels, size, size],
                "dtype": "float32",
                "values": values,
            }
        },
        "outputs": outputs,
    }


def example(student: Student, batch: int) -> Tensor:
    """Random pixels in 0..1 [batch, C, S, S], the same at every call."""
    shape = (batch, student.in_channels, student.image_size, student.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(batch))


@torch.inference_mode()
def check_same(student: Student, outputs_of: Any, what: str, batches: tuple[int, ...]) -> None:
    """Raise ExportError unless `outputs_of(pixels)`, a mapping, is what the student gives."""
    for batch in batches:
        pixels = example(student, batch)
        expected: Mapping[str, Tensor] = Portable(student)(pixels)
        given = outputs_of(pixels)
        for name in given:
            if not agree(torch.as_tensor(given[name]), expected[name], _TOLERANCE):
                raise ExportError(
                    f"{what} gives other {name} than the student {student.spec} for {batch} "
                    "images, so nothing was written; choose another format, and report this"
                )
