"""Photographs whose metadata are odd, and damaged files of every format."""

from __future__ import annotations

import io
import random
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ckd.bank import __main__ as bank
from ckd.data import DataError, load, photo
from ckd.data.decode import EncodedImages, decode
from ckd.train import __main__ as train
from tests.image_files import encoded, pixels, write_parquet

ORIENTATION, X_RESOLUTION, EXIF_FOLDER = 0x0112, 0x011A, 0x8769
PICTURE = Image.fromarray(pixels(1, size=16)[0]).resize((24, 16))  # wider than high


class One(EncodedImages):
    """A single encoded image."""

    labels = sample_ids = torch.zeros(1, dtype=torch.int64)
    class_names = ("a",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, position: int) -> bytes:
        return self._data

    def where(self, position: int) -> str:
        return "photo.jpg"

    def sizes_bytes(self) -> list[int]:
        return [len(self._data)]


def upright(data: bytes) -> np.ndarray:
    return decode(One(data), 0, None).transpose(1, 2, 0)


def saved(kind: str, image: Image.Image = PICTURE, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(image: np.ndarray, orientation: object) -> np.ndarray:
    """The image as EXIF defines its orientation: where the stored first row and column belong."""
    rows, columns = image[::-1], image[:, ::-1]
    return {
        2: columns,
        3: rows[:, ::-1],
        4: rows,
        5: image.transpose(1, 0, 2),
        6: rows.transpose(1, 0, 2),
        7: rows[:, ::-1].transpose(1, 0, 2),
        8: columns.transpose(1, 0, 2),
    }.get(orientation, image)  # type: ignore[call-overload]


def tags(*entries: tuple[int, int, int, bytes]) -> bytes:
    """A little-endian EXIF block of entries (tag, type, count, four bytes)."""
    packed = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + bytes(4)


def with_exif(kind: str, exif: bytes, xmp: bytes | None = None) -> bytes:
    """PICTURE without a resolution of its own, which would keep Pillow from reading EXIF's."""
    if kind == "JPEG":
        plain = saved("JPEG", quality=95)
        parts = [b"Exif\0\0" + exif] + ([b"http://ns.adobe.com/xap/1.0/\0" + xmp] if xmp else [])
        head = b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part for part in parts)
        return plain[:2] + head + plain[20:]
    if kind == "PNG":
        plain, chunks = saved("PNG"), [(b"eXIf", exif)]
        if xmp:
            chunks.append((b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + xmp))
        head = b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks
        )
        return plain[:33] + head + plain[33:]
    return saved("WEBP", lossless=True, exif=exif, **({"xmp": xmp} if xmp else {}))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_all_orientations_as_exif_defines_them(kind: str) -> None:
    options: dict[str, object] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {})
    stored = np.asarray(Image.open(io.BytesIO(saved(kind, **options))))
    for orientation in range(10):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        data = saved(kind, exif=exif, **options)
        np.testing.assert_array_equal(upright(data), turned(stored, orientation))
        if kind != "TIFF":  # Pillow 10.0 turns it twice
            expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
            np.testing.assert_array_equal(upright(data), np.asarray(expected))


SIX = (ORIENTATION, 3, 1, b"\x06\0\0\0")
ODD = {
    "resolution of bytes": (tags(SIX, (X_RESOLUTION, 1, 1, b"\x48\0\0\0")), 6),
    "zero denominator": (tags(SIX, (X_RESOLUTION, 5, 1, b"\x26\0\0\0"))[:-4] + bytes(12), 6),
    "offset beyond the end": (tags(SIX, (X_RESOLUTION, 5, 1, b"\xff\xff\0\0")), 6),
    "folder of tags beyond the end": (tags(SIX, (EXIF_FOLDER, 4, 1, b"\xff\xff\0\0")), 6),
    "folder of tags that is text": (tags(SIX, (EXIF_FOLDER, 2, 3, b"abc\0")), 6),
    "unknown type": (tags(SIX, (X_RESOLUTION, 99, 1, bytes(4))), 6),
    "huge count": (tags(SIX, (X_RESOLUTION, 12, 2**31, bytes(4))), 6),
    "orientation as a long": (tags((ORIENTATION, 4, 1, b"\x06\0\0\0")), 6),
    "orientation as text": (tags((ORIENTATION, 2, 2, b"6\0\0\0")), None),
    "two orientations": (tags((ORIENTATION, 3, 2, b"\x06\0\x03\0")), 6),
    "orientation of 0": (tags((ORIENTATION, 3, 1, bytes(4))), None),
    "cut short": (tags(SIX)[:5], None),
    "empty": (b"", None),
    "no EXIF at all": (b"a text of another program", None),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", ODD)
def test_odd_exif_leaves_the_photograph_readable(kind: str, name: str) -> None:
    exif, orientation = ODD[name]
    plain = upright(with_exif(kind, tags()))
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        got = upright(with_exif(kind, exif, xmp=b"\xff\xfe not UTF-8 \xe9"))
    np.testing.assert_array_equal(got, turned(plain, orientation))


def test_orientation_of_xmp_counts_where_pillow_reads_it() -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        data = with_exif(kind, tags(), xmp=b'<x tiff:Orientation="6"/>')
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(upright(data), np.asarray(expected))


def test_random_metadata_leave_the_photograph_readable() -> None:
    draw = random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in ("JPEG", "PNG", "WEBP"):
            plain = upright(with_exif(kind, tags()))
            possible = {turned(plain, orientation).tobytes() for orientation in range(9)}
            for _ in range(150):
                names = draw.sample([ORIENTATION, X_RESOLUTION, 0x0128, 0x8825, EXIF_FOLDER], 3)
                exif = tags(*((tag, draw.randrange(14), draw.choice([0, 1, 2, 100, 2**31]),
                               draw.randbytes(4)) for tag in names))  # fmt: skip
                data = with_exif(kind, exif[: draw.choice([len(exif), 30, 7])])
                assert upright(data).tobytes() in possible


def test_large_text_beside_the_pixels_of_a_png() -> None:
    # More than Pillow decompresses; editors store such histories.
    text = b"history\0\0" + zlib.compress(bytes(4 << 20))
    plain = saved("PNG")
    chunk = (
        struct.pack(">I", len(text))
        + b"zTXt"
        + text
        + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    )
    data = plain[:33] + chunk + plain[33:]
    with pytest.raises(ValueError, match=r"(?i)too large"):
        Image.open(io.BytesIO(data)).load()
    np.testing.assert_array_equal(upright(data), np.asarray(PICTURE))
    with pytest.raises(DataError, match="24 x 16 pixels are more than 383"):
        photo.read(data, max_pixels=383)  # decoded without its metadata


MAKE, XMP, GPS_FOLDER = 271, 700, 0x8825


@pytest.mark.parametrize(
    "odd",
    [
        (XMP, 3, 1, b"\x06\0\0\0"),
        (XMP, 2, 4, b"abc\0"),
        (XMP, 3, 2, b"\x06\0\x06\0"),
        (GPS_FOLDER, 4, 1, b"\xff\xff\xff\xff"),
        (GPS_FOLDER, 2, 4, b"abc\0"),
        (X_RESOLUTION, 1, 1, b"\x48\0\0\0"),
        (MAKE, 2, 100, b"\xff\xff\0\0"),
    ],
)
def test_odd_tags_leave_a_tiff_file_readable(odd: tuple[int, int, int, bytes]) -> None:
    stored = np.asarray(PICTURE)
    head = struct.pack("<4sI", b"II*\0", 8 + stored.nbytes) + stored.tobytes()
    needed = {256: 24, 257: 16, 258: 8, 259: 1, 262: 2, 273: 8, 277: 3, 278: 16, 279: stored.nbytes}
    for orientation in (1, 6):
        values = needed | {ORIENTATION: orientation}
        entries = [(tag, 4, 1, struct.pack("<I", value)) for tag, value in values.items()]
        data = head + tags(*sorted([*entries, odd]))[8:]
        np.testing.assert_array_equal(upright(data), turned(stored, orientation))


def test_odd_metadata_print_no_warnings(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("1", "2"):
        exif = tags(SIX, (X_RESOLUTION, 5, 1, b"\xff\xff\0\0"))
        (tmp_path / "a" / f"{name}.jpg").write_bytes(with_exif("JPEG", exif) + name.encode())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("default", message=".*copies")
        assert load(tmp_path, holdout=0).image_shape == (3, 24, 16)


PALETTE = PICTURE.convert("P")
ANIMATED = {"save_all": True, "append_images": [PALETTE.rotate(180)]}
FILES = {
    "jpeg": saved("JPEG", exif=b"Exif\0\0" + tags(SIX)),
    "jpeg progressive": saved("JPEG", progressive=True),
    "jpeg CMYK": saved("JPEG", PICTURE.convert("CMYK")),
    "png": saved("PNG", exif=b"Exif\0\0" + tags(SIX)),
    "png palette": saved("PNG", PALETTE, transparency=bytes(range(256))),
    "webp": saved("WEBP", exif=b"Exif\0\0" + tags(SIX)),
    "webp animated": saved("WEBP", **ANIMATED),
    "gif": saved("GIF", PALETTE, **ANIMATED),
    "bmp": saved("BMP"),
    "tiff": saved("TIFF"),
    "tiff lzw": saved("TIFF", compression="tiff_lzw"),
    "ppm": saved("PPM"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_format_are_read(name: str) -> None:
    assert upright(FILES[name]).shape[2] == 3


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_decoded_or_named(name: str) -> None:
    """Nothing but a DataError escapes; most damage is at the head, where the structure is."""
    draw, decoded, named = random.Random(name), 0, 0
    for _ in range(300):
        data = bytearray(FILES[name])
        end = draw.choice([60, 200, len(data)])
        at = draw.randrange(min(end, len(data)))
        kind = draw.choice(["bytes", "bytes", "bits", "cut", "lost", "more"])
        if kind == "bytes":
            data[at : at + draw.choice([1, 2, 4, 32])] = draw.randbytes(draw.choice([1, 2, 4, 32]))
        elif kind == "bits":
            data[at] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del data[at:]
        elif kind == "lost":
            del data[at : at + draw.randrange(1, 9)]
        else:
            data[at:at] = draw.randbytes(draw.randrange(1, 9))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert decode(One(bytes(data)), 0, 8).shape == (3, 8, 8)
                decoded += 1
            except DataError as error:
                named += "photo.jpg" in str(error)
    assert decoded + named == 300
    assert named > 0


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_counted_before_they_are_decoded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Image.open(io.BytesIO(FILES[name])) as image:
        kind, (width, height) = type(image), image.size
    assert photo.read(FILES[name], max_pixels=width * height).size in ((24, 16), (16, 24))
    monkeypatch.setattr(kind, "load", lambda image: pytest.fail("pixels were decoded"))
    with pytest.raises(DataError, match=rf"{width} x {height} .* 383; .*--max-image-pixels"):
        photo.read(FILES[name], max_pixels=383)


def huge_png() -> bytes:
    """30000 x 30000 pixels, as Pillow's own limit refuses them."""
    head = b"IHDR" + struct.pack(">II", 30000, 30000) + bytes((8, 2, 0, 0, 0))
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return FILES["png"][:8] + chunk + FILES["png"][33:]


def tiff_with_a_tile(side: int) -> bytes:
    """8 x 8 pixels in one compressed tile of `side` x `side`."""
    data = zlib.compress(bytes(side * side))
    sizes = {256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side}
    entries = sizes | {324: 8 + 2 + 12 * 10 + 4, 325: len(data)}
    packed = (struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 10) + b"".join(packed) + bytes(4) + data


# In a GIF file a frame may be larger than the canvas that the file's head declares.
WIDE_GIF = b"GIF89a\x01\0\x01\0\0\0\0,\0\0\0\0\x30\x75\x30\x75\0\x02\0;"
BOMBS = {
    "png": huge_png(),
    "ppm": b"P6 30000 30000 255\n",
    "pgm of text": b"P2 30000 30000 255\n",
    "bmp": FILES["bmp"][:18] + struct.pack("<ii", 30000, -30000) + FILES["bmp"][26:],
    "gif": WIDE_GIF,
    "jpeg": re.sub(
        rb"(\xff\xc0...)....",
        rb"\1" + struct.pack(">HH", 30000, 30000),
        FILES["jpeg"],
        flags=re.DOTALL,
    ),
    "tile of a tiff": tiff_with_a_tile(16384),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_with_many_pixels_is_refused(name: str) -> None:
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(DataError, match=r"photo\.jpg: \d+ x \d+ pixels are more than 67,108,864"):
        upright(BOMBS[name])
    assert before == Image.MAX_IMAGE_PIXELS
    if name == "tile of a tiff":
        small = photo.read(BOMBS[name], max_pixels=1 << 28)
        assert (small.size, small.getextrema()) == ((8, 8), ((0, 0),) * 3)


def test_a_tile_larger_than_its_tiff_file_is_read() -> None:
    assert upright(tiff_with_a_tile(64)).shape == (8, 8, 3)


@pytest.mark.parametrize("limit", [100, 300])  # Pillow raises above twice its limit, and warns
@pytest.mark.parametrize("name", FILES)
def test_pillows_limit_gives_way(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = upright(FILES[name])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        np.testing.assert_array_equal(upright(FILES[name]), expected)
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("storage", ["folder", "parquet"])
def test_the_limit_holds_wherever_images_are_decoded(
    tmp_path: Path, storage: str, workers: int
) -> None:
    files = [encoded(image) for image in pixels(6)] + [saved("PNG")]
    if storage == "parquet":
        pytest.importorskip("pyarrow")
        write_parquet(tmp_path / "train.parquet", files, [0] * 7)
    else:
        (tmp_path / "train" / "a").mkdir(parents=True)
        for i, data in enumerate(files):
            (tmp_path / "train" / "a" / f"{i}.png").write_bytes(data)
    where = "train.parquet, row 6" if storage == "parquet" else r"6\.png"
    message = rf"{where}: 24 x 16 pixels are more than 383; .*max_pixels \(--max-image-pixels\)"
    options = {"image_size": 8, "max_pixels": 383}
    with pytest.raises(DataError, match=message):
        load(tmp_path, **options)
    stream = load(tmp_path, memory_limit=0, **options)
    with pytest.raises(DataError, match=message):
        list(stream.batches(torch.arange(7), 3, workers=workers))
    assert len(load(tmp_path, **options | {"max_pixels": 384})) == 7


@pytest.mark.parametrize("command", ["train", "evaluate", "build"])
def test_the_limit_is_a_flag(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test"):
        (tmp_path / "set" / split / "a").mkdir(parents=True)
        (tmp_path / "set" / split / "a" / "1.png").write_bytes(saved("PNG"))
    flags = ["--data", str(tmp_path / "set"), "--max-image-pixels", "383", "--device", "cpu"]
    flags += ["--out", str(tmp_path / "out")]
    if command == "build":
        status = bank.main(["build", "--teacher", "resnet20", *flags])
    else:
        what = ["--eval", "resnet20"] if command == "evaluate" else ["--method", "plain"]
        status = train.main([*flags, *what])
    assert status != 0
    error = capsys.readouterr().err
    assert "1.png: 24 x 16 pixels are more than 383" in error
    assert "--max-image-pixels" in error
