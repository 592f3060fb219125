"""`python -m ckd.bank build|info|verify|neighbours`: build, describe or verify a bank, and find
the nearest rows of its rows."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import tyro

from ckd import data, models
from ckd._console import say
from ckd._device import pick_device
from ckd._hints import check_choices, flag
from ckd._json import document
from ckd.bank import BankError, EmbeddingBank
from ckd.bank.build import build_bank
from ckd.bank.neighbours import Neighbours as StoredNeighbours
from ckd.bank.neighbours import exist
from ckd.bank.npy import import_npy
from ckd.bank.picture import Projection, draw_bank
from ckd.bank.summary import describe, human_bytes, neighbour_facts, summarize
from ckd.cli.command import Output, parse, run
from ckd.data import MAX_PIXELS
from ckd.neighbours import build_neighbours

DESCRIPTION = "Build, describe or verify a bank of teacher embeddings; find nearest rows."

_TEACHER_FLAGS = {
    *("teacher", "teacher_weights", "teacher_image_size", "pool", "data", "split"),
    *("image_size", "max_image_pixels", "batch_size", "device", "workers"),
}
_IMPORT_FLAGS = {"labels", "ids", "class_names", "teacher_name"}


@dataclass(frozen=True, kw_only=True)
class Build(Output):
    """Run a teacher over a data set (--teacher, --data), or import embeddings (--from-npy).

    After a kill, the same command goes on from the last full shard.

    Example:
        ckd bank build --data photos --teacher timm:resnet50 --out bank
        ckd bank build --from-npy rows.npy --labels y.npy --out bank
    """

    out: Path
    """The folder to write the bank to."""
    teacher: str | None = None
    """A model spec (resnet56, timm:NAME, hf:NAME), run folder or .safetensors file."""
    teacher_weights: Path | None = None
    """The weights of a --teacher that is a spec; timm: and hf: default to the published ones."""
    teacher_image_size: int | None = None
    """Resize the images to this input size of the teacher; default: the one it was made for."""
    pool: models.Pool | None = None
    """How the tokens of an hf: teacher become its embedding: its class token, the mean of its patch
    tokens, or its own pooling layer; default: as ckd.models.create says."""
    data: str | None = None
    """The data set: digits, an image folder, parquet file(s) or .npz."""
    split: Literal["train", "test"] = "train"
    """The split of the data set."""
    image_size: int | None = None
    """Resize and centre-crop the images to this size, as in training; default: their own."""
    max_image_pixels: int = MAX_PIXELS
    """Refuse encoded images of more pixels than this (default: 2^26) before decoding them."""

    from_npy: Path | None = None
    """Import embeddings instead: a .npy file, floating point [N, D]."""
    labels: Path | None = None
    """--from-npy: a .npy file of class labels, integers [N]."""
    ids: Path | None = None
    """--from-npy: a .npy file of sample ids, integers [N]; default: the row numbers."""
    class_names: Path | None = None
    """--from-npy: a text file, one class name per line."""
    teacher_name: str | None = None
    """--from-npy: the teacher's name, stored with the bank."""

    normalize: bool = False
    """Store the embeddings scaled to length 1."""
    rows_per_shard: int = 8192
    """Rows per file; a kill loses at most the work of one file."""
    batch_size: int = 256
    """Images per forward pass of the teacher."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, ..."""
    workers: int = 0
    """Processes that decode images; a data set in memory needs none."""

    def run(self) -> None:
        check_choices(self)
        bank = self._import() if self.from_npy is not None else self._build()
        if self.json:
            print(document(summarize(bank)))
            return
        print(
            f"{bank.path} is complete: {len(bank):,} rows, {human_bytes(bank.nbytes)}; "
            f"see python -m ckd.bank info {shlex.quote(str(bank.path))}"
        )

    def _import(self) -> EmbeddingBank:
        _refuse(self, _TEACHER_FLAGS, "has no effect with --from-npy")
        assert self.from_npy is not None
        return import_npy(
            self.from_npy,
            self.out,
            labels=self.labels,
            ids=self.ids,
            class_names=self.class_names,
            teacher=self.teacher_name,
            normalize=self.normalize,
            rows_per_shard=self.rows_per_shard,
        )

    def _build(self) -> EmbeddingBank:
        if self.teacher is None or self.data is None:
            raise BankError("build needs --teacher and --data, or --from-npy")
        _refuse(self, _IMPORT_FLAGS, "goes with --from-npy only")
        device = pick_device(self.device)  # fails before the slow steps
        dataset = data.load(
            self.data,
            self.split,
            image_size=self.image_size,
            max_pixels=self.max_image_pixels,
        )
        return build_bank(
            dataset,
            models.load(
                self.teacher,
                weights=self.teacher_weights,
                image_size=self.teacher_image_size,
                pool=self.pool,
            ),
            self.out,
            batch_size=self.batch_size,
            device=device,
            workers=self.workers,
            normalize=self.normalize,
            rows_per_shard=self.rows_per_shard,
        )


@dataclass(frozen=True, kw_only=True)
class Info(Output):
    """Describe a bank, and what it saves compared with running the teacher.

    Example:
        ckd bank info bank --plot bank.png
    """

    bank: tyro.conf.Positional[Path]
    """The folder of the bank."""
    plot: Path | None = None
    """Also draw its rows and class centroids into this image file (.png, .pdf, .svg)."""
    method: Projection = "pca"
    """--plot: principal components, or t-SNE (needs scikit-learn)."""
    per_class: int | None = None
    """--plot: average the first PER_CLASS rows of each class in its centroid; default: all."""

    def run(self) -> None:
        if self.plot is None:
            _refuse(self, {"method", "per_class"}, "has no effect without --plot")
        check_choices(self)
        bank = EmbeddingBank.open(self.bank)
        print(document(summarize(bank)) if self.json else describe(bank))
        if self.plot is not None:
            draw_bank(bank, self.plot, method=self.method, per_class=self.per_class)
            say(f"wrote {self.plot}")


@dataclass(frozen=True, kw_only=True)
class Verify(Output):
    """Check every file of a bank, its neighbours included, against the stored hashes (xxh3; --full:
    sha256 too).

    Example:
        ckd bank verify bank --full
    """

    bank: tyro.conf.Positional[Path]
    """The folder of the bank."""
    full: bool = False
    """Check the sha256 of every file too."""

    def run(self) -> None:
        mode = "full" if self.full else "fast"
        hashes = "xxh3 and sha256 match" if self.full else "xxh3 matches"
        bank = EmbeddingBank.open(self.bank, verify=mode)
        if not self.json:
            shards = len(bank.meta["shards"])
            print(
                f"{bank.path} is whole: {len(bank):,} rows in {shards} shard{'s' * (shards > 1)}, "
                f"{human_bytes(bank.nbytes)}, {hashes}"
            )
        found = bank.neighbours(mode) if exist(bank.path) else None
        if self.json:
            print(document(self._facts(bank, found)))
        elif found is not None:
            print(f"{found.path} is whole: {human_bytes(found.nbytes)}, {hashes}")

    def _facts(self, bank: EmbeddingBank, found: StoredNeighbours | None) -> dict[str, Any]:
        near = None if found is None else {"path": str(found.path), "bytes": found.nbytes}
        return {
            "path": str(bank.path),
            "rows": len(bank),
            "shards": len(bank.meta["shards"]),
            "bytes": bank.nbytes,
            "hashes": ["xxh3", "sha256"] if self.full else ["xxh3"],
            "neighbours": near,
        }


@dataclass(frozen=True, kw_only=True)
class Neighbours(Output):
    """Store the nearest rows of each row of a bank, with softmax weights, beside its shards.

    After a kill, the same command goes on from the last part.

    Example:
        ckd bank neighbours bank --k 32
    """

    bank: tyro.conf.Positional[Path]
    """The folder of the bank."""
    k: int = 32
    """Rows to store for each row; the row itself counts."""
    temperature: float = 0.07
    """Of the softmax of cosines over the whole bank."""
    exact: bool = False
    """Also store each row's mean of all rows under that softmax: as large as the bank."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, ..."""
    replace: bool = False
    """Replace stored ones that have other settings, are damaged, or are those of another bank."""

    def run(self) -> None:
        found = build_neighbours(
            self.bank,
            k=self.k,
            temperature=self.temperature,
            exact=self.exact,
            device=pick_device(self.device),
            replace=self.replace,
        )
        if self.json:
            facts = {"path": str(found.path), "rows": len(found), **neighbour_facts(found)}
            print(document(facts))


COMMAND = Build | Info | Verify | Neighbours


def main(argv: Sequence[str] | None = None, prog: str = "python -m ckd.bank") -> int:
    """Run the command line; returns the exit status."""
    return run(
        lambda given: parse(COMMAND, given, prog, description=DESCRIPTION),
        argv,
        interrupted="interrupted; the same command goes on from the last full shard or part",
    )


def _refuse(command: Build | Info, flags: set[str], why: str) -> None:
    """Raise BankError for the first of these flags that is not at its default."""
    for field in fields(command):
        if field.name in flags and getattr(command, field.name) != field.default:
            raise BankError(f"{flag(field.name)} {why}")


if __name__ == "__main__":
    sys.exit(main())
