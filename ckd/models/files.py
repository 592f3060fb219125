"""Models on disk: safetensors with a description of the model in the header."""

from __future__ import annotations

import shlex
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ckd._files import atomic_write, check_regular, user_path
from ckd._hints import unknown
from ckd._version import __version__
from ckd.models import catalog, description, teacher_map
from ckd.models.base import Model, came, check_model, check_teacher, first_line
from ckd.models.description import Description
from ckd.models.preprocessing import Resize
from ckd.models.spec import POOLS, ModelError, Pool
from ckd.models.student import Student
from ckd.models.teacher_map import TeacherMap
from ckd.models.weights import DAMAGE, Weights, fill, read_safetensors, read_weights, shortened

STUDENT_FILE = "student.safetensors"  # in the folder of a finished run
_CONFIG_FILE = "config.json"  # in that of any run
_SIZES = ("num_classes", "image_size", "in_channels")


def save(
    model: Model,
    path: str | Path,
    *,
    class_names: Sequence[str] = (),
    teachers: Sequence[TeacherMap] = (),
) -> None:
    """Write weights and description to `path` (.safetensors), atomically, with checksums.

    teachers: the maps between a student and its teachers, which `load_student` reads. Equal weights
    and description give equal bytes. Raises ModelError unless `class_names` is empty or has one
    name per class, and for maps of another width; and the system's OSError.
    """
    check_model(model, "save")
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
    for teacher in teachers:
        if teacher.student_dim != model.embedding_dim:
            raise ModelError(
                f"the map to the teacher {teacher.name!r} is of a student of width "
                f"{teacher.student_dim}, {model.spec} has width {model.embedding_dim}"
            )
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in (model.state_dict() | teacher_map.tensors_of(teachers)).items()
    }
    metadata = description.header(
        {
            **{name: getattr(model, name) for name in ("spec", *_SIZES)},
            # The argument for `create`; None where its default is meant (projection, classifier).
            "pool": model.pool if model.pool in POOLS else None,
            "class_names": list(class_names),
            "preprocessing": {
                "mean": model.mean,
                "std": model.std,
                "resize": asdict(model.resize),
                "flip_channels": model.flip_channels,
            },
            **({"teachers": [*map(teacher_map.described, teachers)]} if teachers else {}),
            "ckd_version": __version__,
            "tensors": description.checksum(tensors),
        }
    )
    atomic_write(user_path(path), safetensors.torch.save(tensors, metadata=metadata))


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

    `weights` is a file or run folder of `save`, which must be of that name (a folder of a model may
    have been moved); or a state dict as .safetensors, or a file that torch.load reads with
    weights_only=True, alone or in a training checkpoint (docs/teachers.md lists the wrappers and
    other content that are known). The names are those of the network itself: those that timm or
    transformers give it, or the built-in model's; prefixes `module.` and `_orig_mod.`, and
    components in front that all names share, are removed. The number of classes is that of the
    stored classifier.

    A file alone names built-in models only: those of libraries may be downloaded, or be any folder.

    Raises ModelError that names the file and the missing, unexpected or misshapen entries, or says
    why the model cannot be a teacher (see `check_teacher`). Warns of a file of `save` without
    checksums.
    """
    sizes = {"num_classes": num_classes, "image_size": image_size, "in_channels": in_channels}
    return _loaded(source, weights, {**sizes, "pool": pool}).model


def load_student(source: str | Path, *, weights: str | Path | None = None) -> Student:
    """A trained student with its maps to its teachers, in eval mode, on the CPU, whose parameters
    do not require gradients.

    `source` is a finished run's folder, or its student.safetensors. For a student of a library,
    which a file does not choose, it is that model's name, and `weights` the folder or file. Raises
    ModelError as `load` does.
    """
    return _loaded(source, weights, dict.fromkeys((*_SIZES, "pool")))


def _loaded(source: str | Path, weights: str | Path | None, asked: Mapping[str, Any]) -> Student:
    """`load`, with the maps that the file holds."""
    if not isinstance(source, str | Path):
        raise ModelError(f"source must be a path or the name of a model, got {came(source)}")
    text, pool = str(source), asked["pool"]
    if isinstance(source, Path) or not catalog.is_spec(text):
        for name, value in (("weights", weights), ("pool", pool)):
            if value is not None:
                raise ModelError(f"{text} is not a model's name, so it cannot take {name}={value}")
        student = _from_file(_source_file(source), asked)
    elif weights is not None:
        student = _from_weights(text, user_path(weights), asked)
    elif catalog.is_library(text):
        options: dict[str, Any] = {**asked, "num_classes": None}
        student = Student(catalog.create(text, **options, pretrained=True))
        _agree(text, asked, {"num_classes": student.model.num_classes})
    else:
        raise ModelError(f"{text!r} alone has no weights; pass weights=FILE (--teacher-weights)")
    # The forward of a built-in model has no random part, but it may take long: a file of a
    # hundred kilobytes can ask for the attention of 65,000 tokens.
    model = student.model
    if catalog.is_library(model.spec):
        check_teacher(model)
    elif not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise ModelError(f"{weights or source} cannot be a teacher: a weight is not finite")
    return student.eval().requires_grad_(False)


def class_names(path: str | Path) -> tuple[str, ...]:
    """The class names stored in a file written by `save`, or in a run folder's student."""
    return tuple(_described(_source_file(path))["class_names"])


def _source_file(source: str | Path) -> Path:
    if path := _file(user_path(source)):
        return path
    message = unknown("model", str(source), catalog.known())
    raise ModelError(f"{message}; nor is there a file or run folder of that name")


def _file(path: Path) -> Path | None:
    """`path`, or the student in a run folder; None if nothing is there. Raises ModelError."""
    folder = None
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            folder, path = path, path / STUDENT_FILE
        # The user may name a link; a run's file must lie in its folder.
        check_regular(path, follow=folder is None)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: NUL
        if folder is None:
            return None
        raise ModelError(f"{folder} holds no {STUDENT_FILE}; {_unfinished(folder)}") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror})") from error
    return path


def _unfinished(folder: Path) -> str:
    """What to do about a folder without a student."""
    if (folder / _CONFIG_FILE).is_file():
        command = f"ckd train --resume {shlex.quote(str(folder))}"
        return f"it is a run that is not finished: go on with {command}"
    runs = sorted(path.parent for path in folder.glob(f"*/{STUDENT_FILE}"))
    if runs:
        return f"pass a run in it, such as {runs[0]}"
    return "pass a finished run's folder"


def _described(path: Path) -> Description:
    if stored := description.read(path):
        return stored
    raise ModelError(
        f"{path} does not say which model it holds (it was not written by ckd.models.save); "
        f"pass a model's name and weights={str(path)!r}"
    )


def _from_file(path: Path, asked: Mapping[str, Any]) -> Student:
    stored = _described(path)
    spec = stored["spec"]
    if catalog.is_library(spec):
        raise ModelError(
            f"{path} holds a model of a library, which a file does not choose: if you trust "
            f"{spec!r}, pass it with the file as its weights: load({spec!r}, "
            f"weights={str(path)!r}), --teacher (or --eval) {spec} --teacher-weights {path}, "
            f"ckd predict|export|eval {spec} --weights {path}"
        )
    return _restored(path, stored, asked)


def _from_weights(spec: str, given: Path, asked: Mapping[str, Any]) -> Student:
    path = _file(given)
    if path is None:
        raise ModelError(f"{given} cannot be read (there is no such file)")
    if path.suffix == ".safetensors" and (stored := description.read(path)):
        if stored["spec"] != spec and not catalog.is_folder(spec):
            raise ModelError(f"{path} holds {stored['spec']!r}; {spec!r} was asked for")
        return _restored(path, {**stored, "spec": spec}, asked)
    weights = read_weights(path)
    if catalog.is_library(spec):
        model = catalog.create(spec, **asked, weights=weights)
        _agree(path, asked, {"num_classes": model.num_classes})
        return Student(model)
    try:
        weights, own = _with_shape(spec, weights)
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
    sizes = {name: own[name] if asked[name] is None else asked[name] for name in own}
    return Student(_filled(spec, weights, {**sizes, "pool": asked["pool"]}))


def _restored(path: Path, stored: Description, asked: Mapping[str, Any]) -> Student:
    """The model that `save` wrote to `path`, with its maps."""
    arguments = {name: value for name, value in stored.items() if name in asked}
    _agree(path, asked, arguments)
    tensors = read_safetensors(path)
    if stored["tensors"] not in (None, description.checksum(tensors)):
        raise ModelError(f"{path} is damaged: its tensors do not match their checksum")
    own, maps = teacher_map.divided(tensors, len(stored["teachers"]))
    model = _filled(stored["spec"], Weights(path, own), arguments)
    if about := stored["preprocessing"]:  # files of earlier versions have none
        resize = Resize(**about["resize"])
        model.preprocess_with(about["mean"], about["std"], resize, about["flip_channels"])
    model.class_names = tuple(stored["class_names"])
    return Student(
        model,
        [
            teacher_map.restored(path, number, described, weights, model.embedding_dim)
            for number, (described, weights) in enumerate(zip(stored["teachers"], maps))
        ],
    )


def _filled(spec: str, weights: Weights, arguments: Mapping[str, Any]) -> Model:
    """The model with these arguments of `create` and these weights, by the model's own names.

    A built-in model gets memory once the weights are known to fit: its name and sizes may be those
    of a hostile file.
    """
    path, tensors = weights
    elements = [tensor.numel() for tensor in tensors.values()]
    if catalog.is_library(spec):
        if (arguments["num_classes"] or 0) > max(elements, default=0):
            raise ModelError(f"{path} has too few weights for {arguments['num_classes']:,} classes")
        model = catalog.create(spec, **arguments)
        fill(model, weights, spec)
        return model
    try:
        least = catalog.least_entries(spec)
        if len(elements) < least:
            raise ModelError(f"{spec!r} has at least {least:,} weights, not {len(elements):,}")
        if sum(elements) > path.stat().st_size:
            raise ModelError("its tensors share memory")
        with torch.device("meta"):
            model = catalog.create(spec, **arguments)
    except DAMAGE as error:
        raise ModelError(f"{path} does not fit {spec!r}: {first_line(error)}") from error
    fill(model, weights, spec)
    model.preprocess_with(model.mean, model.std, model.resize, model.flip_channels)
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


def _agree(where: object, asked: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    for name, value in stored.items():
        if asked[name] is not None and asked[name] != value:
            raise ModelError(
                f"{where} has {name} {value}, {asked[name]} was asked for; "
                f"leave {name} out, or choose another model"
            )
