"""The manifest of a bank: the settings it was made with, and its shards with their hashes.

`manifest.json` is canonical JSON with its own checksum (`ckd._json.sealed`), so a change of any
byte is detected before a value is used. A shard exists if and only if the manifest lists it.
"""

from __future__ import annotations

import shlex
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import xxhash

from ckd._errors import CkdError
from ckd._files import read_regular
from ckd._json import JsonError, parse_object, sealed, unsealed

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 2
# Banks of earlier versions are read: the fields that each version added.
_ADDED: dict[int, tuple[str, ...]] = {1: (), 2: ("statistics", "class_head")}
INTEGER_LIMIT = 1 << 62  # of sizes: torch's integers have 64 bits
_LIMIT_BYTES = 64 << 20  # some 200,000 shards
DTYPE = "float16"

#: The settings of a build; a resumed build must have the same.
SETTINGS = (
    "dim",
    "rows_per_shard",
    "normalized",
    "teacher",
    "preprocessing",
    "dataset",
    "fingerprint",
    "class_names",
)


class BankError(CkdError, ValueError):
    """A damaged, incomplete or unsuitable bank; the message names file and rows, or argument."""


class RowError(BankError):
    """An invalid row of a batch: the `row`-th entry of `argument`."""

    def __init__(self, argument: str, row: int, message: str) -> None:
        """message: the fault, with the placeholder `{where}` for the row."""
        super().__init__(message.replace("{where}", f"row {row} of the batch"))
        self.argument, self.row, self._message = argument, row, message

    def found_at(self, where: str) -> BankError:
        """The same error with the row named by `where`, for users who do not see the batches."""
        return BankError(self._message.replace("{where}", where))


@dataclass(frozen=True)
class ShardRecord:
    """The manifest's entry for one shard file: rows, size, hashes."""

    file: str
    first_row: int
    rows: int
    bytes: int
    xxh3: str
    sha256: str

    @property
    def span(self) -> str:
        """The rows in words, for messages: `rows 8192 to 16383`."""
        return f"rows {self.first_row} to {self.first_row + self.rows - 1}"


@dataclass(frozen=True)
class HeadRecord:
    """The manifest's entry for the teacher's class head: what it classifies, size, hashes."""

    classes: int
    class_names: list[str]
    order: list[int] | None
    bytes: int
    xxh3: str
    sha256: str

    file = "class_head.safetensors"
    span = "the teacher's class head"


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` without the derived `dtype`, `rows` and `checksum`.

    `statistics` (as `ckd.bank.statistics` encodes them) and `class_head` come with completion.
    """

    dim: int
    rows_per_shard: int
    normalized: bool = False
    teacher: dict[str, Any] | None = None
    preprocessing: dict[str, Any] | None = None
    dataset: str | None = None
    fingerprint: str | None = None
    class_names: list[str] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    shards: tuple[ShardRecord, ...] = ()
    complete: bool = False
    statistics: dict[str, str] | None = None
    class_head: HeadRecord | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def rows(self) -> int:
        """Rows in the listed shards."""
        return sum(shard.rows for shard in self.shards)

    def as_dict(self) -> dict[str, Any]:
        """The manifest as plain JSON values, without its checksum."""
        names = _fields_of(self.schema_version)
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        values["shards"] = [vars(shard).copy() for shard in self.shards]
        if self.class_head is not None:
            values["class_head"] = vars(self.class_head).copy()
        return values | {"dtype": DTYPE, "rows": self.rows}


def _fields_of(version: int) -> list[str]:
    """The fields of Manifest that a manifest of this version has."""
    later = {name for v, names in _ADDED.items() if v > version for name in names}
    return [f.name for f in fields(Manifest) if f.name not in later]


def shard_name(index: int) -> str:
    """The file name of the shard with this number."""
    return f"shard-{index:05d}.safetensors"


def encode(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`: the same manifest always gives the same bytes."""
    return sealed(manifest.as_dict())


def checksum(manifest: Manifest) -> str:
    """The manifest's own hash, which covers those of the shards: it identifies a bank's content."""
    return xxhash.xxh3_64_hexdigest(encode(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest: version, checksum, types, ranges, and that rows add up.

    Raises BankError that names the file and the fault.
    """
    path = folder / MANIFEST_NAME
    try:
        data = read_regular(path, _LIMIT_BYTES)
    except FileNotFoundError:
        raise BankError(
            f"{folder} is not a bank: it has no {MANIFEST_NAME}; "
            f"make one with: python -m ckd.bank build --out {shlex.quote(str(folder))}"
        ) from None
    except OSError as error:
        raise BankError(f"{path} cannot be read: {error.strerror}") from error
    return decode(data, path)


def decode(data: bytes, path: Path) -> Manifest:
    """Parse and check the content of the file `path`. Raises BankError as `read_manifest` does."""
    try:
        values = parse_object(data)
    except JsonError as error:
        raise BankError(f"{path} is damaged (affects all rows): {error}") from error
    # Version first: another version may define the checksum differently.
    version = values.get("schema_version")
    if type(version) is not int or version not in _ADDED:
        raise BankError(
            f"{path} has schema version {version!r:.40}, this ckd reads version "
            f"{' and '.join(map(str, _ADDED))}; "
            "read it with the ckd that wrote it, or build the bank again"
        )
    try:
        return _validated(unsealed(values, data), path)
    except JsonError as error:
        raise BankError(
            f"{path} is damaged (affects all rows): {error}; restore it from a copy, or delete the "
            "folder and build the bank again"
        ) from error


def settings_that_differ(old: Manifest, new: Manifest) -> list[str]:
    """`field: old value, now new value` for each setting in which two manifests differ."""
    differ = []
    for name in SETTINGS:
        values = getattr(old, name), getattr(new, name)
        if name == "class_names" and all(values) and len(values[0]) == len(values[1]):
            label = first_other_name(*values)
            if label is not None:
                first, second = (quoted(names[label]) for names in values)
                differ.append(f"class_names: class {label} is {first}, now {second}")
        elif values[0] != values[1]:
            differ.append(f"{name}: {brief(values[0])}, now {brief(values[1])}")
    return differ


def first_other_name(old: Sequence[str], new: Sequence[str]) -> int | None:
    """The first label whose class has another name in `new`; None if all are the same.

    Names are compared as composed characters (NFC): some file systems decompose them.
    """
    for label, names in enumerate(zip(old, new)):
        if len({unicodedata.normalize("NFC", name) for name in names}) > 1:
            return label
    return None


def quoted(name: str) -> str:
    """`repr(name)`, with its characters' codes if it may look like another name."""
    return repr(name) if name.isascii() else f"{name!r} ({name!a})"


def brief(value: Any, limit: int = 120) -> str:
    """`repr(value)` for a message, shortened in the middle if it is longer than `limit`."""
    text = repr(value)
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"


def _validated(values: dict[str, Any], path: Path) -> Manifest:
    """The Manifest of JSON values, after a check of every type and range."""
    known = _fields_of(values["schema_version"])
    expected = {*known, "dtype", "rows"}
    if values.keys() != expected:
        odd = sorted(expected ^ values.keys())
        raise BankError(f"{path} is damaged: missing or unexpected fields {odd}")
    dim = _integer(values, "dim", path, least=1)
    rows_per_shard = _integer(values, "rows_per_shard", path, least=1)
    rows = _integer(values, "rows", path, least=0)
    _check(values["dtype"] == DTYPE, path, "dtype", repr(DTYPE), values["dtype"])
    for name in ("normalized", "complete"):
        _check(isinstance(values[name], bool), path, name, "true or false", values[name])
    for name, kind in (
        ("teacher", dict),
        ("preprocessing", dict),
        ("dataset", str),
        ("fingerprint", str),
        ("class_names", list),
    ):
        good = values[name] is None or isinstance(values[name], kind)
        _check(good, path, name, f"a {kind.__name__} or null", values[name])
    names = values["class_names"] or []
    _check(all(isinstance(n, str) for n in names), path, "class_names", "strings", names)
    _check(isinstance(values["versions"], dict), path, "versions", "a dict", values["versions"])
    _check(isinstance(values["shards"], list), path, "shards", "a list", values["shards"])

    shards: list[ShardRecord] = []
    for index, entry in enumerate(values["shards"]):
        shards.append(_shard(index, entry, rows_per_shard, path))
    for shard in shards if not values["complete"] else shards[:-1]:
        where = f"shards[{shard.file}].rows"
        _check(shard.rows == rows_per_shard, path, where, f"{rows_per_shard}", shard.rows)
    _check(rows == sum(s.rows for s in shards), path, "rows", "the sum over the shards", rows)
    _check(rows > 0 or not values["complete"], path, "rows", "at least 1 in a whole bank", rows)

    added: dict[str, Any] = {}
    given = values.get("statistics")  # whose numbers the reader decodes
    good = given is None or (isinstance(given, dict) and given.keys() == {"mean", "variance"})
    _check(good, path, "statistics", "mean and variance, or null", given)
    if values.get("class_head") is not None:
        added["class_head"] = _head(values["class_head"], path)
    plain = {name: values[name] for name in known}
    return Manifest(**(plain | {"dim": dim, "shards": tuple(shards)} | added))


def _shard(index: int, entry: Any, rows_per_shard: int, path: Path) -> ShardRecord:
    """The checked entry `index` of `shards`; its rows must continue those of the entry before."""
    where = f"shards[{index}]"
    names = {f.name for f in fields(ShardRecord)}
    good = isinstance(entry, dict) and entry.keys() == names
    _check(good, path, where, f"an object with {sorted(names)}", entry)
    # Only generated names are accepted, so a manifest cannot name a file outside its folder.
    _check(entry["file"] == shard_name(index), path, where, shard_name(index), entry["file"])
    start = _integer(entry, "first_row", path, least=0, where=where)
    first_row = index * rows_per_shard  # every shard but the last is full
    _check(start == first_row, path, f"{where}.first_row", f"{first_row}", start)
    rows = _integer(entry, "rows", path, least=1, where=where)
    _check(rows <= rows_per_shard, path, f"{where}.rows", f"at most {rows_per_shard}", rows)
    _check_hashes(entry, path, where)
    return ShardRecord(**entry)


def _head(entry: Any, path: Path) -> HeadRecord:
    where = "class_head"
    names = {f.name for f in fields(HeadRecord)}
    good = isinstance(entry, dict) and entry.keys() == names
    _check(good, path, where, f"an object with {sorted(names)}", entry)
    classes = _integer(entry, "classes", path, least=1, where=where)
    given, order = entry["class_names"], entry["order"]
    good = isinstance(given, list) and all(isinstance(name, str) for name in given)
    good = good and len(given) in (0, classes)
    _check(good, path, f"{where}.class_names", f"{classes} names or none", given)
    good = order is None or (isinstance(order, list) and all(type(i) is int for i in order))
    good = good and (order is None or (len(order) == classes and {*order} == {*range(classes)}))
    _check(good, path, f"{where}.order", f"the numbers of {classes} logits, or null", order)
    _check_hashes(entry, path, where)
    return HeadRecord(**entry)


def _check_hashes(entry: dict[str, Any], path: Path, where: str) -> None:
    _integer(entry, "bytes", path, least=1, where=where)
    for name, digits in (("xxh3", 16), ("sha256", 64)):
        value = entry[name]
        good = isinstance(value, str) and len(value) == digits and set(value) <= _HEX_DIGITS
        _check(good, path, f"{where}.{name}", f"{digits} lower-case hex digits", value)


_HEX_DIGITS = set(string.hexdigits.lower())


def _integer(values: dict[str, Any], name: str, path: Path, least: int, where: str = "") -> int:
    value = values[name]
    good = type(value) is int and least <= value < INTEGER_LIMIT  # True is an int too
    label = f"{where}.{name}" if where else name
    _check(good, path, label, f"an integer of at least {least}", value)
    return value


def _check(good: bool, path: Path, name: str, expected: str, came: Any) -> None:
    if not good:
        raise BankError(f"{path} is damaged: {name} must be {expected}, got {brief(came)}")
