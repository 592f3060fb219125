"""JSON objects on disk: limits on what is parsed, a checksum, and a check of the fields' types."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import xxhash

from ckd._errors import CkdError
from ckd._files import LFS_POINTER, is_lfs_pointer, read_regular

_T = TypeVar("_T")

LIMIT_BYTES = 4 << 20
MAX_DEPTH = 64  # of nested arrays and objects; the parser recurses
CHECKSUM = "checksum"
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


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
    brackets = np.frombuffer(_STRING.sub(b"", data), dtype=np.uint8)
    opened = np.isin(brackets, (*b"[{",)).astype(np.int32) - np.isin(brackets, (*b"]}",))
    if len(opened) and np.cumsum(opened).max() > MAX_DEPTH:
        raise JsonError(f"not valid JSON: nested more than {MAX_DEPTH} levels deep")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError: also bad UTF-8 and huge integers
        raise JsonError(f"not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise JsonError(f"expected a JSON object, got {type(values).__name__}")
    if b"\\u" in data and not all(map(_is_text, _strings(values))):
        raise JsonError("not valid JSON: a string holds a NUL or half of a surrogate pair")
    return values


def _strings(value: Any) -> Iterator[str]:
    """The strings in a JSON value, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in (*value, *value.values()):
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _is_text(value: str) -> bool:
    """Whether a path may hold this: no NUL, and surrogates only for bytes that are not UTF-8."""
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
    if CHECKSUM not in values or sealed(rest) != data:
        raise JsonError(f"its content does not match its own checksum {values.get(CHECKSUM)!r}")
    return rest


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
