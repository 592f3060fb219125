"""Checks the settings of a new bank, which every resume must repeat."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

from ckd._json import JsonError, parse_object
from ckd._version import __version__
from ckd.bank.manifest import INTEGER_LIMIT, BankError, Manifest, brief, encode

_PACKAGES = ("torch", "numpy", "safetensors")


def new_manifest(
    *,
    dim: int,
    rows_per_shard: int,
    normalize: bool,
    teacher: str | Mapping[str, Any] | None,
    preprocessing: Mapping[str, Any] | None,
    dataset: str | None,
    fingerprint: str | None,
    class_names: Iterable[str] | None,
) -> Manifest:
    """The manifest of a bank without rows. BankError names the argument that is not valid."""
    manifest = Manifest(
        dim=positive("dim", dim),
        rows_per_shard=positive("rows_per_shard", rows_per_shard),
        normalized=bool(normalize),
        teacher=_mapping("teacher", {"name": teacher} if isinstance(teacher, str) else teacher),
        preprocessing=_mapping("preprocessing", preprocessing),
        dataset=_text("dataset", dataset),
        fingerprint=_text("fingerprint", fingerprint),
        class_names=_names(class_names),
        versions={"ckd": __version__} | {name: metadata.version(name) for name in _PACKAGES},
    )
    try:
        parse_object(encode(manifest))
    except JsonError as error:
        raise BankError(
            f"teacher, preprocessing, dataset, fingerprint or class_names cannot be stored: {error}"
        ) from error
    return manifest


def positive(name: str, value: Any) -> int:
    """`value`, a Python or numpy integer, as an int. BankError unless it is 1 or more."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if not 1 <= number < INTEGER_LIMIT:
        raise BankError(f"{name} must be an integer of at least 1, got {brief(value)}")
    return number


def _mapping(name: str, value: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The mapping after a JSON round trip, so that it compares equal to the manifest's."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise BankError(f"{name} must be a mapping, got {type(value).__name__}")
    try:
        return json.loads(json.dumps(dict(value), allow_nan=False, sort_keys=True))
    except (TypeError, ValueError, RecursionError) as error:
        raise BankError(f"{name} must hold plain JSON values: {error}") from error


def _text(name: str, value: str | None) -> str | None:
    if value is not None and not isinstance(value, str):
        raise BankError(f"{name} must be a string or None, got {type(value).__name__}")
    return value


def _names(value: Iterable[str] | None) -> list[str] | None:
    """The class names as a list; None for an empty one."""
    if value is None:
        return None
    # An iterator can be consumed only once.
    names = list(value) if isinstance(value, Iterable) else [value]
    if isinstance(value, str) or not all(isinstance(name, str) for name in names):
        raise BankError(f"class_names must be a sequence of strings, got {brief(value)}")
    return names or None
