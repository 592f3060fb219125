"""Writes the neighbours of a bank part by part: it can be killed at any moment, and resumed."""

from __future__ import annotations

import os
import re
import shlex
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import safetensors.torch
from torch import Tensor

from ckd._files import TEMPORARY_PREFIX, atomic_write, fsync_folder
from ckd._lock import locked_folder
from ckd.bank.manifest import MANIFEST_NAME, BankError
from ckd.bank.neighbours import (
    FOLDER,
    Manifest,
    Part,
    check_bank,
    check_folder,
    exist,
    map_parts,
    read_manifest,
)
from ckd.bank.shards import record_of

_OURS = re.compile(rf"({re.escape(TEMPORARY_PREFIX)})?(manifest\.json|part-\d{{5,}}\.safetensors)")


class NeighboursWriter:
    """Writes the neighbours of a bank, part by part; a context manager.

    Each part is durable, and listed in the manifest, before `write` returns; the same script run
    again goes on after the last. One process at a time holds the folder.

    bank: the folder of the bank. manifest: from `new_manifest`. replace: begin anew where the
    folder holds neighbours of other settings or of another bank, or damaged ones; else they are a
    BankError. Neighbours with the same settings are gone on with in any case.
    """

    manifest: Manifest
    """In the block, the stored one: its parts are durable. That of a resume has its own
    `rows_per_part`."""

    def __init__(self, bank: Path, manifest: Manifest, *, replace: bool) -> None:
        self.path = bank / FOLDER
        self.manifest, self._replace = manifest, replace
        self._lock = ExitStack()

    def is_complete(self) -> bool:
        """Whether the folder holds complete neighbours with these settings already."""
        found = self._found()
        return found is not None and found.is_complete

    def __enter__(self) -> NeighboursWriter:
        check_folder(self.path)
        try:
            self._lock.enter_context(locked_folder(self.path))
        except BlockingIOError as error:
            raise BankError(
                f"{self.path} is being written by another process; {error.strerror}"
            ) from None
        except FileExistsError:
            raise BankError(f"{self.path} is a file; delete or rename it") from None
        try:
            found = self._found()
            if found is None:
                atomic_write(self.path / MANIFEST_NAME, self.manifest.encode())
                fsync_folder(self.path.parent)
            else:
                self.manifest = found
            self._remove_leftovers()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.close()

    def write(
        self, rows: Tensor, weights: Tensor, lse: Tensor, mean: Tensor | None, left_out: Tensor
    ) -> None:
        """Write the next part: [n, k], [n, k], [n], [n, D] or None, and [n] the mass left out.

        Raises BankError for numbers that are not finite, which a damaged bank may give.
        """
        manifest, index = self.manifest, len(self.manifest.parts)
        tensors = {"rows": rows.int(), "weights": weights.half(), "lse": lse.float()}
        if mean is not None:
            tensors["mean"] = mean.half()
        place = manifest.place(index)
        for tensor in (*tensors.values(), left_out):
            assert len(tensor) == place["rows"]
            if not bool(tensor.isfinite().all()):
                raise BankError(
                    f"{self.path.parent} has a row whose length is not finite; it is damaged: "
                    f"see python -m ckd.bank verify {shlex.quote(str(self.path.parent))}"
                )
        data = safetensors.torch.save({n: t.cpu().contiguous() for n, t in tensors.items()})
        record = vars(record_of(index, place["first_row"], place["rows"], data)) | place
        part = Part(
            **record,
            left_out_mean=left_out.double().mean().item(),
            left_out_max=left_out.max().item(),
        )
        atomic_write(self.path / part.file, data)
        manifest = replace(manifest, parts=(*manifest.parts, part))
        atomic_write(self.path / MANIFEST_NAME, manifest.encode())
        self.manifest = manifest

    def _found(self) -> Manifest | None:
        """The stored manifest, if the neighbours that it lists are to be gone on with."""
        if not exist(self.path.parent):
            return None
        try:
            found = read_manifest(self.path)
            if not found.parts:
                return None  # there is nothing to lose, so the settings may be corrected
            check_bank(self.path, found, self.manifest.bank)
            if found.settings != self.manifest.settings:
                raise BankError(
                    f"{self.path} holds neighbours made with other settings: {found.settings}, now "
                    f"{self.manifest.settings}; use the same, or add --replace"
                )
            map_parts(self.path, found, "fast")
        except BankError:
            if not self._replace:
                raise
            return None
        return found

    def _remove_leftovers(self) -> None:
        """Delete own files that are temporary, or parts that the manifest does not list."""
        listed = {MANIFEST_NAME, *(part.file for part in self.manifest.parts)}
        leftovers = [n for n in os.listdir(self.path) if _OURS.fullmatch(n) and n not in listed]
        for name in leftovers:
            (self.path / name).unlink()
        if leftovers:
            fsync_folder(self.path)
