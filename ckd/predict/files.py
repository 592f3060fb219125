"""The image files that a command line names, decoded a batch at a time."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ckd._errors import ConfigError
from ckd._fit import fit
from ckd.data import DataError, photo, walk
from ckd.data.decode import decode
from ckd.data.folder import SUFFIXES, FolderImages


class Decoded(NamedTuple):
    """`paths` and their `pixels`, uint8 [n, C, S, S]; `failed`: paths that are no images, and why.

    Both are in the order of the files.
    """

    paths: list[str]
    pixels: Tensor
    failed: list[tuple[str, str]]


def image_files(named: Sequence[Path]) -> list[str]:
    """The files that are named, whatever they are, and the image files below the folders that are.

    In the order of `named`, those of a folder sorted; which files of a folder are images and which
    folders are passed over is as for `--data`. Raises ConfigError for a path without a file and for
    a folder without images.
    """
    found: list[str] = []
    for path in named:
        if path.is_dir():
            inside = sorted(file for file in walk.files(path) if file.suffix.lower() in SUFFIXES)
            if not inside:
                raise ConfigError(
                    f"{path} holds no images ({', '.join(sorted(SUFFIXES))}); name another folder"
                )
            found += map(str, inside)
        elif path.exists():
            found.append(str(path))
        else:
            raise ConfigError(f"{path}: there is no such file or folder; check the path")
    return found


def decoded(
    paths: Sequence[str], image_size: int, channels: int, batch_size: int, max_pixels: int
) -> Iterator[Decoded]:
    """The images as `Student.preprocess` takes them: their centre squares of `image_size`, RGB or,
    for one channel, gray.

    At most two batches are in memory, beside an image for each thread that decodes: the next batch
    is decoded while the caller works on one.
    """
    nothing = torch.full((len(paths),), -1)
    source = FolderImages(Path(), paths, nothing, torch.arange(len(paths)), ())
    source.max_pixels = max_pixels

    def read(position: int) -> np.ndarray | str:
        try:
            if channels != 1:
                return decode(source, position, image_size)
            whole = Image.fromarray(decode(source, position, None).transpose(1, 2, 0))
            return np.asarray(fit(whole.convert("L"), image_size))[None]
        except DataError as error:
            return str(error)

    pending: deque[Future[np.ndarray | str]] = deque()
    pool = ThreadPoolExecutor(os.cpu_count() or 1)  # Pillow decodes without holding the GIL
    submitted = 0
    try:
        with warnings.catch_warnings():
            photo.ignore_warnings()
            for start in range(0, len(paths), batch_size):
                while submitted < min(start + 2 * batch_size, len(paths)):
                    pending.append(pool.submit(read, submitted))
                    submitted += 1
                batch = paths[start : start + batch_size]
                results = [pending.popleft().result() for _ in batch]
                yield _batch(batch, results, (channels, image_size, image_size))
    finally:
        pool.shutdown(cancel_futures=True)


def _batch(
    paths: Sequence[str], results: Sequence[np.ndarray | str], shape: tuple[int, int, int]
) -> Decoded:
    pairs = list(zip(paths, results))
    good = [(path, result) for path, result in pairs if not isinstance(result, str)]
    pixels = np.stack([result for _, result in good]) if good else np.empty((0, *shape), np.uint8)
    return Decoded(
        [path for path, _ in good],
        torch.from_numpy(pixels),
        [(path, result) for path, result in pairs if isinstance(result, str)],
    )
