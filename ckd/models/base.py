"""The interface of all models: images in, embedding and logits out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ckd.models.spec import ModelError, Spec


class ModelOutput(NamedTuple):
    """`embedding` [B, E] and `logits` [B, C], or None for a model without a classifier."""

    embedding: Tensor
    logits: Tensor | None


class Model(nn.Module):
    """A network that gives ModelOutput for normalised images [B, in_channels, size, size].

    `spec` is its name for `create`; `mean` and `std` (one value per channel, for pixels in 0..1)
    are the normalisation it expects, which `prepare` applies.
    """

    channel_mean: Tensor
    channel_std: Tensor

    def __init__(
        self,
        *,
        spec: str,
        embedding_dim: int,
        num_classes: int | None,
        image_size: int,
        in_channels: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.spec, self.embedding_dim, self.num_classes = spec, embedding_dim, num_classes
        self.image_size, self.in_channels = image_size, in_channels
        self.mean, self.std = tuple(mean), tuple(std)
        # The same numbers on the model's device, so that `prepare` needs no copy to the device.
        shape = (1, in_channels, 1, 1)
        self.register_buffer("channel_mean", torch.tensor(mean).view(shape), persistent=False)
        self.register_buffer("channel_std", torch.tensor(std).view(shape), persistent=False)

    def check_images(self, images: Tensor) -> None:
        """ModelError unless `images` are floats of the shape this model was made for."""
        expected = (self.in_channels, self.image_size, self.image_size)
        if images.dim() != 4 or images.shape[1:] != expected or not images.is_floating_point():
            raise ModelError(
                f"{self.spec} expects floating-point images of shape [B, "
                f"{', '.join(map(str, expected))}], got {images.dtype} of shape "
                f"{list(images.shape)}; use ckd.models.prepare"
            )


def probe(spec: Spec, embed: nn.Module, image_size: int, in_channels: int) -> int:
    """Width of the embeddings that `embed` gives, found by running it on one black image."""
    embed.eval()
    try:
        with torch.no_grad():
            embedding = embed(torch.zeros(1, in_channels, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ModelError(
            f"{spec.text!r} does not take images of {image_size} x {image_size} pixels with "
            f"{in_channels} channels: {first_line(error)}"
        ) from error
    finally:
        embed.train()
    if embedding.dim() != 2:
        raise ModelError(
            f"{spec.text!r} gives embeddings of shape {list(embedding.shape)}, not one vector per "
            "image; choose a model that pools its features"
        )
    return embedding.shape[1]


def per_channel(values: Sequence[float], channels: int) -> list[float]:
    """`values` if there is one per channel, else their mean for every channel."""
    if len(values) == channels:
        return list(values)
    return [sum(values) / len(values)] * channels


def first_line(error: Exception) -> str:
    """The first line of a library's error; the rest is often advice on using that library."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
