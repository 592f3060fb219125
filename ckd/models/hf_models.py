"""Models of the transformers library (extra `hf`): hf:NAME, a hub name or a local folder."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from torch import Tensor, nn

from ckd._hints import require
from ckd.models.base import Model, ModelError, ModelOutput, first_line, per_channel, probe
from ckd.models.spec import Spec

# Errors of transformers and the hub for wrong names, files and settings.
_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError)
_CLASSIFIER = "ForImageClassification"


class HFModel(Model):
    """A vision model of transformers.

    The `embedding` of an image classifier is the input of its last layer (ViT: the class token
    after the last norm). Other models have no logits: CLIP gives the projected image embedding,
    or without a projection the pooled class token; the rest give their pooled output.
    """

    def __init__(
        self,
        spec: Spec,
        network: Any,
        *,
        image_size: int,
        in_channels: int,
        mean: list[float],
        std: list[float],
    ) -> None:
        head = None
        if type(network).__name__.endswith(_CLASSIFIER):
            head = getattr(network, "classifier", None)
            if not isinstance(head, nn.Linear | nn.Sequential):
                raise ModelError(f"{spec.text!r}: {type(network).__name__} has no one classifier")
            # The network's `logits` are now the classifier's input.
            network.classifier = nn.Identity()
        embed = _Embed(network, image_size)
        super().__init__(
            spec=spec.text,
            embedding_dim=probe(spec, embed, image_size, in_channels),
            num_classes=None if head is None else network.config.num_labels,
            image_size=image_size,
            in_channels=in_channels,
            mean=mean,
            std=std,
        )
        self.embed, self.head = embed, head

    def forward(self, images: Tensor) -> ModelOutput:
        self.check_images(images)
        embedding = self.embed(images)
        return ModelOutput(embedding, None if self.head is None else self.head(embedding))


class _Embed(nn.Module):
    """One vector per image from a transformers network."""

    def __init__(self, network: Any, image_size: int) -> None:
        super().__init__()
        self.network = network
        accepted = inspect.signature(network.forward).parameters
        resized = _side(getattr(network.config, "image_size", image_size)) != image_size
        self.options = (
            {"interpolate_pos_encoding": True}
            if resized and "interpolate_pos_encoding" in accepted
            else {}
        )
        # A pooler with a dense layer (ViT, DeiT) is often untrained in published weights.
        self.class_token = hasattr(getattr(network, "pooler", None), "dense")

    def forward(self, images: Tensor) -> Tensor:
        output = self.network(pixel_values=images, **self.options)
        for name in ("logits", "image_embeds"):
            if (embedding := getattr(output, name, None)) is not None:
                return embedding.flatten(1)
        pooled = getattr(output, "pooler_output", None)
        if self.class_token or pooled is None:
            return output.last_hidden_state[:, 0]
        return pooled.flatten(1)


def create(
    spec: Spec,
    *,
    num_classes: int | None,
    image_size: int | None,
    in_channels: int | None,
    pretrained: bool,
) -> HFModel:
    """The model by name, with its own classifier, or a new one if `num_classes` is given.

    `image_size` and `in_channels` default to the model's own. Position embeddings of a pretrained
    model are interpolated to another image size.
    """
    transformers = require("transformers", extra="hf", purpose=f"the model {spec.text!r}")
    try:
        config = transformers.AutoConfig.from_pretrained(spec.name)
        mean, std = _normalisation(spec, pretrained)
        vision = getattr(config, "vision_config", config)
        native_size = _side(getattr(vision, "image_size", None)) or 224
        native_channels = getattr(vision, "num_channels", 3)
        size, channels = image_size or native_size, in_channels or native_channels
        if not pretrained:
            vision.image_size, vision.num_channels = size, channels
        elif channels != native_channels:
            raise ModelError(
                f"{spec.text!r} takes {native_channels} channels, {channels} were asked for; "
                "leave in_channels out, prepare() repeats gray images"
            )
        family = _class_for(transformers, config, num_classes)
        network = _build(spec, family, config, num_classes, pretrained)
    except ModelError:
        raise
    except _ERRORS as error:
        raise ModelError(
            f"{spec.text!r}: transformers could not make the model: {first_line(error)}"
        ) from error
    return HFModel(
        spec,
        network.float(),
        image_size=size,
        in_channels=channels,
        mean=per_channel(mean, channels),
        std=per_channel(std, channels),
    )


def _class_for(transformers: Any, config: Any, num_classes: int | None) -> Any:
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if num_classes is not None or architecture.endswith(_CLASSIFIER):
        return transformers.AutoModelForImageClassification
    if config.model_type in ("clip", "clip_vision_model"):
        if architecture in ("CLIPModel", "CLIPVisionModelWithProjection"):
            return transformers.CLIPVisionModelWithProjection
        return transformers.CLIPVisionModel
    return transformers.AutoModel


def _build(spec: Spec, family: Any, config: Any, num_classes: int | None, pretrained: bool) -> Any:
    if num_classes is not None:
        config.num_labels = num_classes
    if not pretrained:
        if hasattr(family, "from_config"):
            return family.from_config(config)
        return family(getattr(config, "vision_config", config))
    if family.__name__.startswith("CLIPVision"):
        config = getattr(config, "vision_config", config)
    network, report = family.from_pretrained(
        spec.name,
        config=config,
        ignore_mismatched_sizes=num_classes is not None,
        output_loading_info=True,
    )
    missing = [
        key
        for key in report["missing_keys"]
        if not (num_classes is not None and key.startswith("classifier."))
        if ".pooler." not in f".{key}"  # unused, see _Embed
    ]
    if missing:
        raise ModelError(
            f"{spec.text!r}: the stored weights lack {len(missing)} of the model's: "
            f"{', '.join(sorted(missing)[:5])}"
        )
    return network


def _normalisation(spec: Spec, pretrained: bool) -> tuple[list[float], list[float]]:
    """Mean and std from the model's preprocessor_config.json; 0.5 where it has none."""
    module = require(
        "transformers.image_processing_base", extra="hf", purpose=f"the model {spec.text!r}"
    )
    try:
        stored, _ = module.ImageProcessingMixin.get_image_processor_dict(spec.name)
        return stored["image_mean"], stored["image_std"]
    except (OSError, KeyError):
        if pretrained:
            warnings.warn(
                f"{spec.text!r} comes without a preprocessor_config.json that gives image_mean "
                "and image_std: its images are normalised with mean 0.5 and std 0.5",
                stacklevel=4,
            )
        return [0.5], [0.5]


def _side(size: Any) -> int | None:
    return size[-1] if isinstance(size, list | tuple) else size
