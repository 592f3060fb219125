"""Writes a student in one of the formats, and gives the program that loads it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from ckd._files import atomic_write, user_path
from ckd._hints import unknown
from ckd.export import graph, programs, weights
from ckd.export.portable import ExportError, metadata
from ckd.models import Student
from ckd.models.base import came

Format = Literal["safetensors", "torch-export", "onnx"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES: Mapping[str, Format] = {
    ".safetensors": "safetensors",
    ".pt2": "torch-export",
    ".onnx": "onnx",
}


class Exported(NamedTuple):
    """`files`: what was written, the one that was asked for last. `program`: Python that loads it
    without ckd. `metadata`: what the file tells of the student."""

    format: Format
    files: tuple[Path, ...]
    program: str
    metadata: Mapping[str, Any]


def export_student(student: Student, path: str | Path, format: Format | None = None) -> Exported:
    """Write the student to `path` for programs without ckd, atomically.

    torch-export (.pt2) and onnx (.onnx): a graph from images, float32 [B, C, S, S] of pixels in
    0..1 (RGB, or gray for one channel; any B), to `logits` [B, classes], left out without a class
    head, and `embedding`, as `Student.embedding` gives it: in the teacher's space with a head, else
    the student's own. A student of several teachers has `embedding_1`, ... for those with a head.
    mean and std are part of the graph; images are to be scaled to S x S before.

    safetensors: the weights under the names of the library that has the network: timm for students
    timm:NAME and for the package's own vision transformer, transformers for hf:NAME, and torch
    alone for CIFAR ResNets, whose forward is part of the program. A head into the teacher's space
    is a second file, STEM.embedding.safetensors. Images are to be normalised by mean and std.

    Each file holds its metadata (`ckd.json`): class names, image size, mean, std, inputs, outputs.
    The outputs are compared with the student's before anything is written; an ONNX file where
    onnxruntime is installed, the package's own networks as safetensors in the tests alone.

    format: default by the suffix of `path`. The student must be on the CPU. Raises ExportError for
    a student that the format cannot express, ImportError without the extra `onnx`, and the
    system's OSError.

    >>> exported = export_student(ckd.load_student("runs/mine"), "student.onnx")
    >>> print(exported.program)
    """
    if not isinstance(student, Student):
        raise ExportError(f"student must be one of ckd.load_student, got {came(student)}")
    path = user_path(path)
    format = chosen(path, format)
    if student.device.type != "cpu":
        raise ExportError(f"student must be on the CPU, it is on {student.device}: student.cpu()")
    student = copy.deepcopy(student).eval().requires_grad_(False)  # the caller may train it on
    about = metadata(student, normalised=format != "safetensors")
    if format != "safetensors":
        write = graph.onnx if format == "onnx" else graph.torch_export
        program = programs.onnx_program if format == "onnx" else programs.torch_export_program
        atomic_write(path, write(student))
        return Exported(format, (path,), program(student, path), about)
    network = weights.network_of(student)
    files = []
    # The file that is asked for comes last: with it, all are there.
    for suffix, data in reversed(weights.safetensors_files(student, network).items()):
        files.append(path if suffix == ".safetensors" else path.with_name(path.stem + suffix))
        atomic_write(files[-1], data)
    return Exported(
        format, tuple(files), programs.safetensors_program(student, path, network), about
    )


def chosen(path: Path, format: str | None) -> Format:
    """The format that is asked for, or that of the suffix of `path`. Raises ExportError."""
    by_suffix = SUFFIXES.get(path.suffix.lower())
    if format is None and by_suffix is None:
        raise ExportError(
            f"{path} ends in none of {', '.join(SUFFIXES)}; end it so, or choose --format "
            f"{'|'.join(FORMATS)}"
        )
    if format is not None and format not in FORMATS:
        raise ExportError(unknown("format", format, FORMATS, "--format takes"))
    if format is not None and by_suffix not in (None, format):
        raise ExportError(
            f"{path} is named as {by_suffix}, and --format is {format}; choose one of them"
        )
    found = by_suffix if format is None else format
    return next(one for one in FORMATS if one == found)
