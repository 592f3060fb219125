"""Writes a bank shard by shard, so that a build can be killed at any moment and resumed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ckd._files import TEMPORARY_PREFIX, atomic_write, fsync_folder, user_path
from ckd._lock import locked_folder
from ckd.bank import arrays, statistics
from ckd.bank.class_head import ClassHead, encode_head
from ckd.bank.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    BankError,
    HeadRecord,
    Manifest,
    RowError,
    brief,
    encode,
    read_manifest,
    settings_that_differ,
)
from ckd.bank.reader import EmbeddingBank
from ckd.bank.settings import new_manifest, positive
from ckd.bank.shards import checking, encode_shard, map_shard, record_of

_OURS = re.compile(
    rf"({re.escape(TEMPORARY_PREFIX)})?"
    rf"(manifest\.json|shard-\d{{5,}}\.safetensors|{re.escape(HeadRecord.file)})"
)


class BankWriter:
    """Writes a bank, shard by shard; a context manager.

        with BankWriter("banks/mine", dim=512, teacher="my-clip") as writer:
            for sample_ids, embeddings, labels in batches:
                writer.write(sample_ids, embeddings, labels)

    A full shard is durable, and listed in the manifest, before the next one starts. The end of the
    block writes the last, shorter shard and completes the bank. An exception or SIGKILL keeps the
    listed shards, and the same script run again resumes: `write` compares rows whose sample id is
    stored already, and skips them.

    path: a folder that does not exist, is empty, or holds an incomplete bank with these settings
        (with any settings, if it has no rows yet). A leading `~` is the home folder, and the
        attribute `path` is absolute, so that the working directory may change.
    dim: D, the width of the embeddings.
    teacher: its name, or a mapping that describes it; `preprocessing`, `fingerprint`, `dataset`
        describe its input. All are stored in the manifest and must be the same on a resume.
    class_names: the names of labels 0, 1, ...; with them, labels beyond are refused.
    normalize: store rows scaled to length 1 (computed in float64).
    class_head: the teacher's linear classifier of these rows, stored when the bank is complete.
    rows: the number of rows of the complete bank. If the block ends with another number: BankError,
        and the bank stays incomplete and can be resumed. None: the end of the block completes the
        bank, except that a resumed bank without a call of `write` is a BankError.

    One writer at a time holds a bank (flock on the folder, or a lock file on file systems without
    flock). Raises BankError for settings that are invalid or differ from those of the bank at
    `path`, a complete bank, a folder of other files, or a damaged shard; the system's OSError (disk
    full, permission denied).
    """

    rows_done: int
    """Rows that were durable when the writer opened, in bank order; 0 for a new bank."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        dim: int,
        *,
        teacher: str | Mapping[str, Any] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        fingerprint: str | None = None,
        dataset: str | None = None,
        class_names: Iterable[str] | None = None,
        normalize: bool = False,
        class_head: ClassHead | None = None,
        rows_per_shard: int = 8192,
        rows: int | None = None,
    ) -> None:
        self.path = user_path(path).absolute()
        if os.fsencode(self.path) != str(self.path).encode(errors="replace"):
            raise BankError(f"{str(self.path)!a} is not UTF-8, which safetensors needs; rename it")
        self._rows = None if rows is None else positive("rows", rows)
        self.rows_done = 0
        self._manifest = new_manifest(
            dim=dim,
            rows_per_shard=rows_per_shard,
            normalize=normalize,
            teacher=teacher,
            preprocessing=preprocessing,
            dataset=dataset,
            fingerprint=fingerprint,
            class_names=class_names,
        )
        if class_head is not None and self._manifest.normalized:
            raise BankError(
                "class_head and normalize exclude each other: the head's logits depend on the "
                "length of a row, which normalize=True does not store"
            )
        self._head = None if class_head is None else class_head.checked(self._manifest.dim)
        self._moments = statistics.Moments(self._manifest.dim)
        self._lock: ExitStack | None = None
        self._stored: set[int] = set()  # sample ids that were durable when the writer opened
        self._resumed: EmbeddingBank | None = None  # the rows of these ids
        self._offered: set[int] = set()  # sample ids passed to write() since
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []  # embedding, label, sample_id
        self._pending_rows = 0

    def is_complete(self) -> bool:
        """Whether `path` holds a complete bank with these settings already.

        Raises BankError for a complete bank with other settings, or another number of rows.
        """
        if not (self.path / MANIFEST_NAME).exists():
            return False
        found = read_manifest(self.path)
        if found.complete:
            self._check_settings(found)
            self._check_rows(found.rows)
        return found.complete

    def __enter__(self) -> BankWriter:
        """Take the lock, make or resume the bank, and delete a killed writer's leftovers."""
        self._lock = _lock(self.path)
        self._offered, self._pending, self._pending_rows = set(), [], 0
        self._moments = statistics.Moments(self._manifest.dim)
        try:
            if (self.path / MANIFEST_NAME).exists():
                self._resume(read_manifest(self.path))
            else:
                self._begin()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Complete the bank, unless an exception ends the block.

        Raises BankError if the bank has no rows, another number than `rows`, or was resumed without
        `rows` and without a call of `write`.
        """
        try:
            if kind is None:
                self._finish()
        finally:
            self._release()

    def write(self, sample_ids: Any, embeddings: Any, labels: Any = None) -> None:
        """Add rows; those whose sample id was stored before this writer opened are only compared.

        sample_ids: integers [n], unique in the bank. embeddings: floating point [n, D], any device;
        stored as float16. labels: integers [n], -1 for no class (the default). Tensors or arrays.
        Raises BankError, and takes no row of the batch, for wrong shapes or dtypes, repeated ids,
        labels that are no class, rows that float16 cannot hold (NaN, inf, beyond 65504, or so small
        that their direction is lost), and rows that differ from their stored embedding or label.
        The message names the row or sample id.
        After an OSError the writer is closed; open it again to resume.
        """
        if self._lock is None:
            raise BankError(
                f"the writer of {self.path} is not open; use it as `with BankWriter(...) as writer`"
            )
        ids = arrays.integers("sample_ids", sample_ids)
        rows = arrays.embeddings("embeddings", embeddings, self._manifest.dim)
        if labels is None:
            labels = torch.full((len(ids),), -1)
        classes = arrays.integers("labels", labels)
        if not len(ids) == len(rows) == len(classes):
            raise BankError(
                "sample_ids, embeddings and labels must have one entry per row, "
                f"got {len(ids)}, {len(rows)} and {len(classes)}"
            )
        self._check_labels(classes)
        self._check_duplicates(ids)
        half = arrays.to_float16(rows, ids, normalize=self._manifest.normalized)

        new = torch.tensor([i not in self._stored for i in ids.tolist()], dtype=torch.bool)
        self._check_stored(half[~new], classes[~new], ids[~new])
        self._offered.update(ids.tolist())
        # Indexing copies, so the caller may reuse its buffers for the next batch.
        half, classes, ids = half[new], classes[new], ids[new]
        for start, stop in self._pieces(len(ids)):
            self._pending.append((half[start:stop], classes[start:stop], ids[start:stop]))
            self._pending_rows += stop - start
            if self._pending_rows == self._manifest.rows_per_shard:
                self._write_shard(complete=False)

    def _begin(self) -> None:
        """Start a new bank: its manifest comes first, so that a resume finds the settings."""
        # Hidden files are those of a killed writer, of the lock, or of the system: macOS puts
        # .DS_Store into every folder that its user has looked at.
        foreign = [name for name in os.listdir(self.path) if not name.startswith(".")]
        if foreign:
            raise BankError(
                f"{self.path} is not a bank and not empty (it holds {brief(sorted(foreign)[0])}); "
                "choose another path"
            )
        self._remove_leftovers()
        atomic_write(self.path / MANIFEST_NAME, encode(self._manifest))
        fsync_folder(self.path.parent)

    def _resume(self, found: Manifest) -> None:
        """Continue an incomplete bank: check its settings and shards, and read its sample ids."""
        if not found.shards:
            # There are no rows to lose, so the settings may be corrected.
            self._remove_leftovers()
            atomic_write(self.path / MANIFEST_NAME, encode(self._manifest))
            return
        self._check_settings(found)
        if found.complete:
            raise BankError(
                f"{self.path} already holds a complete bank of {found.rows} rows; "
                "choose another path, or delete it first"
            )
        self._manifest = replace(found, schema_version=SCHEMA_VERSION)
        self._remove_leftovers()
        with checking(found.shards, "fast") as done:
            shards = [
                map_shard(self.path, record, found.dim, "fast", done.update)
                for record in found.shards
            ]
        self._resumed = EmbeddingBank(self.path, found, shards)
        for shard in shards:
            self._moments.add(shard.embedding)
        self._stored = set(self._resumed.sample_ids.tolist())
        self.rows_done = found.rows

    def _check_settings(self, found: Manifest) -> None:
        differ = settings_that_differ(found, self._manifest)
        if differ:
            state = "a complete" if found.complete else "an incomplete"
            raise BankError(
                f"{self.path} holds {state} bank of {found.rows} rows made with other settings: "
                f"{'; '.join(differ)}. Use the same settings, or another path"
            )

    def _check_rows(self, rows: int) -> None:
        if self._rows is not None and rows != self._rows:
            raise BankError(
                f"{self.path} has {rows} rows, expected rows={self._rows}; "
                "write them all, or choose another path"
            )

    def _remove_leftovers(self) -> None:
        """Delete the bank's own files that are temporary, or shards not in the manifest yet."""
        listed = {MANIFEST_NAME, *(shard.file for shard in self._manifest.shards)}
        leftovers = [n for n in os.listdir(self.path) if _OURS.fullmatch(n) and n not in listed]
        for name in leftovers:
            (self.path / name).unlink()
        if leftovers:
            fsync_folder(self.path)

    def _check_labels(self, labels: Tensor) -> None:
        names = self._manifest.class_names
        bad = labels < -1
        if names is not None:
            bad |= labels >= len(names)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            known = "0 or more" if names is None else f"0 to {len(names) - 1}"
            message = f"labels must be {known}, or -1 for none, got {int(labels[row])} in {{where}}"
            raise RowError("labels", row, message)

    def _check_duplicates(self, ids: Tensor) -> None:
        seen: set[int] = set()
        for row, sample_id in enumerate(ids.tolist()):
            if sample_id in seen or sample_id in self._offered:
                raise RowError(
                    "sample_ids",
                    row,
                    f"duplicate sample_id {sample_id} ({{where}}): "
                    "each row of a bank needs a unique id",
                )
            seen.add(sample_id)

    def _check_stored(self, rows: Tensor, labels: Tensor, ids: Tensor) -> None:
        """On a resume, rows must equal the stored ones, or the bank would mix two sources."""
        if self._resumed is None:
            return
        same_values = arrays.same_rows(rows, self._resumed.rows(ids))
        same_labels = labels == self._resumed.labels[self._resumed.positions(ids)]
        for same, what in ((same_values, "another embedding"), (same_labels, "another label")):
            if not bool(same.all()):
                raise BankError(
                    f"sample_id {int(ids[~same][0])} is stored in {self.path} with {what} than in "
                    "this batch: the bank was started with other data or another teacher; choose "
                    "another path, or delete the bank and build it again"
                )

    def _pieces(self, rows: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of the pieces of a batch of `rows` rows, cut at shard boundaries."""
        start = 0
        while start < rows:
            stop = min(rows, start + self._manifest.rows_per_shard - self._pending_rows)
            yield start, stop
            start = stop

    def _write_shard(self, *, complete: bool) -> None:
        """Write the pending rows as a shard, then the manifest that lists it."""
        manifest = self._manifest
        embedding, label, sample_id = (torch.cat(parts) for parts in zip(*self._pending))
        data = encode_shard(embedding, label, sample_id)
        record = record_of(len(manifest.shards), manifest.rows, len(label), data)
        manifest = replace(manifest, shards=(*manifest.shards, record))
        self._moments.add(embedding)
        try:
            atomic_write(self.path / record.file, data)
            if complete:
                manifest = self._completed(manifest)
            atomic_write(self.path / MANIFEST_NAME, encode(manifest))
        except BaseException:
            # The disk may be ahead of this object's state: only a resume reads it back.
            self._release()
            raise
        self._manifest = manifest
        self._pending, self._pending_rows = [], 0

    def _completed(self, manifest: Manifest) -> Manifest:
        """The manifest of the complete bank; writes the class head, which it lists."""
        record = None
        if self._head is not None:
            data, record = encode_head(self._head)
            atomic_write(self.path / record.file, data)
        encoded = statistics.encode(self._moments.statistics())
        return replace(manifest, complete=True, statistics=encoded, class_head=record)

    def _finish(self) -> None:
        if self._lock is None:
            raise BankError(f"the writer of {self.path} failed before; open it again to resume")
        rows = self._manifest.rows + self._pending_rows
        if not rows:
            raise BankError(f"{self.path}: the bank is empty, no row was written to it")
        self._check_rows(rows)
        if self._rows is None and not self._offered:
            raise BankError(
                f"{self.path} was resumed with {rows} rows and nothing was written to it; to "
                f"complete it as it is, use BankWriter(..., rows={rows})"
            )
        if self._pending_rows:
            self._write_shard(complete=True)
        else:
            atomic_write(self.path / MANIFEST_NAME, encode(self._completed(self._manifest)))

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _lock(path: Path) -> ExitStack:
    """Hold the lock of the folder, made if it is missing, until the result is closed."""
    lock = ExitStack()
    try:
        lock.enter_context(locked_folder(path))
    except BlockingIOError as error:
        raise BankError(f"{path} is being written by another process; {error.strerror}") from None
    except FileExistsError:
        raise BankError(f"{path} is a file; a bank is a folder, choose another path") from None
    return lock
