"""Images in Hugging Face parquet files: an image column of {bytes, path}, mostly a label column."""

from __future__ import annotations

import itertools
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ckd import _json
from ckd._console import bar
from ckd._errors import warn
from ckd._files import check_regular
from ckd._hints import require
from ckd.data import splits, walk
from ckd.data.dataset import (
    LABEL_NAMES,
    DataError,
    MissingSplit,
    composed,
    nfc,
    numbered_classes,
    unreadable,
)
from ckd.data.decode import EncodedImages

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels")
SUFFIX = ".parquet"
_CACHE_BYTES = 256 << 20  # of encoded row groups in each process

# Encoded images hardly compress; the reader allocates what a file declares.
_MOST_EXPANDED, _ALWAYS_ALLOWED = 64, 64 << 20
# Base classes of pyarrow's exceptions.
_DAMAGE = (OSError, ValueError, TypeError, LookupError, NotImplementedError, MemoryError)


def files_in(folder: Path) -> Iterator[Path]:
    """The parquet files at any depth below `folder`."""
    return (file for file in walk.files(folder) if file.suffix.lower() == SUFFIX)


def open_split(path: Path, split: str, holdout: float) -> ParquetImages:
    """The rows of `split` in a parquet file or a folder of them.

    A file with a split's name in its path (train-00000-of-00004.parquet, test/0000.parquet)
    belongs to that split; if there is none, the rows are divided by `splits.holdout_positions`.
    The files of a split are in one folder, or below one folder with its name.
    Labels that are null, or of a file without a label column, are unknown (-1).
    Sample ids number the rows of the split's (or all) files, sorted by path.
    """
    names: dict[str | None, list[Path]] = {}
    places: dict[str | None, set[str]] = {}
    for file in [path] if path.is_file() else sorted(files_in(path)):
        relative = Path(file.name) if path.is_file() else file.relative_to(path)
        name = splits.name_in(relative.as_posix())
        names.setdefault(name, []).append(file)
        places.setdefault(name, set()).add(_place(relative.parent, name))
    if set(names) != {None}:
        names.pop(None, None)  # beside files of splits, files of no split are ignored
    for name in names:
        if len(places[name]) > 1:
            raise DataError(
                f"{path} has {f'{name} files' if name else 'files'} in {len(places[name])} folders "
                f"({', '.join(sorted(places[name]))}), as several configurations or versions of a "
                "data set have; pass one of the folders, or put all files into one folder if they "
                "are parts of one data set"
            )
    for paths in names.values():
        _check_shards(paths)
    every = []
    with bar("opening", total=sum(map(len, names.values())), unit="files") as opened:
        for file in itertools.chain(*names.values()):
            every.append(_ParquetFile(file))
            opened.update()
    if None in names:
        whole = ParquetImages(every, _class_names(every))
        part = whole.select(splits.holdout_positions(whole.sample_ids, split, holdout))
        part.held_out = True
        return part
    chosen = splits.choose([name for name in names if name], split, path)
    if chosen is None:
        found = ", ".join(sorted(name for name in names if name))
        raise MissingSplit(
            f"{path} has no {split} split (found: {found}); "
            + ("pass the folder that holds all splits" if path.is_file() else "add its files")
        )
    files = [file for file in every if file.path in names[chosen]]
    others = [name for name in names if name not in (None, chosen)]
    validation = splits.choose([name for name in others if name], split, path)
    if validation and not any(file.labelled for file in files):
        labelled = [file for file in every if file.path in names[validation]]
        if any(file.labelled for file in labelled):
            warn(
                f"{path}: the {chosen} files have no labels (all are unknown): {validation} is "
                "read",
                stacklevel=4,
            )
            files = labelled
    return ParquetImages(files, _class_names(every))


def _check_shards(files: Sequence[Path]) -> None:
    """DataError unless files that are numbered (train-00000-of-00004.parquet) are all there."""
    shards: dict[tuple[Path, str], dict[int, set[int]]] = {}
    for file in files:
        if found := re.fullmatch(r"(.*?)(\d+)-of-(\d+).*", file.stem):
            totals = shards.setdefault((file.parent, found[1]), {})
            totals.setdefault(int(found[3]), set()).add(int(found[2]))
    for (folder, stem), totals in shards.items():
        if len(totals) > 1:
            raise DataError(
                f"{folder} has files {stem}* of {' and of '.join(map(str, sorted(totals)))}, "
                "as two versions of a data set have; remove one"
            )
        ((total, numbers),) = totals.items()
        if missing := sorted({*range(total)} - numbers):
            raise DataError(
                f"{folder} lacks {len(missing)} of the {total} files {stem}*, the first is number "
                f"{missing[0]}; finish the download"
            )


def _place(folder: Path, name: str | None) -> str:
    """The relative folder up to the first part with the split's name: files of one split that
    differ in it are of several data sets."""
    upwards = [folder, *folder.parents]
    named = [place for place in upwards if name and splits.name_in(place.name) == name]
    return (named[-1] if named else folder).as_posix()


class ParquetImages(EncodedImages):
    """Rows of parquet files, numbered through the files in order.

    Reading a row reads its row group into an LRU cache. A shuffled order over files much larger
    than the cache thus reads a whole row group for each row; an image folder is faster there.
    """

    def __init__(
        self,
        files: Sequence[_ParquetFile],
        class_names: tuple[str, ...],
        rows: Tensor | None = None,
    ) -> None:
        self.class_names = class_names
        labels = torch.from_numpy(np.concatenate([file.labels for file in files]))
        self.sample_ids = torch.arange(len(labels)) if rows is None else rows
        self.labels = labels[self.sample_ids]
        self._files = files
        groups = [(file, group) for file in files for group in range(len(file.group_rows))]
        self._groups = groups
        self._group_ends = np.cumsum([file.group_rows[group] for file, group in groups])
        self._cache = _Cache()

    def select(self, positions: Tensor) -> ParquetImages:
        return ParquetImages(self._files, self.class_names, self.sample_ids[positions])

    def read(self, position: int) -> memoryview:
        group, row = self._locate(position)
        value = self._column(group)[row]
        if not value.is_valid:
            raise DataError(
                f"{self.where(position)}: the image has no bytes; "
                "save the data set with its images embedded"
            )
        return memoryview(value.as_buffer())

    def where(self, position: int) -> str:
        row = int(self.sample_ids[position])
        for file in self._files:
            if row < len(file.labels):
                return f"{file.path}, row {row}"
            row -= len(file.labels)
        raise IndexError(position)

    def sizes_bytes(self) -> list[int]:
        return [file.group_bytes[group] for file, group in self._groups]

    def _locate(self, position: int) -> tuple[int, int]:
        row = int(self.sample_ids[position])
        group = int(np.searchsorted(self._group_ends, row, side="right"))
        return group, row - int(self._group_ends[group - 1] if group else 0)

    def _column(self, group: int) -> Any:
        file, index = self._groups[group]
        return self._cache.get(group, lambda: file.read_images(index))


class _ParquetFile:
    """One file: its labels, its class names, and the sizes of its row groups."""

    def __init__(self, path: Path) -> None:
        self.path = path
        check_regular(path, follow=True)
        parquet = require("pyarrow.parquet", extra="parquet", purpose="reading parquet files")
        try:
            file = parquet.ParquetFile(path)
            schema = file.schema_arrow
            self._image = self._find(schema, IMAGE_COLUMNS, "image")
            features = _hugging_face_features(schema.metadata or {}, path)
            label = None
            if any(_seems_labels(name, features) for name in schema.names):
                label = self._find(schema, LABEL_COLUMNS, "label")
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            self.group_rows = [group.num_rows for group in groups]
            self.group_bytes = [group.total_byte_size for group in groups]
            self._check_counts(file.metadata)
            self.labels = np.full(sum(self.group_rows), -1)
            if label is not None:
                self.labels = self._read_labels(file, label)
        except DataError:
            raise
        except _DAMAGE as error:
            raise unreadable(path, "a parquet", error) from error
        self.class_names: tuple[str, ...] | None = None  # no classes, rather than without names
        if label is not None:
            self.class_names = _class_names_in(features, label, path)
            composed(self.class_names, f"{path}: the class names")

    @property
    def labelled(self) -> bool:
        """Whether any row has a label."""
        return bool((self.labels >= 0).any())

    def read_images(self, group: int) -> Any:
        """The encoded images of a row group as one pyarrow binary array."""
        arrow = require("pyarrow", extra="parquet", purpose="reading parquet files")
        parquet = require("pyarrow.parquet", extra="parquet", purpose="reading parquet files")
        try:
            # Opened on every call: an open file cannot be pickled to a worker process.
            table = parquet.ParquetFile(self.path).read_row_group(
                group, columns=[self._image], use_threads=False
            )
            images = table.column(self._image).combine_chunks()
            if len(images) != self.group_rows[group]:
                raise ValueError(f"{len(images)} images in {self.group_rows[group]} rows")
        except _DAMAGE as error:
            raise DataError(
                f"{self.path}: row group {group} is damaged ({_one_line(error)})"
            ) from error
        if arrow.types.is_struct(images.type):
            names = [field.name for field in images.type]
            if "bytes" not in names:
                raise DataError(
                    f"{self.path}: column {self._image!r} has fields {names}, not 'bytes'"
                )
            # flatten(), unlike field(), applies the struct's own nulls.
            images = images.flatten()[names.index("bytes")]
        if not (arrow.types.is_binary(images.type) or arrow.types.is_large_binary(images.type)):
            raise DataError(
                f"{self.path}: column {self._image!r} must hold encoded images (binary, or a "
                f"struct with 'bytes'), got {images.type}"
            )
        return images

    def _find(self, schema: Any, known: tuple[str, ...], what: str) -> str:
        found = [name for name in schema.names if name in known]
        if len(found) > 1:
            raise DataError(
                f"{self.path} has {len(found)} {what} columns, {' and '.join(found)}; remove or "
                "rename all but the one to use"
            )
        if not found:
            remedy = "" if what == "image" else ", or leave it out if no image has a label"
            raise DataError(
                f"{self.path} has no {what} column: expected one of {', '.join(known)}, "
                f"found {', '.join(schema.names)}; rename the column{remedy}"
            )
        return found[0]

    def _check_counts(self, metadata: Any) -> None:
        """ValueError for counts of rows that contradict each other, or that no file of images of
        this size can have: the reader trusts them, until memory is full."""
        # Not the counts of columns: pyarrow aborts where the metadata of one are damaged.
        total, size = sum(self.group_rows), self.path.stat().st_size
        if total > size:
            raise ValueError(f"{total:,} rows of images in {size:,} bytes")
        if (declared := sum(self.group_bytes)) > _MOST_EXPANDED * size + _ALWAYS_ALLOWED:
            raise ValueError(
                f"{size:,} bytes are to become {declared:,}; encoded images do not compress so much"
            )
        if min(self.group_rows, default=0) < 0 or total != metadata.num_rows:
            raise ValueError(f"{metadata.num_rows:,} rows in all, {total:,} in its row groups")

    def _read_labels(self, file: Any, column: str) -> np.ndarray:
        arrow = require("pyarrow", extra="parquet", purpose="reading parquet files")
        labels = file.read(columns=[column]).column(column)
        if arrow.types.is_null(labels.type):  # every value is
            labels = labels.cast(arrow.int64())
        if not arrow.types.is_integer(labels.type):
            raise DataError(
                f"{self.path}: column {column!r} must hold integer class indices, got {labels.type}"
            )
        if len(labels) != sum(self.group_rows):
            raise ValueError(f"{len(labels)} labels in {sum(self.group_rows)} rows")
        return labels.cast(arrow.int64()).fill_null(-1).to_numpy().astype(np.int64)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _hugging_face_features(metadata: dict[bytes, bytes], path: Path) -> dict[str, Any]:
    """Column -> its feature, as Hugging Face datasets writes them, or {}."""
    try:
        features = _json.parse_object(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return features if isinstance(features, dict) else {}
    except _json.JsonError as error:
        warn(f"the class names in the metadata of {path} are passed over: {error}", stacklevel=2)
        return {}
    except (KeyError, TypeError):  # foreign metadata
        return {}


def _class_names_in(features: dict[str, Any], label: str, path: Path) -> tuple[str, ...]:
    """The class names of a ClassLabel feature, or ()."""
    try:
        return tuple(map(str, _json.check_types(features[label]["names"], list[str | int])))
    except _json.JsonError as error:
        warn(f"the class names in the metadata of {path} are passed over: {error}", stacklevel=2)
        return ()
    except (KeyError, TypeError):
        return ()


def _seems_labels(column: str, features: dict[str, Any]) -> bool:
    """Whether a column holds labels by its name or feature; to leave one unread would be to train
    without labels unnoticed."""
    feature = features.get(column)
    is_class_label = isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    return is_class_label or LABEL_NAMES.search(column) is not None


def _class_names(files: Sequence[_ParquetFile]) -> tuple[str, ...]:
    """The files' common class names; if they have none, the numbers up to the largest label."""
    with_labels = [file for file in files if file.class_names is not None]
    stored = {tuple(map(nfc, file.class_names or ())): file.path for file in with_labels}
    if len(stored) > 1:
        first, second = list(stored.values())[:2]
        raise DataError(f"{first} and {second} have different class names; they must be the same")
    names = with_labels[0].class_names if with_labels else None
    labels = [torch.from_numpy(file.labels) for file in files]
    return names or numbered_classes(labels, files[0].path.parent)


class _Cache:
    """LRU cache of row groups, up to _CACHE_BYTES or one group; a pickle of it is empty."""

    def __init__(self) -> None:
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._groups, self._lock = OrderedDict(), threading.Lock()

    def get(self, key: int, read: Any) -> Any:
        with self._lock:
            if key not in self._groups:
                self._groups[key] = read()
                while len(self._groups) > 1 and self._bytes() > _CACHE_BYTES:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(key)
            return self._groups[key]

    def _bytes(self) -> int:
        return sum(group.nbytes for group in self._groups.values())
