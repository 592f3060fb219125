"""Reading a bank: memory-mapped rows, looked up by sample id, and class centroids."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ckd._files import user_path
from ckd._hints import unknown
from ckd.bank import arrays
from ckd.bank.class_head import ClassHead, map_head
from ckd.bank.manifest import (
    MANIFEST_NAME,
    BankError,
    Manifest,
    brief,
    checksum,
    first_other_name,
    quoted,
    read_manifest,
)
from ckd.bank.neighbours import Neighbours
from ckd.bank.shards import Shard, checking, map_shard
from ckd.bank.statistics import Moments, Statistics, decode

VERIFY_MODES = ("fast", "full", "off")


class EmbeddingBank:
    """A complete bank, opened for reading; make one with `EmbeddingBank.open`.

    labels: int64 [N], -1 for a row without a class. sample_ids: int64 [N], unique.
    class_names: the names of labels 0, 1, ...; empty if the bank stores none.
    meta: the manifest, read-only: teacher, preprocessing, dataset, fingerprint, normalized, ...
    path: its folder, absolute; nbytes: the size of its shards on disk; dim: D.
    checksum: the hash of the manifest, which covers those of the shards.

    Embeddings are memory-mapped: pages are read on first access. Replacing or deleting files of an
    open bank is harmless; truncating one in place is not (a read beyond the end of a mapped file
    kills the process). A pickle or copy stores the path and the manifest's hash alone, and opens
    the folder again with verify="off", so data workers can use a bank; another bank that has
    replaced it there is a BankError.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        shards: Sequence[Shard],
        class_head: ClassHead | None = None,
    ) -> None:
        self.path = path
        self.dim = manifest.dim
        self.class_names = tuple(manifest.class_names or ())
        self.meta: Mapping[str, Any] = MappingProxyType(manifest.as_dict())
        self.nbytes = sum(shard.record.bytes for shard in shards)
        self.labels = torch.cat([shard.label for shard in shards])
        self.sample_ids = torch.cat([shard.sample_id for shard in shards])
        self.checksum = checksum(manifest)
        self._shards = tuple(shards)
        self._class_head = class_head
        given, file = manifest.statistics, path / MANIFEST_NAME
        self._statistics = None if given is None else decode(given, self.dim, file)
        self._rows_per_shard = manifest.rows_per_shard
        self._check_labels()
        # Ids 0..N-1 in order are their own positions; others are found by binary search.
        in_order = torch.equal(self.sample_ids, torch.arange(len(self)))
        self._sorted = None if in_order else self.sample_ids.sort(stable=True)
        self._check_unique()

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: str = "fast") -> EmbeddingBank:
        """Open the bank in the folder `path`; a leading `~` is the home folder.

        verify: every mode checks the manifest, file sizes, headers, ids and labels; "fast" also the
        xxh3 of each shard, "full" its xxh3 and sha256, "off" nothing else.
        Raises BankError for an incomplete bank, and for damage that is found, with file and rows.
        """
        _check_mode(verify)
        path = user_path(path).absolute()
        manifest = read_manifest(path)
        if not manifest.complete:
            raise BankError(
                f"{path} is incomplete: {manifest.rows} rows are stored so far; "
                "run the same command again to resume it"
            )
        with checking(manifest.shards, verify) as done:
            shards = [
                map_shard(path, record, manifest.dim, verify, done.update)
                for record in manifest.shards
            ]
        head = None
        if manifest.class_head is not None:
            head = map_head(path, manifest.class_head, manifest.dim, verify)
        return cls(path, manifest, shards, head)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self)._open_again, (str(self.path), self.checksum)

    @classmethod
    def _open_again(cls, path: str, expected: str) -> EmbeddingBank:
        bank = cls.open(path, verify="off")
        if bank.checksum != expected:
            raise BankError(
                f"{path} holds another bank than when this one was pickled or copied: its manifest "
                "has changed; put the old one back, or open and pickle the new one"
            )
        return bank

    @property
    def teacher_name(self) -> str:
        """The teacher's name in the manifest, "" where there is none."""
        name = (self.meta["teacher"] or {}).get("name")
        return name if isinstance(name, str) else ""

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __repr__(self) -> str:
        return f"EmbeddingBank({str(self.path)!r}, rows={len(self)}, dim={self.dim})"

    def positions(self, sample_ids: Any) -> Tensor:
        """Row numbers int64 [n] of these sample ids [n]. BankError names the first unknown id."""
        ids = arrays.integers("sample_ids", sample_ids)
        if self._sorted is None:
            found, known = ids.clone(), (ids >= 0) & (ids < len(self))
        else:
            values, order = self._sorted
            place = torch.searchsorted(values, ids).clamp_(max=len(self) - 1)
            found, known = order[place], values[place] == ids
        if not bool(known.all()):
            raise BankError(
                f"sample_id {int(ids[~known][0])} is not in the bank {self.path} "
                f"({len(self)} rows); it was built from other data, or from a part of it"
            )
        return found

    def check_rows(self, sample_ids: Tensor, labels: Tensor, name: str) -> None:
        """Raise BankError unless each image of the data set `name` has a row, of its own class as
        far as both labels are known (>= 0)."""
        stored = self.labels[self.positions(sample_ids)]
        others = (stored >= 0) & (labels >= 0) & (stored != labels)
        if bool(others.any()):
            first = int(others.nonzero()[0])
            raise BankError(
                f"the bank {self.path} has other ids than {name}: sample_id "
                f"{int(sample_ids[first])} is of class {int(stored[first])} there and of class "
                f"{int(labels[first])} in the data; build the bank from this data, or give the "
                "ids with --ids"
            )

    def rows(self, sample_ids: Any) -> Tensor:
        """Embeddings float16 [n, D] of these sample ids [n], in order. Errors as in `positions`."""
        positions = self.positions(sample_ids)
        if len(self._shards) == 1:
            return self._shards[0].embedding[positions]
        # Every shard but the last has the same number of rows.
        shard_of = positions // self._rows_per_shard
        out = torch.empty(len(positions), self.dim, dtype=torch.float16)
        for index in shard_of.unique().tolist():
            wanted = shard_of == index
            within = positions[wanted] - index * self._rows_per_shard
            out[wanted] = self._shards[index].embedding[within]
        return out

    def embeddings(self) -> Tensor:
        """All embeddings float16 [N, D], in bank order.

        With one shard this is the memory map itself (nothing is read or copied), otherwise a copy
        in memory; `shards` never copies. Writes never reach the file.
        """
        if len(self._shards) == 1:
            return self._shards[0].embedding
        return torch.cat([shard.embedding for shard in self._shards])

    def shards(self) -> Iterator[tuple[int, Tensor]]:
        """(number of its first row, memory-mapped embeddings float16 [n, D]) of each shard."""
        for shard in self._shards:
            yield shard.record.first_row, shard.embedding

    def statistics(self) -> Statistics:
        """Mean and variance of each dimension over all rows, float64 [D].

        Those that the build stored; for a bank of an earlier version the same numbers from one pass
        over its rows (1 to 2 s for 200,000 x 1024 on two cores).
        """
        if self._statistics is not None:
            return self._statistics
        moments = Moments(self.dim)
        for _, embedding in self.shards():
            moments.add(embedding)
        return moments.statistics()

    def class_head(self) -> ClassHead | None:
        """The teacher's class head, or None: the teacher had none that is linear in the embedding,
        or the rows are scaled to length 1, imported, or of an earlier version of ckd."""
        return self._class_head

    def class_counts(self) -> list[tuple[str, int]]:
        """(class name, number of rows) in label order, without the rows labelled -1.

        A bank without class names lists the labels that occur, as numbers.
        """
        labelled = self.labels[self.labels >= 0]
        if self.class_names:
            counts = labelled.bincount(minlength=len(self.class_names))
            return list(zip(self.class_names, counts.tolist()))
        labels, counts = labelled.unique(return_counts=True)
        return list(zip(map(str, labels.tolist()), counts.tolist()))

    def centroids(self, per_class: int | None = None, *, seed: int | None = None) -> Tensor:
        """The mean embedding of each class, float32 [C, D], streamed shard by shard.

        per_class: use at most this many rows of each class: the first in bank order, or, with a
        `seed`, a random choice (the same for the same seed). None: all rows.
        C is the number of class names, else the largest label + 1. Rows labelled -1 are skipped.
        Sums are float64, so the result does not depend on shard sizes.
        Raises BankError that names a class without rows.
        """
        classes = len(self.class_names) or int(self.labels.max()) + 1
        present = self.labels[self.labels >= 0].unique()
        if len(present) < classes or classes == 0:
            raise BankError(self._without_rows(present))
        chosen = self.labels >= 0
        if per_class is not None:
            chosen &= self._first_of_each_class(per_class, seed)
        sums = torch.zeros(classes, self.dim, dtype=torch.float64)
        for first, embedding in self.shards():
            kept = chosen[first : first + len(embedding)].nonzero().squeeze(1)
            sums.index_add_(0, self.labels[first + kept], embedding[kept].double())
        counts = torch.bincount(self.labels[chosen], minlength=classes)
        return (sums / counts[:, None]).float()

    def neighbours(self, verify: str = "fast") -> Neighbours:
        """The k nearest rows of each row, which `python -m ckd.bank neighbours` has stored.

        verify: as in `open`. Raises BankError, with the command that makes them, if there are none,
        or if they are incomplete, damaged, or those of another bank that was in this folder.
        """
        _check_mode(verify)
        return Neighbours.open(self.path, self.checksum, verify)

    def check(
        self,
        *,
        dim: int | None = None,
        class_names: Sequence[str] | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Raise BankError, with both values and the remedy, if the bank does not fit.

        dim: the width that the loss expects. class_names, fingerprint: those of the training data.
        Arguments that are None, class names of data without classes, and values that the bank does
        not record (embeddings imported without them), are not compared; but all labels must be
        indices of `class_names`.
        """
        if dim is not None and dim != self.dim:
            raise BankError(
                f"the bank {self.path} has embeddings of width {self.dim}, expected {dim}; "
                f"set teacher_dim={self.dim}, or build a bank with the other teacher"
            )
        if class_names:
            self._check_class_names(tuple(class_names))
        recorded = self.meta["fingerprint"]
        if fingerprint is not None and recorded is not None and fingerprint != recorded:
            raise BankError(
                f"the bank {self.path} was built from data with fingerprint {recorded} "
                f"({self.meta['dataset'] or 'unnamed'}), this data has {fingerprint}; "
                "use the data it was built from, or build a bank of this data"
            )

    def _check_class_names(self, names: tuple[str, ...]) -> None:
        mine, remedy = self.class_names, "use the bank's own data, or build a bank of this data"
        if not mine:
            largest = int(self.labels.max())
            if largest >= len(names):
                raise BankError(
                    f"the bank {self.path} has labels up to {largest}, "
                    f"the data has {len(names)} classes; {remedy}"
                )
        elif len(mine) != len(names):
            raise BankError(
                f"the bank {self.path} has {len(mine)} class names ({brief(list(mine))}), "
                f"the data has {len(names)} ({brief(list(names))}); {remedy}"
            )
        label = first_other_name(mine, names)
        if label is not None:
            raise BankError(
                f"class {label} is {quoted(mine[label])} in the bank {self.path} "
                f"and {quoted(names[label])} in the data; {remedy}"
            )

    def _first_of_each_class(self, per_class: int, seed: int | None) -> Tensor:
        """Mask [N] of the first `per_class` rows of each label, in bank order or a seeded one."""
        if isinstance(per_class, bool) or not isinstance(per_class, int) or per_class < 1:
            raise BankError(f"per_class must be an integer of at least 1, got {per_class!r}")
        order = torch.arange(len(self))
        if seed is not None:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        # A stable sort keeps that order within each class; a row's rank in its class is its
        # distance from the first row of the class.
        labels, by_label = self.labels[order].sort(stable=True)
        starts = torch.searchsorted(labels, labels)
        mask = torch.zeros(len(self), dtype=torch.bool)
        mask[order[by_label[torch.arange(len(self)) - starts < per_class]]] = True
        return mask

    def _without_rows(self, present: Tensor) -> str:
        if not self.class_names and not len(present):
            return f"the bank {self.path} has no labels, so no centroids; build it with labels"
        known = set(present.tolist())
        label = next(c for c in range(len(known) + 1) if c not in known)
        name = f" ({self.class_names[label]!r})" if self.class_names else ""
        return (
            f"class {label}{name} has no row in the bank {self.path}, so it has no centroid; "
            "build the bank from data that has every class"
        )

    def _check_labels(self) -> None:
        bad = self.labels < -1
        if self.class_names:
            bad |= self.labels >= len(self.class_names)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            known = f"-1 to {len(self.class_names) - 1}" if self.class_names else "-1 or more"
            raise BankError(
                f"{self._file_of(row)} is damaged: row {row} has label {int(self.labels[row])}, "
                f"expected {known}"
            )

    def _check_unique(self) -> None:
        if self._sorted is None:
            return
        values, order = self._sorted
        same = (values[1:] == values[:-1]).nonzero().squeeze(1)
        if len(same):
            first, second = sorted(order[int(same[0]) : int(same[0]) + 2].tolist())
            raise BankError(
                f"{self._file_of(second)} is damaged: duplicate sample_id "
                f"{int(self.sample_ids[first])} in rows {first} and {second}"
            )

    def _file_of(self, row: int) -> Path:
        return self.path / self._shards[row // self._rows_per_shard].record.file


def _check_mode(verify: str) -> None:
    if verify not in VERIFY_MODES:
        raise BankError(unknown("verify mode", verify, VERIFY_MODES))
