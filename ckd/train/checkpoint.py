"""Checkpoints: folders of tensors and state, made by an atomic rename: complete or absent.

    RUN/checkpoint/step-00001234/tensors.safetensors    every tensor of the run, by name
                                 state.json             all other state, and the checksums

A checkpoint is written under a temporary name, fsynced and renamed; only then is the older one
removed, under a temporary name too. A kill or a full disk at any moment leaves the older or the
newer one intact, and no half of one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import safetensors
import safetensors.torch
import torch
import xxhash
from torch import Tensor, nn

from ckd._files import (
    TEMPORARY_PREFIX,
    atomic_folder,
    durable_write,
    fsync_folder,
    open_regular,
)
from ckd._json import JsonError, check_types, read_object, sealed, unsealed
from ckd.train.errors import CheckpointError

FORMAT = 2
FOLDER, TENSORS, STATE = "checkpoint", "tensors.safetensors", "state.json"


class Checkpoint(NamedTuple):
    """A checkpoint as `load` reads it: tensors by name, on the CPU, and the other state."""

    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Content(TypedDict):
    """state.json, beside its checksum."""

    format: int
    step: int
    tensors_bytes: int
    tensors_xxh3: str
    state: dict[str, Any]


def save(run: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write RUN/checkpoint/step-<step> durably, then remove older checkpoints; returns the path.

    Equal arguments give equal bytes. Raises CheckpointError when the system refuses (disk full,
    permission denied); the older checkpoint is then still there.
    """
    folder = run / FOLDER
    path = folder / _name(step)
    # Clones: safetensors refuses tensors that share memory, such as tied weights.
    blob = safetensors.torch.save({k: _plain(v) for k, v in tensors.items()})
    content: Content = {
        "format": FORMAT,
        "step": step,
        "tensors_bytes": len(blob),
        "tensors_xxh3": xxhash.xxh3_64_hexdigest(blob),
        "state": dict(state),
    }
    older = _existing(run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path not in older:  # else saved again after a resume, with the same content
            with atomic_folder(path) as temporary:
                durable_write(temporary / TENSORS, blob)
                durable_write(temporary / STATE, sealed(content))
    except OSError as error:
        kept = f"the checkpoint {older[-1]} is intact" if older else "there is no older one"
        raise CheckpointError(f"cannot save the checkpoint {path}: {error}; {kept}") from error
    sweep(run)
    return path


def sweep(run: Path) -> None:
    """Remove all checkpoints but the newest, and what a kill left under temporary names, in the
    run's folder and in that of the checkpoints. Where the system refuses, it stays: no one reads
    it."""
    for old in _existing(run)[:-1]:
        _remove(old)
    for place in (run, run / FOLDER):
        for leftover in place.glob(TEMPORARY_PREFIX + "*"):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    leftover.unlink()


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run, or None. Raises CheckpointError if the system refuses."""
    existing = _existing(run)
    return existing[-1] if existing else None


def load(path: Path) -> Checkpoint:
    """Read and verify a checkpoint. Raises CheckpointError naming the damaged file."""
    content = _read_content(path)
    try:
        with open_regular(path / TENSORS) as file:
            size, wanted = os.fstat(file.fileno()).st_size, content["tensors_bytes"]
            if size != wanted:
                raise _damaged(path / TENSORS, f"has {size} bytes, {wanted} were written")
            blob = file.read()
    except OSError as error:
        raise _damaged(path / TENSORS, f"cannot be read: {error.strerror}") from error
    if xxhash.xxh3_64_hexdigest(blob) != content["tensors_xxh3"]:
        raise _damaged(path / TENSORS, "does not match its checksum")
    try:
        tensors = safetensors.torch.load(blob)
    except safetensors.SafetensorError as error:
        raise _damaged(path / TENSORS, f"is not a safetensors file ({error})") from error
    return Checkpoint(path, tensors, content["state"])


def load_state(path: Path) -> dict[str, Any]:
    """The verified state alone, without the tensors. Raises CheckpointError as `load` does."""
    return _read_content(path)["state"]


def pack(modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that training changes, by name: `student.…`, `optimizer.student.….exp_avg`."""
    tensors = {
        f"{prefix}.{name}": tensor
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    for name, parameter in _optimized(modules, optimizer):
        for key, tensor in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = tensor
    return tensors


def unpack(
    checkpoint: Checkpoint, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> None:
    """The inverse of `pack`: copy a checkpoint's tensors into the modules and the optimizer.

    Raises CheckpointError if a name or a shape does not fit.
    """
    try:
        _unpack(checkpoint, modules, optimizer)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{checkpoint.path} does not fit the optimizer: {error}") from error


def _unpack(
    checkpoint: Checkpoint, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> None:
    for prefix, module in modules.items():
        start = prefix + "."
        own = {k[len(start) :]: v for k, v in checkpoint.tensors.items() if k.startswith(start)}
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            raise CheckpointError(
                f"{checkpoint.path} does not fit the {prefix}: {error}"
            ) from error
    state = optimizer.state_dict()
    numbers = _numbers(optimizer, state)
    for name, parameter in _optimized(modules, optimizer):
        start = f"optimizer.{name}."
        own = {
            key[len(start) :]: tensor
            for key, tensor in checkpoint.tensors.items()
            if key.startswith(start)
        }
        if not own:  # none before the parameter's first gradient
            continue
        shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        if {key: tensor.shape for key, tensor in own.items()} != shapes:
            raise ValueError(f"{start}* must be {', '.join(shapes)}, got {', '.join(own)}")
        # In the parameter's memory format: fused optimizers read both in memory order.
        state["state"][numbers[parameter]] = {
            key: torch.empty_like(parameter).copy_(tensor) if tensor.ndim else tensor
            for key, tensor in own.items()
        }
    optimizer.load_state_dict(state)


def _optimized(
    modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> list[tuple[str, nn.Parameter]]:
    """The optimizer's parameters with their names."""
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [
        (f"{prefix}.{name}", parameter)
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
        if id(parameter) in mine
    ]


def _numbers(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[nn.Parameter, int]:
    """The index of each parameter in the optimizer's state dict."""
    return {
        parameter: number
        for group, packed in zip(optimizer.param_groups, state["param_groups"])
        for parameter, number in zip(group["params"], packed["params"])
    }


def _existing(run: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    try:
        with os.scandir(run / FOLDER) as entries:
            found = [entry for entry in entries if re.fullmatch("step-[0-9]{8,18}", entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:  # a run whose checkpoints cannot be seen must not begin anew
        raise CheckpointError(f"{run / FOLDER} cannot be listed: {error.strerror}") from error
    for entry in found:
        if entry.is_symlink():
            raise CheckpointError(
                f"{entry.path} is a symbolic link; put the folder itself in its place"
            )
    names = [entry.name for entry in found if entry.is_dir()]
    return [run / FOLDER / name for name in sorted(names, key=lambda name: int(name[5:]))]


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _remove(path: Path) -> None:
    """Remove a checkpoint, under a temporary name first: a kill leaves no half that `latest` finds.

    One that cannot be removed does no harm, since `latest` takes the newest.
    """
    temporary = path.with_name(TEMPORARY_PREFIX + path.name)
    with contextlib.suppress(OSError):
        shutil.rmtree(temporary, ignore_errors=True)
        os.rename(path, temporary)
        fsync_folder(path.parent)
        shutil.rmtree(temporary)


def _read_content(path: Path) -> Content:
    try:
        values, data = read_object(path / STATE)
        if (found := values.get("format")) != FORMAT:
            raise CheckpointError(
                f"{path / STATE} has format {found!r:.40}, this version of ckd reads {FORMAT}; "
                "resume with the version that wrote it"
            )
        content: Content = check_types(unsealed(values, data), Content)
        if path.name != _name(content["step"]):
            raise JsonError(f"it is of step {content['step']}")
        return content
    except JsonError as error:
        raise _damaged(path / STATE, f"is not what was written: {error}") from error
    except OSError as error:
        raise _damaged(path / STATE, f"cannot be read: {error.strerror}") from error


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {what}; the checkpoint is damaged: delete its folder and resume from an older "
        "one, if there is one, or from the start"
    )
