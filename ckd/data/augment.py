"""Augmentation of whole batches, on whichever device the images lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ckd.data.dataset import DataError


@dataclass(frozen=True)
class Augment:
    """Random crop from a zero-padded image, and random horizontal flip, drawn per image.

    Called with images uint8 [B, C, H, W] and a generator on their device, returns uint8 of the
    same shape. With `crop_padding` p every one of the (2p + 1)^2 shifts is equally likely.
    """

    crop_padding: int = 0
    flip: bool = True

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise DataError(f"crop_padding must be 0 or more, got {self.crop_padding}")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise DataError(
                f"images must be a uint8 tensor [B, C, H, W], "
                f"got {images.dtype} of shape {tuple(images.shape)}"
            )
        if generator.device.type != images.device.type:
            raise DataError(
                f"images are on {images.device}, the generator on {generator.device}; "
                f"make it with step_generator(seed, step, {str(images.device)!r})"
            )
        (batch, _, height, width), device = images.shape, images.device
        rows = torch.arange(height, device=device).expand(batch, height)
        columns = torch.arange(width, device=device).expand(batch, width)
        if self.flip:
            flipped = torch.rand(batch, 1, generator=generator, device=device) < 0.5
            columns = torch.where(flipped, columns.flip(1), columns)
        if padding := self.crop_padding:
            shift = torch.randint(
                2 * padding + 1, (2, batch, 1), generator=generator, device=device
            )
            images = F.pad(images, (padding,) * 4)
            rows, columns = rows + shift[0], columns + shift[1]
        # Two gathers along one axis each read the batch in order: several times faster on the
        # CPU than one gather with four index arrays.
        images = _take(images, rows[:, None, :, None], dim=2)
        return _take(images, columns[:, None, None, :], dim=3)


def _take(images: Tensor, index: Tensor, dim: int) -> Tensor:
    shape = list(images.shape)
    shape[dim] = index.shape[dim]
    return images.gather(dim, index.expand(shape))
