"""Models on disk: safetensors with a description of the model in the header."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ckd._files import LFS_POINTER, atomic_write, is_lfs_pointer
from ckd._hints import unknown
from ckd._version import __version__
from ckd.models import catalog
from ckd.models.base import Model, first_line
from ckd.models.spec import ModelError

STUDENT_FILE = "student.safetensors"  # in a run folder
# One entry: safetensors writes several in no fixed order, but equal models must give equal files.
_HEADER = "ckd_model"
# Errors of safetensors and torch.load on damaged or foreign files.
_DAMAGE = (
    safetensors.SafetensorError,
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
    pickle.UnpicklingError,
)


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0  # not isinstance: True is an int too


# Field of the header -> check of its value.
_DESCRIPTION: dict[str, Callable[[Any], bool]] = {
    "spec": lambda value: isinstance(value, str),
    "num_classes": lambda value: value is None or _is_size(value),
    "image_size": _is_size,
    "in_channels": _is_size,
    "class_names": lambda value: (
        isinstance(value, list) and all(isinstance(name, str) for name in value)
    ),
}


def save(model: Model, path: str | Path, *, class_names: Sequence[str] = ()) -> None:
    """Write weights and description to `path` (.safetensors), atomically.

    Equal weights and description give equal bytes. Raises ModelError unless `class_names` is empty
    or has one name per class, and the system's OSError.
    """
    # torch.compile keeps the original model there.
    model = getattr(model, "_orig_mod", model)
    if class_names and len(class_names) != model.num_classes:
        raise ModelError(
            f"{len(class_names)} class names for {model.spec} with {model.num_classes} classes"
        )
    description = {
        "spec": model.spec,
        "num_classes": model.num_classes,
        "image_size": model.image_size,
        "in_channels": model.in_channels,
        "class_names": list(class_names),
        "ckd_version": __version__,
    }
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    header = {_HEADER: json.dumps(description, sort_keys=True)}
    atomic_write(path, safetensors.torch.save(tensors, metadata=header))


def load(
    source: str | Path,
    *,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    in_channels: int | None = None,
) -> Model:
    """A trained model in eval mode, on the CPU, whose parameters do not require gradients.

    `source` is a file written by `save`, a run folder that holds student.safetensors, or a name as
    for `create`. A name needs `weights` (safetensors, or a state dict that torch.load reads with
    weights_only=True); timm: and hf: have pretrained weights as default. The sizes are read from
    the source; a size that is passed must agree. Raises ModelError that names the file and the
    missing, unexpected or misshapen entries.
    """
    asked = {"num_classes": num_classes, "image_size": image_size, "in_channels": in_channels}
    text = str(source)
    if isinstance(source, Path) or not catalog.is_spec(text):
        if weights is not None:
            raise ModelError(f"{text} is not a model's name, so it cannot take weights={weights}")
        path = _file_of(source)
        model = _from_file(path, asked)
    elif weights is not None:
        model = _from_weights(text, Path(weights), asked)
    elif catalog.is_library(text):
        model = catalog.create(
            text,
            num_classes=None,
            image_size=image_size,
            in_channels=in_channels,
            pretrained=True,
        )
        _agree(text, asked, {"num_classes": model.num_classes})
    else:
        raise ModelError(f"{text!r} alone has no weights; pass weights=FILE (--teacher-weights)")
    return model.eval().requires_grad_(False)


def class_names(path: str | Path) -> tuple[str, ...]:
    """The class names stored in a file written by `save`, or in a run folder's student."""
    file = _file_of(path)
    return tuple(_describe(file)["class_names"])


def _file_of(source: str | Path) -> Path:
    path = Path(source)
    if path.is_dir():
        if (path / STUDENT_FILE).is_file():
            return path / STUDENT_FILE
        raise ModelError(f"{path} holds no {STUDENT_FILE}; pass a finished run's folder")
    if path.is_file():
        return path
    message = unknown("model", str(source), catalog.known())
    raise ModelError(f"{message}; nor is there a file or run folder of that name")


def _from_file(path: Path, asked: Mapping[str, int | None]) -> Model:
    description = _describe(path)
    shape = {name: description[name] for name in asked}
    _agree(path, asked, shape)
    model = catalog.create(description["spec"], **shape)
    _fill(model, _checked(_read_safetensors(path), path), path)
    return model


def _from_weights(spec: str, path: Path, asked: Mapping[str, int | None]) -> Model:
    read = _read_safetensors if path.suffix == ".safetensors" else _torch_load
    tensors = _checked(read(path), path)
    shape: dict[str, Any] = dict(asked)
    if not catalog.is_library(spec):
        try:
            stored = catalog.shape_from_weights(spec, tensors)
        except KeyError as error:
            raise ModelError(
                f"{path} has no {error.args[0]!r}, so it does not hold the weights of {spec!r}; "
                f"it has {', '.join(list(tensors)[:5])}, ..."
            ) from error
        except IndexError as error:
            raise ModelError(
                f"{path} has an entry of too few dimensions, so it does not hold the weights of "
                f"{spec!r}"
            ) from error
        shape = {name: stored[name] if asked[name] is None else asked[name] for name in asked}
    model = catalog.create(spec, **shape)
    _fill(model, tensors, path)
    return model


def _agree(where: object, asked: Mapping[str, int | None], stored: Mapping[str, Any]) -> None:
    for name, value in stored.items():
        if asked[name] is not None and asked[name] != value:
            raise ModelError(
                f"{where} has {name} {value}, {asked[name]} was asked for; "
                f"leave {name} out, or choose another model"
            )


def _describe(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} cannot be read as safetensors ({first_line(error)}){_likely_cause(path)}"
        ) from error
    if header is None:
        raise ModelError(
            f"{path} does not say which model it holds (it was not written by ckd.models.save); "
            f"pass a model's name and weights={str(path)!r}"
        )
    try:
        description = json.loads(header)
        for name, fits in _DESCRIPTION.items():
            if not fits(description[name]):
                raise TypeError(f"{name} is {description[name]!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: its header's {_HEADER} is damaged ({error!r})") from error
    return description


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except _DAMAGE as error:
        raise ModelError(
            f"{path} cannot be read as safetensors ({first_line(error)}){_likely_cause(path)}"
        ) from error


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({first_line(error)})") from error
    except _DAMAGE as error:
        # Without torch's own message: for most foreign files it advises weights_only=False, which
        # lets the file run any code.
        raise ModelError(
            f"{path} cannot be read by torch.load with weights_only=True"
            + (_likely_cause(path) or "; it is damaged, or no state dict: save model.state_dict()")
        ) from error


def _likely_cause(path: Path) -> str:
    """The end of a message: a guess at the real format of an unreadable file, or ""."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return ""
    if is_lfs_pointer(start):
        return f"; {LFS_POINTER}"
    if path.suffix != ".safetensors" and start[8:9] == b"{":
        return "; it seems to hold safetensors: rename it to end in .safetensors"
    if path.suffix == ".safetensors" and start.startswith((b"PK", b"\x80")):
        return "; it seems to be written by torch.save: rename it to end in .pt"
    return ""


def _checked(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict of a file's content, checked, without wrappers and prefixes of names."""
    for key in ("state_dict", "model"):  # usual ways of wrapping it in a training checkpoint
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise ModelError(f"{path} does not hold a state dict (names to tensors)")
    for name, tensor in content.items():
        strided = tensor.layout == torch.strided and not tensor.is_nested
        if not strided or tensor.is_complex() or tensor.is_quantized:
            raise ModelError(
                f"{path}: {name} must be a dense tensor of real numbers, "
                f"got {tensor.dtype} in layout {tensor.layout}"
            )
        if tensor.is_meta:
            raise ModelError(f"{path}: {name} has a shape but no values (device meta)")
    for prefix in ("_orig_mod.", "module."):  # torch.compile, DataParallel
        if content and all(name.startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): tensor for name, tensor in content.items()}
    return content


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    # Only batch norms with momentum=None use this counter; many published weights lack it.
    missing = [
        name for name in own.keys() - tensors.keys() if not name.endswith("num_batches_tracked")
    ]
    misshapen = [
        f"{name} {list(tensors[name].shape)} for {list(own[name].shape)}"
        for name in sorted(own.keys() & tensors.keys())
        if tensors[name].shape != own[name].shape
    ]
    problems = {
        "missing": sorted(missing),
        "unexpected": sorted(tensors.keys() - own.keys()),
        "of another shape": misshapen,
    }
    told = [
        f"{len(names)} {what} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for what, names in problems.items()
        if names
    ]
    if told:
        raise ModelError(f"{path} does not fit {model.spec!r}: {'; '.join(told)}")
    model.load_state_dict(tensors, strict=False)
