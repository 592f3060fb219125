"""Models of the timm library (extra `timm`): timm:NAME."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ckd._hints import require, unknown
from ckd.models.base import (
    Model,
    ModelError,
    ModelOutput,
    agree,
    first_line,
    one_vector_each,
    per_channel,
    probe,
    random_images,
    reason,
)
from ckd.models.preprocessing import Preprocessing, Unsupported, measure
from ckd.models.spec import Pool, Spec
from ckd.models.weights import DAMAGE, Weights, classes_in, fill, named_as

_TOLERANCE = 1e-4  # of logits, relative to the length of their row, for rounding


class TimmModel(Model):
    """A timm network; `embedding` [B, E] is its classifier's input, the pooled features, as timm's
    `forward_head(features, pre_logits=True)` gives them. `logits` are the network's own.
    """

    def __init__(
        self,
        spec: Spec,
        network: Any,
        *,
        image_size: int,
        in_channels: int,
        preprocessing: Preprocessing,
    ) -> None:
        if not hasattr(network, "get_classifier"):
            raise ModelError(
                f"{spec.text!r} is an encoder that gives tokens, not one vector per image; "
                "choose a model that pools its features"
            )
        embed = _Embed(network).eval()
        embedding = one_vector_each(spec, probe(spec, embed, image_size, in_channels))
        super().__init__(
            spec=spec.text,
            embedding_dim=embedding.shape[1],
            num_classes=network.num_classes or None,
            image_size=image_size,
            in_channels=in_channels,
            mean=per_channel(preprocessing.mean, in_channels),
            std=per_channel(preprocessing.std, in_channels),
            resize=preprocessing.resize,
            flip_channels=preprocessing.flip_channels,
        )
        self.embed = embed.train()
        self._direct = False
        if self.num_classes is not None:
            self._direct = _is_direct(spec, self)

    def forward(self, images: Tensor) -> ModelOutput:
        self.check_images(images)
        network = self.embed.network
        features = network.forward_features(images)
        embedding = self.embed.pool(features)
        if self.num_classes is None:
            return ModelOutput(embedding, None)
        if self._direct:
            return ModelOutput(embedding, network.get_classifier()(embedding))
        return ModelOutput(embedding, network.forward_head(features))

    @property
    def classifier(self) -> nn.Module | None:
        layers = _layers(self.embed.network.get_classifier())
        return layers[0] if len(layers) == 1 else None


class _Embed(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(self.network.forward_features(images))

    def pool(self, features: Any) -> Tensor:
        embedding = self.network.forward_head(features, pre_logits=True)
        return embedding.flatten(1) if embedding.shape[2:] == (1, 1) else embedding


@torch.no_grad()
def _is_direct(spec: Spec, model: TimmModel) -> bool:
    """Whether the classifier takes the embedding as it is and returns the logits.

    Then one pass through the head gives both. `forward_head(features)` would be a second one, in
    which dropout draws another mask and BatchNorm counts the batch again; but only it is right for
    a head that reshapes or normalises the embedding, or has several classifiers.

    Raises ModelError if the logits for two random images are not the network's own, or if several
    classifiers take other inputs than the embedding or its parts.
    """
    network = model.embed.network
    classifiers = _layers(network.get_classifier())
    calls: list[tuple[Tensor, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
        for layer in classifiers
    ]
    shape = (2, model.in_channels, model.image_size, model.image_size)
    images = random_images(shape).to(next(network.parameters()))
    training = model.training
    model.eval()
    try:
        expected = network(images)
        for hook in hooks:
            hook.remove()
        embedding, logits = model(images)
    finally:
        model.train(training)
    inputs = [taken for taken, _ in calls]
    if len(classifiers) > 1:
        # A classifier for images and one for distillation may share their input.
        parts = [x.flatten(1) for i, x in enumerate(inputs) if all(x is not y for y in inputs[:i])]
        if not parts or not agree(torch.cat(parts, dim=1), embedding, _TOLERANCE):
            raise ModelError(
                f"{spec.text!r} has several classifiers with inputs of their own, so no single "
                "embedding; choose a variant without a distillation head"
            )
    if not agree(logits, expected, _TOLERANCE):
        raise ModelError(
            f"{spec.text!r}: timm's forward_head gives other logits than the model's forward, so "
            "its embedding may not be what it classifies; choose another model"
        )
    if len(calls) != 1:
        return False
    return torch.equal(inputs[0], embedding) and torch.equal(calls[0][1], expected)


def _layers(classifier: Any) -> list[nn.Module]:
    if isinstance(classifier, (tuple, list, nn.ModuleList)):
        return [layer for part in classifier for layer in _layers(part)]
    return [classifier]


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

    `image_size` and `in_channels` default to those it was trained with. timm's own addresses are
    names too: `local-dir:FOLDER` (config.json and weights, as `timm.models.save_for_hf` writes
    them) and `hf-hub:OWNER/NAME`.
    """
    timm = require("timm", extra="timm", purpose=f"the model {spec.text!r}")
    if pool is not None:
        raise ModelError(f"{spec.text!r} pools as timm says; pool={pool!r} is for hf: models")
    # Names with a colon or slash are addresses on the hub, which only timm itself can look up.
    registered = not {":", "/"} & set(spec.name)
    if registered and not timm.is_model(spec.name):
        near = difflib.get_close_matches(spec.name, timm.list_models(), n=8, cutoff=0.3)
        raise ModelError(unknown("timm model", spec.name, near))
    options: dict[str, Any] = {"pretrained": pretrained}
    if num_classes is not None or not (pretrained or weights):
        options["num_classes"] = num_classes or 0
    if in_channels is not None:
        options["in_chans"] = in_channels
    try:
        network = timm.create_model(spec.name, **options)
        config = network.pretrained_cfg or {}
        channels, height, width = config.get("input_size", (3, 224, 224))
        size = image_size or width
        if (size, size) != (height, width) and config.get("fixed_input_size"):
            options["img_size"] = size
            network = timm.create_model(spec.name, **options)
        if weights is not None:
            weights = named_as(network.state_dict(), weights)
            if classes := classes_in(network.state_dict(), weights):
                network = timm.create_model(spec.name, **{**options, "num_classes": classes})
            fill(network, weights, spec.text)
    except ModelError:
        raise
    except DAMAGE as error:
        raise ModelError(
            f"{spec.text!r}: timm could not make the model: "
            f"{reason(error, Path(spec.name.removeprefix('local-dir:')))}"
        ) from error
    if image_size is None and height != width:
        raise ModelError(
            f"{spec.text!r} takes images of {height} x {width} pixels, and ckd makes square "
            "ones; choose an image_size"
        )
    if pretrained or weights:
        own = _measured(spec, network, size, channels)
    else:  # a student: its training decides on the rest
        mean, std = (tuple(config.get(name, (0.5,))) for name in ("mean", "std"))
        own = Preprocessing(size, mean, std)
    model = TimmModel(
        spec, network, image_size=size, in_channels=in_channels or channels, preprocessing=own
    )
    if weights is None and num_classes not in (None, model.num_classes):
        raise ModelError(f"{spec.text!r} has {model.num_classes} classes whatever num_classes is")
    if pretrained and num_classes is None and model.num_classes:
        model.class_names, *others = _class_names(network, registered) or ((),)
        model.other_class_names = tuple(others)
    return model


def _measured(spec: Spec, network: Any, size: int, channels: int) -> Preprocessing:
    """The preprocessing of timm's own transform for evaluation at this image size."""
    data = require("timm.data", extra="timm", purpose=f"the model {spec.text!r}")
    config = data.resolve_data_config({"img_size": size}, model=network)
    try:
        transform = data.create_transform(**config, is_training=False)
        return measure(
            lambda image: transform(Image.fromarray(image.squeeze())).numpy(),
            channels,
            [math.floor(size / config["crop_pct"])],
            half_even=True,
        )
    except (Unsupported, *DAMAGE) as error:
        raise ModelError(
            f"{spec.text!r}: timm's preprocessing of this model cannot be repeated: "
            f"{first_line(error)}"
        ) from error


def _class_names(network: Any, registered: bool) -> list[tuple[str, ...]]:
    """The names of a pretrained network's classes: descriptions, then labels (WordNet ids).

    registered: whether timm itself publishes the weights.
    """
    config, classes = network.pretrained_cfg or {}, network.num_classes
    labels = config.get("label_names") or ()
    described = config.get("label_descriptions") or {}
    found = [tuple(described.get(label, label) for label in labels), tuple(labels)]
    data = require("timm.data", extra="timm", purpose="the names of ImageNet's classes")
    # timm knows ImageNet's subsets by their number of classes, which others' weights may have too.
    if registered and not labels and (subset := data.infer_imagenet_subset(network)):
        info = data.ImageNetInfo(subset)
        found = [
            tuple(info.index_to_description(label) for label in range(info.num_classes())),
            tuple(info.label_names()),
        ]
    return [names for names in found if len(names) == classes]
