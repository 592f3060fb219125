"""Brings images to one square size, in data sets and for students that were trained on them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def fit(image: Image.Image, size: int) -> Image.Image:
    """The centre square, scaled to `size` (bicubic, antialiased)."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    # Crops and scales in one step: scaling a long thin image first would make it huge.
    square = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=square)


def fitted(images: Tensor, size: int) -> Tensor:
    """uint8 [N, C, H, W] on the CPU -> [N, C, size, size]: each channel as `fit` brings it there.

    Images of that size are returned themselves.
    """
    if tuple(images.shape[2:]) == (size, size):
        return images
    out = torch.empty((*images.shape[:2], size, size), dtype=torch.uint8)
    for source, target in zip(images.flatten(0, 1), out.flatten(0, 1)):
        target.copy_(torch.from_numpy(np.array(fit(Image.fromarray(source.numpy()), size))))
    return out
