"""What a model's file says of the model, with checksums of that and of the tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict, cast, get_type_hints

import safetensors
import torch
import xxhash
from torch import Tensor

from ckd._errors import warn
from ckd._json import CHECKSUM, JsonError, check_types, parse_object, sealed, unsealed
from ckd.models import teacher_map
from ckd.models.measure import update_hash
from ckd.models.preprocessing import Filter
from ckd.models.spec import LARGEST, ModelError, Pool
from ckd.models.weights import DAMAGE, not_safetensors

# One entry: safetensors writes several in no fixed order, but equal models must give equal files.
_HEADER = "ckd_model"
_LIMIT_BYTES = 16 << 20
_LIMIT_NAME = 4096  # characters of a model's name, which may be a folder
_LIMIT_TEACHERS = 256  # their types are checked one by one
_LARGEST_DIM = 2**31 - 1  # of a teacher's rows
_FLOAT = torch.finfo(torch.float32)


class _Resize(TypedDict):
    edge: int | None
    keep_aspect: bool
    filter: Filter
    half_even: bool


class Preprocessing(TypedDict):
    mean: list[float]
    std: list[float]
    resize: _Resize
    flip_channels: bool


class Description(TypedDict):
    """The arguments for `create`, the names of the classes, the maps to teachers, and the
    `checksum` of the tensors."""

    spec: str
    num_classes: int | None
    image_size: int
    in_channels: int
    pool: Pool | None
    class_names: list[str]
    preprocessing: Preprocessing | None
    teachers: list[teacher_map.Description]
    ckd_version: str
    tensors: str | None


# Files of earlier versions lack these; without maps to teachers, "teachers" is left out.
_LATER: dict[str, Any] = {
    **{"pool": None, "preprocessing": None, "teachers": []},
    **{"ckd_version": "", "tensors": None},
}


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """xxh3 (hex) over name, dtype, shape and bytes of every tensor, by name."""
    return update_hash(xxhash.xxh3_64(), tensors).hexdigest()


def header(description: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of the file. Raises ModelError for a description that would not be read."""
    data = sealed(description)
    try:
        _parsed(data)
    except JsonError as error:
        raise ModelError(f"the model cannot be saved: {error}") from error
    return {_HEADER: data.decode()}


def read(path: Path) -> Description | None:
    """The description in a file of safetensors; None if it has none.

    Warns if it has no checksums. Raises ModelError.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except DAMAGE as error:
        raise not_safetensors(path, error) from error
    text = metadata.get(_HEADER)
    if text is None:
        if any('"ckd_version"' in other for other in metadata.values()):
            raise ModelError(f"{path}: its header is damaged ({_HEADER} has another name)")
        return None
    try:
        description, whole = _parsed(text.encode())
    except JsonError as error:
        raise ModelError(f"{path}: its header's {_HEADER} is damaged ({error})") from error
    if not whole:
        warn(
            f"{path} is of an earlier version and has no checksum, so that damage to it is not "
            "noticed; load it and save it again",
            stacklevel=4,
        )
    return description


def _parsed(data: bytes) -> tuple[Description, bool]:
    """The description, checked, and whether it has both checksums. Raises JsonError."""
    if len(data) > _LIMIT_BYTES:
        raise JsonError(f"it has {len(data):,} bytes, more than {_LIMIT_BYTES:,}")
    values = parse_object(data)
    whole = CHECKSUM in values and values.get("tensors") is not None
    if CHECKSUM in values:
        values = unsealed(values, data)
    values, kinds = {**_LATER, **values}, get_type_hints(Description)
    if odd := values.keys() ^ kinds.keys():
        raise JsonError(f"missing or unknown: {', '.join(sorted(odd))}")
    if isinstance(values["teachers"], list) and len(values["teachers"]) > _LIMIT_TEACHERS:
        raise JsonError(f"it has more than {_LIMIT_TEACHERS} teachers")
    for name, kind in kinds.items():
        try:
            check_types(values[name], kind)
        except JsonError as error:
            raise JsonError(f"{name} is {values[name]!r:.80}: {error}") from error
    description = cast(Description, values)
    for name, fits in _ranges(description):
        if not fits:
            raise JsonError(f"{name} is {values[name]!r:.80}: out of range")
    return description, whole


def _ranges(description: Description) -> Iterator[tuple[str, bool]]:
    """Each field whose type leaves too much, and whether its value is in range."""
    for name, largest in LARGEST.items():
        value = description[name]  # type: ignore[literal-required]
        yield name, _is_size(value, largest) or (name == "num_classes" and value is None)
    yield "spec", len(description["spec"]) <= _LIMIT_NAME
    yield "teachers", all(map(_is_map, description["teachers"]))
    names, classes = description["class_names"], description["num_classes"]
    yield "class_names", len(names) in (0, classes)
    if (preprocessing := description["preprocessing"]) is not None:
        mean, std = preprocessing["mean"], preprocessing["std"]
        edge = preprocessing["resize"]["edge"]
        yield (
            "preprocessing",
            len(mean) == len(std) == description["in_channels"]
            and all(_FLOAT.min <= value <= _FLOAT.max for value in mean)
            and all(_FLOAT.tiny <= value <= _FLOAT.max for value in std)
            and (edge is None or _is_size(edge, LARGEST["image_size"])),
        )


def _is_map(about: teacher_map.Description) -> bool:
    hidden = about["hidden"]
    return (
        len(about["name"]) <= teacher_map.NAME_LIMIT
        and _is_size(about["dim"], _LARGEST_DIM)
        and (_is_size(hidden, _LARGEST_DIM) if about["head"] == "mlp" else hidden is None)
        and (about["head"] is not None or about["projection"] is not None)
    )


def _is_size(value: object, largest: int) -> bool:
    return type(value) is int and 1 <= value <= largest  # not isinstance: True is an int too
