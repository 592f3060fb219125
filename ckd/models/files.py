"""Models on disk: safetensors with a description of the model in the header."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from ckd._files import atomic_write, user_path
from ckd._hints import unknown
from ckd._version import __version__
from ckd.models import catalog
from ckd.models.base import Model, check_teacher, first_line
from ckd.models.preprocessing import Resize
from ckd.models.spec import POOLS, ModelError, Pool
from ckd.models.weights import Weights, fill, likely_cause, read_weights, shortened

STUDENT_FILE = "student.safetensors"  # in a run folder
# One entry: safetensors writes several in no fixed order, but equal models must give equal files.
_HEADER = "ckd_model"


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
    if model.native_size not in (None, model.image_size):
        raise ModelError(
            f"{model.spec} is run at {model.image_size} pixels, with position embeddings of its "
            f"{model.native_size}, and cannot be saved so; load it by its name instead"
        )
    description = {
        "spec": model.spec,
        "num_classes": model.num_classes,
        "image_size": model.image_size,
        "in_channels": model.in_channels,
        "class_names": list(class_names),
        # The argument for `create`; None where its default is meant (projection, classifier).
        "pool": model.pool if model.pool in POOLS else None,
        "preprocessing": {
            "mean": model.mean,
            "std": model.std,
            "resize": asdict(model.resize),
            "flip_channels": model.flip_channels,
        },
        "ckd_version": __version__,
    }
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    path = user_path(path)
    header = {_HEADER: json.dumps(description, sort_keys=True)}
    atomic_write(path, safetensors.torch.save(tensors, metadata=header))


def load(
    source: str | Path,
    *,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    in_channels: int | None = None,
    pool: Pool | None = None,
) -> Model:
    """A trained model in eval mode, on the CPU, whose parameters do not require gradients.

    `source` is a file written by `save`, a run folder that holds student.safetensors, or a name as
    for `create`. A name needs `weights`; timm: and hf: have pretrained weights as default. The
    sizes are read from the source; a size that is passed must agree. `pool` is that of `create`.

    `weights` is a state dict as .safetensors, or a file that torch.load reads with
    weights_only=True, alone or in a training checkpoint (docs/teachers.md lists the wrappers and
    other content that are known). The names are those of the network itself: those that timm or
    transformers give it, or the built-in model's; prefixes `module.` and `_orig_mod.`, and
    components in front that all names share, are removed. The number of classes is that of the
    stored classifier.

    Raises ModelError that names the file and the missing, unexpected or misshapen entries, or says
    why the model cannot be a teacher (see `check_teacher`).
    """
    asked = {"num_classes": num_classes, "image_size": image_size, "in_channels": in_channels}
    text = str(source)
    if isinstance(source, Path) or not catalog.is_spec(text):
        for name, value in (("weights", weights), ("pool", pool)):
            if value is not None:
                raise ModelError(f"{text} is not a model's name, so it cannot take {name}={value}")
        model = _from_file(_file_of(source), asked)
    elif weights is not None:
        model = _from_weights(text, user_path(weights), asked, pool)
    elif catalog.is_library(text):
        model = catalog.create(
            text,
            num_classes=None,
            image_size=image_size,
            in_channels=in_channels,
            pretrained=True,
            pool=pool,
        )
        _agree(text, asked, {"num_classes": model.num_classes})
    else:
        raise ModelError(f"{text!r} alone has no weights; pass weights=FILE (--teacher-weights)")
    check_teacher(model)
    return model.eval().requires_grad_(False)


def class_names(path: str | Path) -> tuple[str, ...]:
    """The class names stored in a file written by `save`, or in a run folder's student."""
    return tuple(_describe(_file_of(path))["class_names"])


def _file_of(source: str | Path) -> Path:
    path = user_path(source)
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
    shape: dict[str, Any] = {name: description[name] for name in asked}
    _agree(path, asked, shape)
    model = catalog.create(description["spec"], **shape, pool=description.get("pool"))
    if stored := description.get("preprocessing"):  # files of earlier versions have none
        model.preprocess_with(**{**stored, "resize": Resize(**stored["resize"])})
    model.class_names = tuple(description["class_names"])
    fill(model, read_weights(path, as_safetensors=True), model.spec)
    return model


def _from_weights(
    spec: str, path: Path, asked: Mapping[str, int | None], pool: Pool | None
) -> Model:
    weights = read_weights(path)
    if catalog.is_library(spec):
        sizes: dict[str, Any] = dict(asked)
        model = catalog.create(spec, **sizes, weights=weights, pool=pool)
        _agree(path, asked, {"num_classes": model.num_classes})
        return model
    try:
        weights, stored = _with_shape(spec, weights)
    except KeyError as error:
        raise ModelError(
            f"{path} has no {error.args[0]!r}, so it does not hold the weights of {spec!r}; "
            f"it has {', '.join(list(weights.tensors)[:5])}, ..."
        ) from error
    except IndexError as error:
        raise ModelError(
            f"{path} has an entry of too few dimensions, so it does not hold the weights of "
            f"{spec!r}"
        ) from error
    shape: dict[str, Any] = {
        name: stored[name] if asked[name] is None else asked[name] for name in asked
    }
    model = catalog.create(spec, **shape, pool=pool)
    fill(model, weights, spec)
    return model


def _with_shape(spec: str, weights: Weights) -> tuple[Weights, dict[str, Any]]:
    """The weights, without common components in front as far as needed, and their model's shape."""
    while True:
        try:
            return weights, catalog.shape_from_weights(spec, weights.tensors)
        except KeyError:
            longer, weights = weights, shortened(weights)
            if weights is longer:
                raise


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
            f"{path} cannot be read as safetensors ({first_line(error)}){likely_cause(path)}"
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
