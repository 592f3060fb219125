"""One encoded image as Pillow reads it: upright and RGB, whatever its metadata hold."""

from __future__ import annotations

import io
import math
import struct
import threading
import warnings
import zlib
from typing import Any

from PIL import Image, TiffImagePlugin

from ckd.data.dataset import DataError

# What Pillow's readers raise on damaged files. They index, unpack and divide unchecked values, so
# nearly every error of Python's occurs.
DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
MAX_PIXELS = 1 << 26  # 256 MiB as Pillow holds them; a photograph of 64 megapixels fits
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_BOMB_LOCK = threading.Lock()
# Without this list Pillow tries dozens of readers in turn: half the time of a small image.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_ORIENTATION = 0x0112  # EXIF tag
_TILE_SIDES = (322, 323)  # TIFF tags
_TIFF_ORDER = {b"II*\0": "<", b"MM\0*": ">"}
# Baseline: sizes, bits, compression, colours, orientation, strips. Then: planes, fax options,
# predictor, colour map, tiles, extra samples, sample format, JPEG tables, YCbCr.
_PIXEL_TAGS = frozenset((*range(254, 260), 262, 266, 273, _ORIENTATION, 277, 278, 279)) | {
    *(284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 338, 339, 347, 529, 530, 531, 532)
}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read(encoded: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The pixels as RGB, turned as ImageOps.exif_transpose turns them.

    Metadata that Pillow cannot read are passed over: the orientation alone is used. Raises one of
    DAMAGE for pixels that cannot be read, DataError for more than 8 bits per channel, and, before
    a pixel is decoded, for more than `max_pixels`.
    """
    try:
        return _read_either(encoded, max_pixels)
    except _BOMB:
        # Pillow has a limit of its own, for the whole process: lifted while `max_pixels` decides.
        with _BOMB_LOCK:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                return _read_either(encoded, max_pixels)
            finally:
                Image.MAX_IMAGE_PIXELS = limit


def max_bytes(max_pixels: int) -> int:
    """The most bytes of an image file: 16-bit RGBA without compression, and metadata."""
    return 8 * max_pixels + (64 << 20)


def ignore_warnings() -> None:
    """Ignore Pillow's warnings in this process: odd metadata, which come for every image, and its
    own limit of pixels."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def _read_either(encoded: bytes | memoryview, max_pixels: int) -> Image.Image:
    """The image, with or without its metadata."""
    try:
        return _read(encoded, max_pixels)
    except DataError:
        raise
    except DAMAGE as error:
        refused = error  # says more than that of the second try
    try:
        bare, exif = _without_metadata(bytes(encoded))
        if bare is not None:
            return _read(bare, max_pixels, exif)
    except DataError:
        raise
    except DAMAGE:
        pass
    raise refused


def _read(encoded: bytes | memoryview, max_pixels: int, exif: bytes | None = None) -> Image.Image:
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        width, height = _decoded_size(image)
        if width * height > max_pixels:
            raise DataError(
                f"{width} x {height} pixels are more than {max_pixels:,}; scale the image down, or "
                "raise the limit with max_pixels (--max-image-pixels)"
            )
        if image.mode.startswith(("I", "F")):
            raise DataError(
                f"pixels of mode {image.mode!r} do not fit 8 bits; convert the image to 8 bits per "
                "channel"
            )
        if exif is not None:
            image.info["exif"] = exif
        image.load()
        # Metadata may lie behind the pixels, so look after load(); TIFF files are turned by it.
        turn = None if image.format == "TIFF" else _turn(image)
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        return rgb if turn is None else rgb.transpose(turn)


def _decoded_size(image: Image.Image) -> tuple[int, int]:
    """The size of the image, or of the tiles of a TIFF file, which may be larger."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        wide, high = (image.tag_v2.get(tag) for tag in _TILE_SIDES)
        if isinstance(wide, int) and isinstance(high, int):
            return max(image.size, (wide, high), key=math.prod)
    return image.size


def _turn(image: Image.Image) -> Image.Transpose | None:
    # ImageOps.exif_transpose also writes all tags anew, less this one, and fails if one is odd.
    try:
        orientation: Any = image.getexif().get(_ORIENTATION)
        return _TURNS.get(orientation)
    except DAMAGE:
        return None


def _without_metadata(encoded: bytes) -> tuple[bytes | None, bytes | None]:
    """A JPEG, PNG or TIFF file less all that its pixels do not need, and the EXIF that was taken
    out; None for other formats."""
    if encoded.startswith(b"\xff\xd8"):
        parts, rest = _jpeg_parts(encoded)
        # APP0 and APP14 say how colours are stored.
        needless = {0xFE, *range(0xE1, 0xF0)} - {0xEE}
        found = [part[4:] for part in parts if part[4:10] == b"Exif\0\0"]
        kept = [part for part in parts if part[1] not in needless]
        return b"".join((encoded[:2], *kept, rest)), next(iter(found), None)
    if encoded.startswith(b"\x89PNG"):
        chunks = _png_chunks(encoded)
        found = [chunk[8:-4] for chunk in chunks if chunk[4:8] == b"eXIf"]
        # A capital letter marks the chunks that every reader needs.
        kept = [chunk for chunk in chunks if chunk[4:5].isupper() or chunk[4:8] == b"tRNS"]
        return b"".join((encoded[:8], *kept)), next(iter(found), None)
    if encoded[:4] in _TIFF_ORDER:
        return _tiff_of_pixels(encoded, _TIFF_ORDER[encoded[:4]]), None
    return None, None


def _jpeg_parts(encoded: bytes) -> tuple[list[bytes], bytes]:
    """The marker segments up to the first scan, and the rest."""
    parts, at = [], 2
    while encoded[at : at + 1] == b"\xff" and encoded[at + 1 : at + 2] not in (b"", b"\xda"):
        end = at + 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
        parts.append(encoded[at:end])
        at = end
    return parts, encoded[at:]


def _png_chunks(encoded: bytes) -> list[bytes]:
    chunks, at = [], 8
    while at < len(encoded):
        end = at + 12 + int.from_bytes(encoded[at : at + 4], "big")
        chunks.append(encoded[at:end])
        at = end
    return chunks


def _tiff_of_pixels(encoded: bytes, order: str) -> bytes:
    """The file with a new directory at its end: the entries that say how pixels are stored."""
    (start,) = struct.unpack_from(f"{order}I", encoded, 4)
    (count,) = struct.unpack_from(f"{order}H", encoded, start)
    entries = [encoded[at : at + 12] for at in range(start + 2, start + 2 + 12 * count, 12)]
    kept = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] in _PIXEL_TAGS]
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    return encoded[:4] + struct.pack(f"{order}I", len(encoded)) + encoded[8:] + directory
