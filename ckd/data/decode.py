"""Decodes images (PNG, JPEG, WebP, ...) to uint8 arrays, on several threads."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import xxhash
from PIL import UnidentifiedImageError
from torch import Tensor

from ckd._console import bar
from ckd._files import LFS_POINTER, is_lfs_pointer
from ckd._fit import fit
from ckd.data import photo
from ckd.data.dataset import DataError, fingerprint_of, warn_of_copies

_CHUNK = 256  # images per task of the thread pool: enough to amortise the cost of a task
FINGERPRINT_BYTES = 2 << 30  # hashed in full up to this size, which takes seconds to read


class EncodedImages(ABC):
    """Encoded images with their labels; one subclass per storage format."""

    labels: Tensor
    sample_ids: Tensor
    class_names: tuple[str, ...]
    max_pixels: int = photo.MAX_PIXELS
    """Larger images are refused."""
    held_out: bool = False
    """As in Dataset."""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, position: int) -> bytes | memoryview:
        """The encoded bytes of one image; safe to call from several threads and processes."""

    @abstractmethod
    def where(self, position: int) -> str:
        """The file (and row) of one image, for messages."""

    @abstractmethod
    def sizes_bytes(self) -> list[int]:
        """The bytes of each encoded image, or of each group of images; no image is read."""

    def fingerprint(self) -> str:
        """Hash of labels, sample ids, class names, and the encoded images; warns of copies.

        Computed before decoding, so it does not depend on `image_size` or on where pixels are kept.
        If the images exceed 2 GiB encoded, their sizes are hashed in place of their bytes.
        """
        digest = fingerprint_of(self.labels, self.sample_ids, self.class_names)
        sizes = self.sizes_bytes()
        if sum(sizes) <= FINGERPRINT_BYTES:
            with bar("hashing", total=len(self), unit="images") as done:
                digests = []
                for position in range(len(self)):
                    digests.append(xxhash.xxh3_128_digest(self.read(position)))
                    done.update()
            images = b"".join(digests)
            warn_of_copies(images, self.where)
            digest.update(images)
        else:
            digest.update(np.array(sizes, dtype="<i8").tobytes())
        return digest.hexdigest()


def decode(source: EncodedImages, position: int, image_size: int | None) -> np.ndarray:
    """One image as uint8 [3, H, W] (a view), turned as EXIF says, at its own size or image_size^2.

    Raises DataError that names the image if it cannot be read.
    """
    encoded = source.read(position)
    try:
        image = photo.read(encoded, source.max_pixels)
        pixels = np.asarray(image if image_size is None else fit(image, image_size))
    except DataError as error:
        raise DataError(f"{source.where(position)}: {error}") from None
    except photo.DAMAGE as error:
        if is_lfs_pointer(bytes(encoded[:64])):
            reason = LFS_POINTER
        elif isinstance(error, UnidentifiedImageError):  # its message is an address in memory
            reason = f"it is in none of the formats {', '.join(photo.FORMATS)}"
        else:
            reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{source.where(position)}: cannot be read as an image ({reason}); replace or remove it"
        ) from error
    return pixels.transpose(2, 0, 1)


def decode_many(
    source: EncodedImages,
    positions: Tensor,
    image_size: int | None,
    shape: tuple[int, int, int],
    *,
    threads: int | None = None,
    decoded: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """Images at `positions` as uint8 [n, C, H, W], decoded on `threads` threads (default: cores).

    decoded: called, by each thread, with the number of further images that are decoded.

    Raises DataError for an unreadable image, or one of another size than `shape`: for the first
    in order, if there are several.
    """
    out = torch.empty((len(positions), *shape), dtype=torch.uint8)
    rows, array = positions.tolist(), out.numpy()

    def work(start: int) -> None:
        for i in range(start, min(start + _CHUNK, len(rows))):
            pixels = decode(source, rows[i], image_size)
            if pixels.shape != shape:
                raise DataError(
                    f"{source.where(rows[i])} is {pixels.shape[1]} x {pixels.shape[2]} pixels "
                    f"(height x width), others are {shape[1]} x {shape[2]}; "
                    "pass image_size (--image-size) to bring all to one size"
                )
            array[i] = pixels
            decoded(1)

    starts = range(0, len(rows), _CHUNK)
    threads = min(threads or os.cpu_count() or 1, len(starts))
    if threads <= 1:
        for start in starts:
            work(start)
        return out
    with ThreadPoolExecutor(threads) as pool:  # Pillow decodes without holding the GIL
        futures = [pool.submit(work, start) for start in starts]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
    return out
