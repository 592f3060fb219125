"""Converts the pixels of a data set to a model's input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ckd.models.base import Model, ModelError, came, check_model


def prepare(model: Model, images: Tensor) -> Tensor:
    """Resize images, match the model's channels, and normalise, for `model.forward`.

    `images` are uint8 [B, C, H, W] on the model's device; the result is
    [B, in_channels, image_size, image_size] in the dtype of the model's mean (float32, unless the
    model was converted). Resize, crop, order of channels, mean and std are those of the model's
    own library; models of this package resize bicubically, antialiased, and do not keep the aspect
    ratio. Gray images are repeated over the model's channels. Raises ModelError for other
    differences in channels.
    """
    if isinstance(model, Tensor) and isinstance(images, nn.Module):
        raise ModelError(
            "prepare takes the model first and the images second: prepare(model, images)"
        )
    check_model(model, "prepare")
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.dim() != 4:
        raise ModelError(
            f"images must be uint8 of shape [B, C, H, W], got {came(images)}{_remedy(images)}"
        )
    channels = images.shape[1]
    if channels not in (1, model.in_channels):
        last = images.shape[3] in (1, model.in_channels)
        raise ModelError(
            f"{model.spec} takes {model.in_channels} channels, the images have {channels}; "
            + (
                "channels come second, as images.permute(0, 3, 1, 2) has them"
                if last
                else "make the model with the data's in_channels, or convert the data"
            )
        )
    x = model.resize(images, model.image_size)
    if model.flip_channels:
        x = x.flip(1)
    if channels == model.in_channels and model.channel_mean.dtype == x.dtype:
        return x.div_(255).sub_(model.channel_mean).div_(model.channel_std)
    # Not in place: broadcasts gray over the channels, and mean and std may have another dtype.
    x = x.div(255).sub(model.channel_mean).div_(model.channel_std)
    return x.to(model.channel_mean.dtype)


def _remedy(images: object) -> str:
    if not isinstance(images, Tensor):
        return "; convert arrays with torch.from_numpy, PIL images by a student's preprocess"
    if images.is_floating_point():
        return "; prepare scales and normalises pixels 0..255 itself: pass them as they are stored"
    if images.dtype == torch.uint8 and images.dim() == 3:
        return "; add the batch's dimension: images[None]"
    return ""
