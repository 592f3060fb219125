"""Arrays and parquet files that are damaged or lie about their sizes."""

from __future__ import annotations

import contextlib
import io
import json
import random
import struct
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ckd.data import DataError, load
from tests.damage import damaged, deadline, npy
from tests.image_files import encoded, pixels, write_parquet

LABELS = npy("<i8", (3,), np.array([0, 1, 0]).tobytes())
IMAGES = npy("|u1", (3, 8, 8, 3), pixels(3).tobytes())


def npz(path: Path, compression: int = zipfile.ZIP_DEFLATED, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in ({"images": IMAGES, "labels": LABELS} | entries).items():
            file.writestr(f"{name}.npy", data)
    return path


HOSTILE = {
    "more images than bytes": {"images": npy("|u1", (10**9, 64, 64, 3), bytes(1 << 20))},
    "terabytes": {"images": npy("|u1", (10**9, 64, 64, 3), bytes(100))},
    "more labels than bytes": {"labels": npy("<i8", (10**12,), bytes(24))},
    "negative": {"images": npy("|u1", (-3, 8, 8, 3), bytes(100))},
    "two negatives": {"images": npy("|u1", (-3, -8, 8, 3), bytes(576))},
    "beyond 64 bits": {"images": npy("|u1", (2**70, 8, 8), bytes(100))},
    "a product of 2^64": {"images": npy("|u1", (2**32, 2**16, 2**16), bytes(100))},
    "beyond 64 bits and none": {"images": npy("|u1", (0, 2**70, 8), bytes(100))},
    "images without pixels": {"images": npy("|u1", (10**12, 0, 8))},
    "texts without characters": {"class_names": npy("<U0", (10**12,))},
    "bytes of nothing": {"class_names": npy("|S0", (10**12,))},
    "structures of nothing": {"labels": npy("|V0", (10**12,))},
    "structures": {"labels": npy([("a", "<i8"), ("b", "<i8")], (3,), bytes(48))},
    "half a surrogate pair": {"class_names": npy("<U1", (2,), struct.pack("<II", 65, 0xD800))},
    "no code point": {"class_names": npy("<U1", (2,), struct.pack("<II", 65, 0x110000))},
    "a header without an end": {"images": b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{"},
    "a header of brackets": {"images": npy("|u1", 0).replace(b": 0}", b": " + b"(" * 9000)},
    "an unknown version": {"images": IMAGES.replace(b"NUMPY\x01", b"NUMPY\x09")},
    "no array": {"images": b"a text, not an array"},
    "no bytes": {"labels": b""},
    "truth values": {"labels": npy("|b1", (3,), bytes(3))},
    "dates": {"labels": npy("<M8[s]", (3,), bytes(24))},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_npz_arrays_that_cannot_be_are_refused_without_their_memory(
    tmp_path: Path, name: str
) -> None:
    path = npz(tmp_path / "a.npz", **HOSTILE[name])
    tracemalloc.start()
    try:
        with deadline(), pytest.raises(DataError, match=r"a\.npz") as caught:
            load(path, holdout=0)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert not isinstance(caught.value.__cause__, MemoryError) or "brackets" in name


@pytest.mark.parametrize("field", ["stored", "declared"])
def test_npz_sizes_that_contradict_each_other(tmp_path: Path, field: str) -> None:
    """The declared size is what numpy may allocate, so deflate has to be able to give it."""
    path = npz(tmp_path / "a.npz", images=npy("|u1", (3, 1 << 14, 1 << 14), bytes(100)))
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02") + (20 if field == "stored" else 24)
    data[at : at + 4] = struct.pack("<I", 3 << 29)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"'images' cannot be read \(.* compressed bytes"):
        load(path)


def test_npz_of_another_compression_is_refused(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with pytest.raises(DataError, match=r"compression is .*savez_compressed"):
            load(npz(tmp_path / "a.npz", method))


def test_npz_arrays_that_compress_well_are_read(tmp_path: Path) -> None:
    images = np.zeros((4, 1024, 1024, 3), np.uint8)  # deflate's best, a ratio of 1,030
    images[np.arange(4), 0, 0, 0] = np.arange(4)
    np.savez_compressed(tmp_path / "a.npz", images=images, labels=np.arange(4))
    assert (tmp_path / "a.npz").stat().st_size < 14_000
    got = load(tmp_path / "a.npz", holdout=0).images  # type: ignore[attr-defined]
    np.testing.assert_array_equal(got.permute(0, 2, 3, 1).numpy(), images)


@pytest.mark.parametrize(
    "entries",
    [
        {"labels": npy(">i4", (3,), np.array([0, 1, 0], ">i4").tobytes())},
        {"labels": npy("<u2", (3, 1), np.array([0, 1, 0], "<u2").tobytes(), fortran=True)},
        {"labels": LABELS.replace(b"NUMPY\x01\x00", b"NUMPY\x03\x00").replace(b"{", b"\0\0{", 1)},
        {"images": npy("|u1", (3, 8, 8, 3), np.asfortranarray(pixels(3)).tobytes("A"),
                       fortran=True)},
        {"images": IMAGES + b"more"},
    ],
)  # fmt: skip
def test_npz_arrays_of_any_order_are_read(tmp_path: Path, entries: dict[str, bytes]) -> None:
    data = load(npz(tmp_path / "a.npz", zipfile.ZIP_STORED, **entries), holdout=0)
    assert data.labels.tolist() == [0, 1, 0]
    np.testing.assert_array_equal(data.images.permute(0, 2, 3, 1).numpy(), pixels(3))  # type: ignore[attr-defined]


def stored_npz() -> bytes:
    buffer = io.BytesIO()
    names = np.array(["a", "b\u00e9"])
    np.savez(buffer, images=pixels(5, size=4), labels=np.arange(5) % 2, class_names=names)
    return buffer.getvalue()


def stored_parquet(tmp_path: Path) -> bytes:
    pytest.importorskip("pyarrow")
    rows: list[bytes | None] = [encoded(image) for image in pixels(7, size=4)]
    options = {"class_names": ["a", "b"], "row_group_size": 3}
    path = write_parquet(tmp_path / "whole", rows, [0, 1, 0, 1, 0, 1, 0], **options)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_a_damaged_file_is_read_or_named(tmp_path: Path, suffix: str) -> None:
    """Nothing but a DataError that names the file escapes."""
    data = stored_npz() if suffix == "npz" else stored_parquet(tmp_path)
    path, draw = tmp_path / f"a.{suffix}", random.Random(suffix)
    errors = []
    for _ in range(400):
        path.write_bytes(damaged(data, draw))
        with warnings.catch_warnings(), deadline():
            warnings.simplefilter("ignore")
            try:
                assert 0 < len(load(path, holdout=0, image_size=4)) <= 7
            except DataError as error:
                errors.append(str(error))
    assert len(errors) > 100
    assert all(path.name in message and "\n" not in message for message in errors)


@pytest.mark.parametrize(
    "metadata",
    [
        *(b"[" * 100_000, b'{"info":' * 100_000, b"null", b"[]", b"1", b'"info"', b"{}", b""),
        *(b'{"info": null}', b'{"info": []}', b'{"info": {"features": []}}', b"1" * 5000),
        *(b'{"info": {"features": {"label": null}}}', b'{"info": {"features": {"label": 1}}}'),
    ],
    ids=lambda metadata: str(metadata[:40]),
)
def test_odd_metadata_of_a_parquet_give_no_class_names(tmp_path: Path, metadata: bytes) -> None:
    with deadline():
        assert load(with_metadata(tmp_path, metadata)).class_names == ("0", "1")


@pytest.mark.parametrize("names", [None, "ab", 2, [], {"a": "b"}, [None, None], [["a"], ["b"]]])
def test_odd_names_in_the_metadata_of_a_parquet_give_none(tmp_path: Path, names: object) -> None:
    metadata = json.dumps({"info": {"features": {"label": {"names": names}}}}).encode()
    assert load(with_metadata(tmp_path, metadata)).class_names == ("0", "1")


def test_numbers_in_the_metadata_of_a_parquet_are_names(tmp_path: Path) -> None:
    metadata = json.dumps({"info": {"features": {"label": {"names": [7, "b"]}}}}).encode()
    assert load(with_metadata(tmp_path, metadata)).class_names == ("7", "b")


def with_metadata(tmp_path: Path, metadata: bytes) -> Path:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"image": [encoded(image) for image in pixels(3)], "label": [0, 1, 0]})
    table = table.replace_schema_metadata({b"huggingface": metadata})
    parquet.write_table(table, tmp_path / "train.parquet")
    return tmp_path


def i64(number: int) -> bytes:
    """The next field of a structure, an integer, in thrift's compact protocol."""
    number, out = (number << 1 ^ number >> 63) & (1 << 64) - 1, b"\x16"
    while number > 0x7F:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


# The counts in the footer of a file of 7 rows in groups of 3, 3 and 1, each with what follows it.
COUNTS = {"file": (7, b"\x19"), "group": (3, b"&"), "column": (3, b"\x16")}


def with_counts(data: bytes, **counts: int) -> bytes:
    """The file `stored_parquet` with other counts of its rows."""
    size = int.from_bytes(data[-8:-4], "little") + 8
    body, footer = data[:-size], data[-size:-8]
    for place, count in counts.items():
        old, end = COUNTS[place]
        assert i64(old) + end in footer
        footer = footer.replace(i64(old) + end, i64(count) + end)
    return body + footer + struct.pack("<I", len(footer)) + data[-4:]


@pytest.mark.parametrize("count", [-1, 0, 2, 8, 1 << 20, 1 << 40, (1 << 63) - 1])
@pytest.mark.parametrize("place", COUNTS)
def test_counts_of_a_parquet_that_contradict_each_other(
    tmp_path: Path, place: str, count: int
) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(with_counts(stored_parquet(tmp_path), **{place: count}))
    with deadline():
        if place == "column":  # pyarrow may do without
            with contextlib.suppress(DataError):
                assert load(path, holdout=0).labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
            return
        with pytest.raises(DataError, match=r"a\.parquet"):
            load(path, holdout=0)


@pytest.mark.parametrize("count", [1 << 20, 1 << 40, (1 << 62) - 1])
def test_more_rows_of_a_parquet_than_bytes(tmp_path: Path, count: int) -> None:
    """The counts agree; the reader would trust them, until memory is full."""
    path, total = tmp_path / "a.parquet", 2 * count + 1
    data = stored_parquet(tmp_path)
    path.write_bytes(with_counts(data, file=total, group=count, column=count))
    with deadline(), pytest.raises(DataError, match=rf"a\.parquet.*{total:,} rows of images in"):
        load(path, holdout=0)
