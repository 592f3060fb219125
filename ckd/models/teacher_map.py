"""The map between a student and the rows of one teacher, as a student's file holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ckd.heads import HeadKind, TeacherSpaceHead, widened
from ckd.models.base import first_line
from ckd.models.spec import ModelError
from ckd.models.weights import DAMAGE, Weights, fill

NAME_LIMIT = 4096  # characters of a teacher's name in a file
_PREFIX = "teachers"  # of the tensors' names in a file: teachers.0.head.mean


class Description(TypedDict):
    """A map in a file's header. `projection`: with a bias (affine), without (linear), or none."""

    name: str
    dim: int
    head: HeadKind | None
    hidden: int | None
    projection: Literal["affine", "linear"] | None


class TeacherMap(nn.Module):
    """How a student is compared with the rows of one teacher; it has a head, a projection, or both.

        head         s -> z, in the teacher's space: compared with a row t itself
        projection   t -> P t + b, of the student's width: compared with s itself

    With both, the head is what is used. Comparisons are by cosine.

    Args:
        name: the teacher's, "" where the bank does not say. dim: D, the width of its rows.
        head: from the student into the teacher's space.
        weight, bias: P [W, D] and b [W], as in `ckd.EmbeddingDistillationLoss`.

    The modules and parameters are those that are passed, not copies: a run's map shares what it
    trains. Raises ModelError for widths that do not agree, and if there is no head and no weight.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        name: str,
        dim: int,
        *,
        head: TeacherSpaceHead | None = None,
        weight: nn.Parameter | None = None,
        bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.name, self.dim, self.head = name, dim, head
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        widths: list[tuple[int, ...]] = []
        widths += [] if head is None else [(head.student_dim, head.teacher_dim)]
        widths += [] if weight is None else [tuple(weight.shape)]
        if not widths or {*widths} != {(widths[0][0], dim)}:
            raise ModelError(
                f"a map to a teacher of width {dim} needs a head, a projection or both, of one "
                f"student's width, got (student, teacher) {widths or 'none'}"
            )
        self.student_dim = widths[0][0]
        if bias is not None and (weight is None or bias.shape != (self.student_dim,)):
            raise ModelError(
                f"bias must be [{self.student_dim}] and goes with a weight, got "
                f"{list(bias.shape)} {'without one' if weight is None else 'with one'}"
            )

    def to_embedding(self, features: Tensor) -> Tensor:
        """The student's embedding [B, W] as it is compared: in the teacher's space [B, D] with a
        head, unchanged without."""
        return features if self.head is None else self.head.to_teacher(self.head(features))

    def comparable(self, rows: Tensor) -> Tensor:
        """The teacher's rows [N, D] as they are compared: [N, D] with a head, P t + b [N, W]
        without; in float32 (float64 for such rows), under autocast too."""
        if rows.dim() != 2 or rows.shape[1] != self.dim:
            raise ModelError(
                f"rows must be [N, {self.dim}], those of the teacher {self.name!r}, "
                f"got {list(rows.shape)}"
            )
        rows = widened(rows.to(next(self.parameters()).device))
        if self.head is not None:
            return rows
        assert self.weight is not None
        bias = None if self.bias is None else self.bias.to(rows.dtype)
        with torch.autocast(rows.device.type, enabled=False):  # as precise as rows under a head
            return F.linear(rows, self.weight.to(rows.dtype), bias)

    def extra_repr(self) -> str:
        return f"name={self.name!r}, dim={self.dim}, projection={self.weight is not None}"


def described(teacher: TeacherMap) -> Description:
    """What the header says of a map."""
    head = teacher.head
    projection: Literal["affine", "linear"] = "linear" if teacher.bias is None else "affine"
    return {
        "name": teacher.name,
        "dim": teacher.dim,
        "head": None if head is None else head.kind,
        "hidden": None if head is None else head.hidden,
        "projection": None if teacher.weight is None else projection,
    }


def tensors_of(teachers: Sequence[TeacherMap]) -> dict[str, Tensor]:
    """The tensors of all maps, by their names in a file."""
    return {
        f"{_PREFIX}.{number}.{name}": tensor
        for number, teacher in enumerate(teachers)
        for name, tensor in teacher.state_dict().items()
    }


def divided(
    tensors: Mapping[str, Tensor], count: int
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The tensors of a file's student, and of each of its `count` maps."""
    student: dict[str, Tensor] = {}
    maps: list[dict[str, Tensor]] = [{} for _ in range(count)]
    owners = {f"{_PREFIX}.{number}": tensors for number, tensors in enumerate(maps)}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        number, _, short = rest.partition(".")
        owner = owners.get(f"{first}.{number}")
        if owner is None:
            student[name] = tensor
        else:
            owner[short] = tensor
    return student, maps


def restored(
    path: Path, number: int, about: Description, tensors: Mapping[str, Tensor], student_dim: int
) -> TeacherMap:
    """The map that the file at `path` describes, with its tensors.

    It gets memory once they are known to fit. Raises ModelError.
    """
    what = f"teacher {number}"
    try:
        with torch.device("meta"):
            teacher = _empty(about, student_dim)
    except DAMAGE as error:
        raise ModelError(f"{path} does not fit {what}: {first_line(error)}") from error
    fill(teacher, Weights(path, tensors), what)
    if not all(bool(tensor.isfinite().all()) for tensor in teacher.state_dict().values()):
        raise ModelError(f"{path} cannot be used: a number of the map to {what} is not finite")
    if teacher.head is not None and not teacher.head.sigma > 0:
        raise ModelError(f"{path} cannot be used: sigma of the map to {what} is not above 0")
    return teacher


def _empty(about: Description, student_dim: int) -> TeacherMap:
    dim, head, weight, bias = about["dim"], None, None, None
    if about["head"] is not None:
        head = TeacherSpaceHead(student_dim, dim, about["head"], hidden=about["hidden"])
    if about["projection"] is not None:
        weight = nn.Parameter(torch.empty(student_dim, dim))
        bias = nn.Parameter(torch.empty(student_dim)) if about["projection"] == "affine" else None
    return TeacherMap(about["name"], dim, head=head, weight=weight, bias=bias)
