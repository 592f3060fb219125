"""The class head of a model, where it is a linear map of the embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ckd.models.base import Model, agree, check_model, random_images

_TOLERANCE = 0.01  # of logits, relative to the length of their row: GPUs round to TF32


@torch.no_grad()
def class_head(model: Model) -> tuple[Tensor, Tensor] | None:
    """(weight [C, E], bias [C]) with logits = weight embedding + bias, float32 on the CPU.

    None if the model has no classes, or no `classifier` of that form: it is an `nn.Linear` that
    gives the logits of a few images from their embeddings, in evaluation mode.
    """
    check_model(model, "class_head")
    layer = model.classifier
    if not isinstance(layer, nn.Linear):
        return None
    mean = model.channel_mean
    shape = (2, model.in_channels, model.image_size, model.image_size)
    was_training = model.training
    model.eval()
    try:
        embedding, logits = model(random_images(shape).to(mean.device, mean.dtype))
    finally:
        model.train(was_training)
    weight = layer.weight.detach().to("cpu", torch.float32, copy=True)
    bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().cpu().float()
    if logits is None or embedding.shape[1] != weight.shape[1]:
        return None
    given = F.linear(embedding.double().cpu(), weight.double(), bias.double())
    return (weight, bias.clone()) if agree(given, logits.cpu(), _TOLERANCE) else None
