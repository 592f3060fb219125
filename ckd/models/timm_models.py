"""Models of the timm library (extra `timm`): timm:NAME."""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor, nn

from ckd._hints import require, unknown
from ckd.models.base import (
    Model,
    ModelError,
    ModelOutput,
    first_line,
    one_vector_each,
    per_channel,
    probe,
)
from ckd.models.spec import Pool, Spec
from ckd.models.weights import Weights

_ERRORS = (RuntimeError, OSError, ValueError, TypeError, AssertionError)


class TimmModel(Model):
    """A timm network; `embedding` [B, E] is its classifier's input, the pooled features."""

    def __init__(self, spec: Spec, network: Any, *, image_size: int, in_channels: int) -> None:
        classes = network.num_classes
        if classes and not isinstance(network.get_classifier(), nn.Module):
            raise ModelError(
                f"{spec.text!r} has several classifiers, so no single embedding; "
                "choose a variant without a distillation head"
            )
        config = network.pretrained_cfg or {}
        embed = _Embed(network)
        super().__init__(
            spec=spec.text,
            embedding_dim=one_vector_each(spec, probe(spec, embed, image_size, in_channels)).shape[
                1
            ],
            num_classes=classes or None,
            image_size=image_size,
            in_channels=in_channels,
            mean=per_channel(config.get("mean", (0.5,)), in_channels),
            std=per_channel(config.get("std", (0.5,)), in_channels),
        )
        self.embed = embed

    def forward(self, images: Tensor) -> ModelOutput:
        self.check_images(images)
        embedding = self.embed(images)
        if self.num_classes is None:
            return ModelOutput(embedding, None)
        return ModelOutput(embedding, self.embed.network.get_classifier()(embedding))


class _Embed(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        features = self.network.forward_features(images)
        return self.network.forward_head(features, pre_logits=True)


def create(
    spec: Spec,
    *,
    num_classes: int | None,
    image_size: int | None,
    in_channels: int | None,
    pretrained: bool,
    weights: Weights | None,
    pool: Pool | None,
) -> TimmModel:
    """The network by name; a pretrained one keeps its classifier if `num_classes` is None.

    `image_size` and `in_channels` default to those it was trained with.
    """
    timm = require("timm", extra="timm", purpose=f"the model {spec.text!r}")
    # Names with a colon or slash are addresses on the hub, which only timm itself can look up.
    if not {":", "/"} & set(spec.name) and not timm.is_model(spec.name):
        near = difflib.get_close_matches(spec.name, timm.list_models(), n=8, cutoff=0.3)
        raise ModelError(unknown("timm model", spec.name, near))
    options: dict[str, Any] = {"pretrained": pretrained}
    if num_classes is not None or not pretrained:
        options["num_classes"] = num_classes or 0
    if in_channels is not None:
        options["in_chans"] = in_channels
    try:
        network = timm.create_model(spec.name, **options)
        config = network.pretrained_cfg or {}
        native = config.get("input_size", (3, 224, 224))
        size = image_size or native[-1]
        if size != native[-1] and config.get("fixed_input_size"):
            network = timm.create_model(spec.name, img_size=size, **options)
    except _ERRORS as error:
        raise ModelError(
            f"{spec.text!r}: timm could not make the model: {first_line(error)}"
        ) from error
    return TimmModel(spec, network, image_size=size, in_channels=in_channels or native[0])
