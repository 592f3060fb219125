"""Reads a state dict, and fits it to a network, whatever training code wrapped around it."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import os
import pathlib
import pickle
import struct
import types
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ckd._files import LFS_POINTER, is_lfs_pointer, open_regular
from ckd.models.base import first_line
from ckd.models.spec import ModelError

# Under one of these a training checkpoint has its state dict. The average of the weights comes
# first, as in timm: it is what its author evaluates.
_WRAPPERS = ("state_dict_ema", "state_dict", "model_state_dict", "model", "net", "module")
_ZIP_START = b"PK\x03\x04"
_PACKED = {getattr(torch, "float4_e2m1fn_x2", None)}  # two numbers an element; not copied by torch
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel, torch.compile
_numpy_scalar, _numpy_array = (x.__reduce__()[0] for x in (np.float64(0), np.empty(0)))
# Types that training code stores beside tensors, and that run no code when they are unpickled.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    types.SimpleNamespace,
    collections.defaultdict,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    set,
    *(datetime.date, datetime.datetime, datetime.timedelta),
    np.ndarray,
    (np.dtype, "numpy.dtype"),
    *(type(np.dtype(kind)) for kind in "?bhilqBHILQefdSU"),
    # The functions that unpickle numpy's scalars and arrays, by their names in numpy 2 and numpy 1.
    *((_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
    *((_numpy_array, f"numpy.{core}.multiarray._reconstruct") for core in ("_core", "core")),
]
# What safetensors, torch.load and the libraries of models raise for damaged and foreign files, and
# for names and settings that do not fit: they have few errors of their own.
DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.PickleError,
    safetensors.SafetensorError,
    struct.error,
)


class Weights(NamedTuple):
    """A state dict and the file it was read from."""

    path: Path
    tensors: Mapping[str, Tensor]


def read_weights(path: Path) -> Weights:
    """The state dict in a file, without wrappers around it and prefixes of names.

    The tensors are mapped from the file where its format allows it. Raises ModelError for a file
    that cannot be read or holds anything else.
    """
    read = read_safetensors if path.suffix == ".safetensors" else _torch_load
    return Weights(path, _checked(read(path), path))


def fill(module: nn.Module, weights: Weights, spec: str) -> None:
    """Copy the weights into `module`; ModelError names those that do not fit.

    A module on the device meta gets memory, on torch's default device, once they are known to fit.
    """
    own, (path, tensors) = module.state_dict(), weights
    # Only batch norms with momentum=None use this counter; many published weights lack it.
    missing = [
        name for name in own.keys() - tensors.keys() if not name.endswith("num_batches_tracked")
    ]
    misshapen = [
        f"{name} {list(tensors[name].shape)} for {list(own[name].shape)}"
        for name in sorted(own.keys() & tensors.keys())
        if tensors[name].shape != own[name].shape
    ]
    # The other way round is no loss: some training code stores counters as floats.
    mistyped = [
        f"{name} {tensors[name].dtype} for {own[name].dtype}"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].is_floating_point()
        and (not tensors[name].is_floating_point() or tensors[name].dtype in _PACKED)
    ]
    refuse_misfits(
        path,
        spec,
        missing=missing,
        unexpected=tensors.keys() - own.keys(),
        misshapen=misshapen,
        mistyped=mistyped,
    )
    if any(tensor.is_meta for tensor in own.values()):
        module.to_empty(device=torch.get_default_device())
        for buffer in module.buffers():
            buffer.zero_()  # the counters, which may be missing
    module.load_state_dict(tensors, strict=False)


def refuse_misfits(
    path: Path,
    spec: str,
    *,
    missing: Iterable[str],
    unexpected: Iterable[str],
    misshapen: Iterable[str],
    mistyped: Iterable[str] = (),
) -> None:
    """Raise ModelError that lists the entries of a file which do not fit a model, if any."""
    problems = {
        **{"missing": missing, "unexpected": unexpected},
        **{"of another shape": misshapen, "of another type": mistyped},
    }
    told = [
        f"{len(names)} {what} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for what, names in ((what, sorted(names)) for what, names in problems.items())
        if names
    ]
    if told:
        raise ModelError(f"{path} does not fit {spec!r}: {'; '.join(told)}")


def named_as(own: Iterable[str], weights: Weights) -> Weights:
    """`weights` without the components in front that all their names share, as far as needed for
    one of them to be a name in `own`; unchanged if that does not help.

    Training code often saves a module that holds the network: `model.conv1.weight`.
    """
    own, short = set(own), weights
    while not own & short.tensors.keys():
        longer, short = short, shortened(short)
        if short is longer:
            return weights
    return short


def shortened(weights: Weights) -> Weights:
    """`weights` without the first component of their names, if all share it."""
    path, tensors = weights
    if len({name.partition(".")[0] for name in tensors}) != 1:
        return weights
    return Weights(path, {name.partition(".")[2]: tensor for name, tensor in tensors.items()})


def classes_in(own: Mapping[str, Tensor], weights: Weights) -> int | None:
    """The number of classes of `weights`, if it differs from that of a network's state dict `own`.

    Then the entries whose shapes differ are those of the classifier: all have the same new first
    dimension, and the others are unchanged. None for any other difference, or none.
    """
    tensors = weights.tensors
    shapes = [
        (own[name].shape, tensors[name].shape)
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    counts = {new[0] if new and new[1:] == old[1:] else None for old, new in shapes}
    return counts.pop() if len(counts) == 1 else None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file, mapped into memory. Raises ModelError."""
    try:
        return safetensors.torch.load_file(path)
    except DAMAGE as error:
        raise not_safetensors(path, error) from error


def not_safetensors(path: Path, error: Exception) -> ModelError:
    """The error for a file that safetensors refuses."""
    return ModelError(
        f"{path} cannot be read as safetensors ({first_line(error)}){_likely_cause(path)}"
    )


def _torch_load(path: Path) -> Any:
    try:
        # Mapped, so that what a file declares takes no memory. The format before torch 1.6 cannot
        # be mapped, nor can a path that is not UTF-8.
        is_zip = _start(path).startswith(_ZIP_START)
        mapped = is_zip and os.fsencode(path) == str(path).encode(errors="replace")
        if is_zip:
            _refuse_compressed(path)
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({first_line(error)})") from error
    except ModelError:
        raise
    except (zipfile.BadZipFile, *DAMAGE) as error:
        # Without torch's own message: for most foreign files it advises weights_only=False, which
        # lets the file run any code.
        raise ModelError(
            f"{path} cannot be read by torch.load with weights_only=True"
            f"{_likely_cause(path) or _foreign_objects(path)}"
        ) from error


def _refuse_compressed(path: Path) -> None:
    """Raise ModelError for an archive with entries that torch.save did not write: mapped, they
    would be read as they are stored."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ModelError(f"{path} is a compressed archive; store it as torch.save wrote it")


def _foreign_objects(path: Path) -> str:
    """The end of a message: the objects in a file of torch.save that are not read, if any."""
    with torch.serialization.safe_globals(_HARMLESS), contextlib.suppress(*DAMAGE):
        if found := torch.serialization.get_unsafe_globals_in_checkpoint(path):
            return (
                f": it holds objects of {', '.join(sorted(found)[:4])}, whose code could do "
                "anything; save model.state_dict() alone"
            )
    return "; it is damaged, or no state dict: save model.state_dict()"


def _start(path: Path) -> bytes:
    with open_regular(path, follow=True) as file:
        return file.read(64)


def _likely_cause(path: Path) -> str:
    """The end of a message: a guess at the real format of an unreadable file, or ""."""
    try:
        start = _start(path)
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
    while isinstance(content, dict):
        inner = (content[key] for key in _WRAPPERS if isinstance(content.get(key), dict))
        if (wrapped := next(inner, None)) is None:
            break
        content = wrapped
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        found = (
            f", but {', '.join(map(str, list(content)[:5]))}" if isinstance(content, dict) else ""
        )
        raise ModelError(f"{path} does not hold a state dict (names to tensors){found}")
    size = path.stat().st_size
    for name, tensor in content.items():
        strided = tensor.layout == torch.strided and not tensor.is_nested
        if not strided or tensor.is_complex() or tensor.is_quantized:
            raise ModelError(
                f"{path}: {name} must be a dense tensor of real numbers, "
                f"got {tensor.dtype} in layout {tensor.layout}"
            )
        if tensor.is_meta:
            raise ModelError(f"{path}: {name} has a shape but no values (device meta)")
        if tensor.numel() * tensor.element_size() > size:
            raise ModelError(
                f"{path}: {name} {list(tensor.shape)} is larger than its file, a repetition of "
                "fewer values; store tensor.contiguous()"
            )
    if any(name.startswith("module.") for name in content):
        content.pop("n_averaged", None)  # of torch's AveragedModel
    while content and all(name.startswith(_PREFIXES) for name in content):
        content = {name.partition(".")[2]: tensor for name, tensor in content.items()}
    return content
