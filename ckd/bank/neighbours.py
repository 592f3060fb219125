"""The nearest rows of each row of a bank, with softmax weights: a folder beside the bank's shards.

`neighbours/manifest.json` is sealed (`ckd._json`), names the bank by the hash of its manifest, and
lists the parts: safetensors files of a fixed number of rows. A part exists if and only if it is
listed.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from ckd._json import JsonError, as_dataclass, check_types, is_number, read_object, sealed, unsealed
from ckd.bank.manifest import MANIFEST_NAME, BankError, ShardRecord, brief
from ckd.bank.settings import positive
from ckd.bank.shards import Layout, checking, map_tensors

FOLDER = "neighbours"
SCHEMA_VERSION = 1
ROWS_PER_PART = 2048
_LIMIT_BYTES = 64 << 20  # of a manifest
_MIN_TEMPERATURE = 1e-6  # below, the rounding of a float32 cosine changes its weight by a tenth


@dataclass(frozen=True)
class Part(ShardRecord):
    """The manifest's entry for one part, with what the k rows leave of the softmax's mass."""

    left_out_mean: float
    left_out_max: float


@dataclass(frozen=True)
class Manifest:
    """`neighbours/manifest.json` without its version and checksum."""

    bank: str  # the hash of its manifest
    rows: int
    dim: int
    k: int
    temperature: float
    exact: bool
    rows_per_part: int
    parts: tuple[Part, ...] = ()

    @property
    def rows_done(self) -> int:
        """Rows in the listed parts."""
        return sum(part.rows for part in self.parts)

    @property
    def is_complete(self) -> bool:
        return self.rows_done == self.rows

    @property
    def settings(self) -> str:
        """What the neighbours are made with; a resume must have the same."""
        means = ", with mean rows" if self.exact else ""
        return f"k = {self.k}, temperature {self.temperature}{means}"

    def command(self, folder: Path, *flags: str) -> str:
        """The command that makes these neighbours."""
        given = [f"--k {self.k}", f"--temperature {self.temperature}"]
        return _command(folder, *given, *["--exact"] * self.exact, *flags)

    def encode(self) -> bytes:
        """The bytes of the file."""
        return sealed({"schema_version": SCHEMA_VERSION, **asdict(self)})

    def checksum(self) -> str:
        """The hash of the file, which covers those of the parts."""
        return xxhash.xxh3_64_hexdigest(self.encode())

    def place(self, index: int) -> dict[str, Any]:
        """File and rows of part number `index`: fields of its record."""
        first = index * self.rows_per_part
        rows = min(self.rows_per_part, self.rows - first)
        return {"file": f"part-{index:05d}.safetensors", "first_row": first, "rows": rows}


def new_manifest(
    bank: str, rows: int, dim: int, k: Any, temperature: Any, *, exact: bool, rows_per_part: int
) -> Manifest:
    """A manifest without parts. Raises BankError that names the argument that is not valid."""
    temperature = float(temperature) if is_number(temperature) else temperature
    manifest = Manifest(
        bank,
        rows,
        dim,
        positive("k", k),
        temperature,
        bool(exact),
        positive("rows_per_part", rows_per_part),
    )
    if fault := _fault(manifest):
        raise BankError(fault)
    return manifest


def exist(bank: Path) -> bool:
    """Whether the bank in this folder has neighbours, complete or not."""
    return os.path.lexists(bank / FOLDER / MANIFEST_NAME)


def check_folder(folder: Path) -> None:
    """Raise BankError if the folder of neighbours lies elsewhere than in the bank's."""
    if folder.is_symlink():
        raise BankError(f"{folder} is a symbolic link; put the folder itself in its place")


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest in the folder of neighbours. Raises BankError."""
    path, again = folder / MANIFEST_NAME, f"make them again with: {_command(folder, '--replace')}"
    try:
        check_folder(folder)
        values, data = read_object(path, _LIMIT_BYTES)
        version = values.get("schema_version")
        # First: another version may define the checksum differently.
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise BankError(
                f"{path} has schema version {version!r:.40}, this ckd reads version "
                f"{SCHEMA_VERSION}; {again}"
            )
        values = unsealed(values, data)
        del values["schema_version"]
        manifest = as_dataclass(Manifest, {**values, "parts": _parts(values.get("parts"))})
        if fault := _fault(manifest):
            raise JsonError(fault)
    except FileNotFoundError:
        raise BankError(
            f"{folder.parent} has no neighbours; make them with: {_command(folder)}"
        ) from None
    except JsonError as error:
        raise BankError(f"{path} is damaged (affects all rows): {error}; {again}") from error
    except OSError as error:
        raise BankError(f"{path} cannot be read: {error.strerror}") from error
    return manifest


class Neighbours:
    """The k nearest rows of each of the N rows of a bank, from `EmbeddingBank.neighbours`.

    With u the bank's rows scaled to length 1 and q_ij the softmax over all j of u_i.u_j /
    temperature, which includes j = i and every other row that equals row i:

    rows: int32 [N, k], the k rows with the largest u_i.u_j, descending; among equal ones the
        smaller row first.
    weights: float16 [N, k], their q_ij. Rounding is 2^-11 of a weight, but 2^-25 below 2^-14: a
        weight below 2^-25 is 0, and they sum to 1 - left_out within 2^-11.
    lse: float32 [N], log sum_j exp(u_i.u_j / temperature), so that log q_ij = u_i.u_j / temperature
        - lse_i.
    mean: float16 [N, D], sum_j q_ij u_j; None unless made with `--exact`.
    left_out: float32 [N], 1 - the sum of the weights: the mass of all other rows.
    k, temperature, exact (whether there is a mean); nbytes: their size on disk.
    left_out_mean, left_out_max: over the rows, from weights before rounding.

    A row of zeros has cosine 0 with every row: lse = log N, equal weights, and the first k rows.

    The tensors are memory-mapped if there is one part, else copied on first access. A pickle or
    copy stores the path and hashes alone, and opens the folder again with verify="off".
    """

    def __init__(self, folder: Path, manifest: Manifest, parts: Sequence[Sequence[Tensor]]) -> None:
        self.path = folder
        self.k, self.temperature, self.exact = manifest.k, manifest.temperature, manifest.exact
        self.left_out_mean, self.left_out_max = _left_out(manifest.parts)
        self.nbytes = sum(part.bytes for part in manifest.parts)
        self._manifest = manifest
        self._columns = list(zip(*parts))

    @classmethod
    def open(cls, bank: Path, checksum: str, verify: str) -> Neighbours:
        """Open those of the bank in the folder `bank`, whose manifest has the hash `checksum`.

        verify: as for `EmbeddingBank.open`; "off" checks manifest, file sizes and headers. Raises
        BankError for neighbours that are missing, incomplete, of another bank or damaged.
        """
        folder = bank / FOLDER
        manifest = read_manifest(folder)
        check_bank(folder, manifest, checksum)
        if not manifest.is_complete:
            raise BankError(
                f"{folder} is incomplete: {manifest.rows_done:,} of {manifest.rows:,} rows are "
                f"done; go on with: {manifest.command(folder)}"
            )
        return cls(folder, manifest, map_parts(folder, manifest, verify))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self)._open_again, (str(self.path), self.checksum)

    @classmethod
    def _open_again(cls, folder: str, expected: str) -> Neighbours:
        manifest = read_manifest(Path(folder))
        if manifest.checksum() != expected:
            raise BankError(
                f"{folder} holds other neighbours than when these were pickled or copied: its "
                "manifest has changed; open and pickle the new ones"
            )
        return cls(Path(folder), manifest, map_parts(Path(folder), manifest, "off"))

    def __len__(self) -> int:
        return self._manifest.rows

    def __repr__(self) -> str:
        settings = f"k={self.k}, temperature={self.temperature}"
        return f"Neighbours({str(self.path)!r}, rows={len(self)}, {settings})"

    @property
    def checksum(self) -> str:
        """The hash of the manifest, which covers all files and the bank."""
        return self._manifest.checksum()

    @cached_property
    def rows(self) -> Tensor:
        return self._whole(0)

    @cached_property
    def weights(self) -> Tensor:
        return self._whole(1)

    @cached_property
    def lse(self) -> Tensor:
        return self._whole(2)

    @cached_property
    def mean(self) -> Tensor | None:
        return self._whole(3) if self.exact else None

    @cached_property
    def left_out(self) -> Tensor:
        return (1 - self.weights.sum(1, dtype=torch.float32)).clamp_(min=0)

    def _whole(self, column: int) -> Tensor:
        parts = self._columns[column]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _command(folder: Path, *flags: str) -> str:
    return " ".join([f"python -m ckd.bank neighbours {shlex.quote(str(folder.parent))}", *flags])


def check_bank(folder: Path, manifest: Manifest, checksum: str) -> None:
    if manifest.bank != checksum:
        raise BankError(
            f"{folder} holds the neighbours of another bank than {folder.parent}, whose manifest "
            f"has changed; make them again with: {manifest.command(folder, '--replace')}"
        )


def map_parts(folder: Path, manifest: Manifest, verify: str) -> list[list[Tensor]]:
    """The tensors of all parts, in the order of `Neighbours`."""
    remedy = f"make them again with: {manifest.command(folder, '--replace')}"
    with checking(manifest.parts, verify) as done:
        return [
            map_tensors(folder, part, _layout(manifest, part.rows), verify, remedy, done.update)
            for part in manifest.parts
        ]


def _layout(manifest: Manifest, rows: int) -> Layout:
    layout: Layout = {
        "rows": ("I32", [rows, manifest.k]),
        "weights": ("F16", [rows, manifest.k]),
        "lse": ("F32", [rows]),
    }
    if manifest.exact:
        layout["mean"] = ("F16", [rows, manifest.dim])
    return layout


def _left_out(parts: Sequence[Part]) -> tuple[float, float]:
    """Mean and maximum over the rows of all parts."""
    total = math.fsum(part.left_out_mean * part.rows for part in parts)
    return total / sum(part.rows for part in parts), max(part.left_out_max for part in parts)


def _parts(values: Any) -> tuple[Part, ...]:
    """The records in a list of JSON objects. Raises JsonError for other values."""
    try:
        return tuple(as_dataclass(Part, part) for part in check_types(values, list[dict[str, Any]]))
    except JsonError as error:
        raise JsonError(f"parts: {error}") from error


def _fault(manifest: Manifest) -> str:
    """What no manifest says, in words; "" if there is nothing."""
    for name in ("rows", "dim", "k", "rows_per_part"):
        if type(value := getattr(manifest, name)) is not int or value < 1:  # True is an int too
            return f"{name} must be an integer of at least 1, got {brief(value)}"
    if manifest.rows >= 1 << 31:
        return f"the bank must have less than 2^31 rows, got {brief(manifest.rows)}"
    if manifest.k > manifest.rows:
        return f"k must be from 1 to the {manifest.rows} rows of the bank, got {brief(manifest.k)}"
    if not is_number(manifest.temperature) or manifest.temperature < _MIN_TEMPERATURE:
        came = brief(manifest.temperature)
        return f"temperature must be a number of at least {_MIN_TEMPERATURE}, got {came}"
    for index, part in enumerate(manifest.parts):
        place = manifest.place(index)
        if place["rows"] < 1 or any(getattr(part, name) != value for name, value in place.items()):
            return f"parts[{index}] must be of {place}, got {brief(part)}"
        if not (0 <= part.left_out_mean <= 1 and 0 <= part.left_out_max <= 1):
            return f"parts[{index}] leaves out {part.left_out_mean} and {part.left_out_max}"
    return ""
