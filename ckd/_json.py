"""JSON objects on disk (limits on what is parsed, a checksum, a check of the fields' types) and as
the output of commands."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import xxhash

from ckd._errors import CkdError
from ckd._files import LFS_POINTER, is_lfs_pointer, read_regular

_T = TypeVar("_T")

LIMIT_BYTES = 1 << 20  # Python's values take some thirty times as much, at most
MAX_DEPTH = 64  # of nested arrays and objects
CHECKSUM = "checksum"


class JsonError(CkdError, ValueError):
    """The content of a file is not the JSON that was written; the message says in what."""


def read_object(path: Path, limit: int = LIMIT_BYTES) -> tuple[dict[str, Any], bytes]:
    """The JSON object in a regular file of at most `limit` bytes, and the bytes themselves.

    Raises JsonError, and OSError as `read_regular` does.
    """
    data = read_regular(path, limit)
    return parse_object(data), data


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises JsonError: other values, deep nesting, text that is none."""
    if is_lfs_pointer(data):
        raise JsonError(LFS_POINTER)
    try:
        values = json.loads(data)
    # ValueError: also bad UTF-8 and huge integers; RecursionError: nested by the thousand.
    except (ValueError, RecursionError, MemoryError) as error:
        raise JsonError(f"not valid JSON: {error or type(error).__name__}") from error
    if not isinstance(values, dict):
        raise JsonError(f"expected a JSON object, got {type(values).__name__}")
    _check(values)
    return values


def _check(value: Any, depth: int = 1) -> None:
    """Raise JsonError for a value that is nested too deeply, or holds text that no path can."""
    if isinstance(value, str):
        if not _is_text(value):
            raise JsonError("not valid JSON: a string holds a NUL or half of a surrogate pair")
    elif isinstance(value, dict | list):
        if depth > MAX_DEPTH:
            raise JsonError(f"not valid JSON: nested more than {MAX_DEPTH} levels deep")
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            _check(item, depth + 1)


def _is_text(value: str) -> bool:
    """Whether a path may hold this: no NUL, and surrogates only for bytes that are not UTF-8."""
    if value.isascii():
        return "\0" not in value
    try:
        return b"\0" not in value.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return False


def sealed(values: Mapping[str, Any]) -> bytes:
    """Canonical JSON (sorted keys) of `values` and their CHECKSUM, the xxh3 of it without that.

    Equal values give equal bytes, so that a change of any byte is detected.
    """
    options: dict[str, Any] = {"indent": 2, "sort_keys": True}
    digest = xxhash.xxh3_64_hexdigest(json.dumps(values, **options).encode())
    return json.dumps({**values, CHECKSUM: digest}, **options).encode() + b"\n"


def unsealed(values: dict[str, Any], data: bytes) -> dict[str, Any]:
    """`values`, parsed from `data`, without their checksum. Raises JsonError if it is wrong."""
    rest = {name: value for name, value in values.items() if name != CHECKSUM}
    if CHECKSUM not in values:
        raise JsonError("it has no checksum: another version of ckd wrote it, or it is damaged")
    if sealed(rest) != data:
        given = f"{values[CHECKSUM]!r:.40}"
        raise JsonError(f"its content does not match its own checksum {given}")
    return rest


def document(values: Any) -> str:
    """The values as one JSON document for other programs, in ASCII: NaN and infinity, which JSON
    does not have, are null, and bytes of a path that are not UTF-8 are escaped as Python does."""
    return json.dumps(_without_nan(values), indent=2, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    return [*map(_without_nan, value)] if isinstance(value, list | tuple) else value


def is_number(value: Any) -> bool:
    """Whether this is a number, other than NaN and infinity, that a float can hold."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def as_dataclass(kind: type[_T], values: Mapping[str, Any]) -> _T:
    """The dataclass `kind` with these fields. Raises JsonError for fields that are missing,
    unknown or of another type, except that any string passes for a Literal."""
    hints = get_type_hints(kind)
    if misfits := sorted(values.keys() ^ hints.keys()):
        raise JsonError(f"missing or unknown fields: {', '.join(misfits)}")
    for name, value in values.items():
        literal = any(get_origin(hint) is Literal for hint in (hints[name], *get_args(hints[name])))
        if not (literal and isinstance(value, str)):
            try:
                check_types(value, hints[name])
            except JsonError as error:
                raise JsonError(f"{name}: {error}") from error
    return kind(**values)


def check_types(values: Any, shape: Any) -> Any:
    """`values`, if they are of the type `shape`, a TypedDict say. Raises JsonError that names the
    first field that is not."""
    import typeguard  # here, since most programs that import ckd check no types

    everything = typeguard.CollectionCheckStrategy.ALL_ITEMS
    try:
        return typeguard.check_type(values, shape, collection_check_strategy=everything)
    except typeguard.TypeCheckError as error:
        raise JsonError(str(error)) from error
