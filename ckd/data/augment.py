"""Augmentation of whole batches, on the device of the images."""

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
    same shape: the images themselves if there is nothing to do. With `crop_padding` p every one of
    the (2p + 1)^2 shifts is equally likely.
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
        (batch, channels, height, width), device = images.shape, images.device
        if self.flip:
            flipped = torch.rand(batch, generator=generator, device=device) < 0.5
        if padding := self.crop_padding:
            shift = torch.randint(
                2 * padding + 1, (2, batch, 1), generator=generator, device=device
            )
            rows = shift[0] + torch.arange(height, device=device)
            columns = shift[1] + torch.arange(width, device=device)
            # Vertical shift by selecting whole rows, then horizontal shift by a gather: several
            # times faster on the CPU than one gather for both.
            images = F.pad(images, (padding,) * 4)
            tops = torch.arange(batch * channels, device=device) * images.shape[2]
            rows = tops.view(batch, channels, 1) + rows[:, None]
            images = images.flatten(0, 2).index_select(0, rows.flatten()).unflatten(0, rows.shape)
            images = images.gather(3, columns[:, None, None].expand(-1, channels, height, -1))
        if self.flip:
            # Selects whole images, not pixels: about 15 times faster.
            both = torch.cat([images, images.flip(3)])
            images = both.index_select(0, torch.arange(batch, device=device) + batch * flipped)
        return images
