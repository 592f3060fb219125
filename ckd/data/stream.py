"""Images that are decoded on demand, for data sets larger than memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils import data

from ckd.data import photo
from ckd.data.dataset import Batch, DataError, Dataset, check_rows
from ckd.data.decode import EncodedImages, decode, decode_many


class FileImages(Dataset):
    """Encoded images, decoded by DataLoader workers batch by batch.

    Serves the same batches as MemoryImages for the same order.
    """

    def __init__(
        self, source: EncodedImages, *, name: str, split: str, image_size: int | None
    ) -> None:
        check_rows(source.labels, source.sample_ids, source.class_names, len(source), name)
        self.name, self.split, self.class_names = name, split, source.class_names
        self.labels, self.sample_ids = source.labels, source.sample_ids
        self.held_out = source.held_out
        channels, height, width = decode(source, 0, image_size).shape
        self.image_shape = (channels, height, width)
        self.fingerprint = source.fingerprint()
        self._source, self._image_size = source, image_size

    def _batches(
        self, groups: Sequence[Tensor], device: torch.device, workers: int
    ) -> Iterator[Batch]:
        # Without workers this process decodes with a thread per core; each worker uses one thread.
        decoder = _Decoder(
            self._source, self._image_size, self.image_shape, threads=1 if workers else None
        )
        loader = data.DataLoader(
            decoder,
            sampler=groups,
            batch_size=None,
            num_workers=workers,
            worker_init_fn=_start_worker if workers else None,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else DataLoader draws from the default generator
        )
        for positions, images in zip(groups, loader):
            if isinstance(images, DataError):
                raise images
            yield Batch(
                images.to(device, non_blocking=True),
                self.labels[positions].to(device),
                self.sample_ids[positions].to(device),
            )

    def to(self, device: str | torch.device) -> FileImages:
        return self


def _start_worker(_number: int) -> None:
    # The threads of a parallel region do not survive a fork: libgomp would wait for them for ever.
    torch.set_num_threads(1)
    photo.ignore_warnings()


class _Decoder(data.Dataset):
    """Maps the positions of a batch to its images. A DataError is returned, not raised: DataLoader
    would wrap it in a worker's traceback."""

    def __init__(
        self,
        source: EncodedImages,
        image_size: int | None,
        shape: tuple[int, int, int],
        threads: int | None,
    ) -> None:
        self._source, self._image_size, self._shape = source, image_size, shape
        self._threads = threads

    def __getitem__(self, positions: Tensor) -> Tensor | DataError:
        try:
            return decode_many(
                self._source, positions, self._image_size, self._shape, threads=self._threads
            )
        except DataError as error:
            return error
