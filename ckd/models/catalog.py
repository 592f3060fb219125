"""Creates models by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ckd._hints import unknown
from ckd.models import hf_models, timm_models
from ckd.models.base import Model
from ckd.models.resnet import ResNet
from ckd.models.spec import LARGEST, POOLS, ModelError, Pool, Spec, parse
from ckd.models.vit import ViT
from ckd.models.weights import Weights


class Family(NamedTuple):
    """A kind of built-in model. `pattern`: a regular expression for the name before the colon;
    `model`: a subclass of Model with the static methods `shape_from_weights(spec, weights)` and
    `least_entries(spec)`; `names`: those listed in messages."""

    pattern: str
    model: type[Any]
    names: tuple[str, ...]


FAMILIES = (
    Family("vit", ViT, ("vit",)),
    Family(
        "resnet[0-9]{1,4}", ResNet, ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
    ),
)
# Models of libraries have shapes and weights of their own.
LIBRARIES = {"timm": timm_models, "hf": hf_models}


def known() -> tuple[str, ...]:
    """The names of models, for messages."""
    built_in = (name for family in FAMILIES for name in family.names)
    return (*built_in, *(f"{library}:NAME" for library in LIBRARIES))


def create(
    spec: str,
    *,
    num_classes: int | None,
    image_size: int | None,
    in_channels: int | None = 3,
    pretrained: bool = False,
    weights: Weights | None = None,
    pool: Pool | None = None,
) -> Model:
    """A new model, in training mode, initialised from torch's default generator.

    `spec` is NAME[:key=value,...]:

        vit                                      patch=4, width=256, layers=6, heads=8
        resnet20, resnet56, any 6n + 2           width=16
        timm:NAME, hf:NAME                       `pretrained` loads their weights; `image_size`
                                                 and `in_channels` may be None: the model's own
        timm:local-dir:FOLDER, hf:FOLDER         models on disk: a folder as
                                                 timm.models.save_for_hf writes it, or as
                                                 save_pretrained of transformers does

    `num_classes` None leaves out the classifier (logits are None), except that a pretrained
    model keeps its own. `weights`, for timm: and hf:, replace the pretrained ones.

    `pool`, for hf:, says how tokens become the embedding: "cls", the class token; "mean", the mean
    of the patch tokens; "pooler", the output of the model's own pooling layer. An image classifier
    is then loaded without its classifier. None: the first of these that the model has (its `pool`
    says which): the input of the classifier; the projected image embedding; the pooled output, if
    its layer is not dense, since dense ones often have untrained published weights; the class
    token; the mean of all tokens, or of the last feature map.

    Raises ModelError for an unknown name or option and for sizes that do not fit, ImportError if a
    needed extra is missing.
    """
    parsed = parse(spec)
    sizes = {"num_classes": num_classes, "image_size": image_size, "in_channels": in_channels}
    for name, value in sizes.items():
        if value is not None and not 1 <= value <= LARGEST[name]:
            largest = f"{LARGEST[name]:,}"
            raise ModelError(f"{name} must be at least 1 and at most {largest}, got {value}")
    if pool is not None and pool not in POOLS:
        raise ModelError(unknown("pool", pool, POOLS))
    if parsed.family in LIBRARIES:
        return LIBRARIES[parsed.family].create(
            parsed,
            num_classes=num_classes,
            image_size=image_size,
            in_channels=in_channels,
            pretrained=pretrained,
            weights=weights,
            pool=pool,
        )
    network = _network(parsed)
    if pretrained:
        raise ModelError(
            f"{spec!r} has no weights to download; use load({spec!r}, weights=FILE) instead"
        )
    if pool is not None:
        raise ModelError(f"{spec!r} has one embedding only; pool={pool!r} is for hf: models")
    if image_size is None or in_channels is None:
        raise ModelError(f"{spec!r} has no image_size or in_channels of its own: pass both")
    return network(parsed, num_classes=num_classes, image_size=image_size, in_channels=in_channels)


def is_spec(text: str) -> bool:
    """Whether `text` begins with the name of a model, rather than being a path."""
    family = text.partition(":")[0]
    return family in LIBRARIES or _built_in(family) is not None


def is_library(spec: str) -> bool:
    """Whether the model's weights come from a library."""
    return spec.partition(":")[0] in LIBRARIES


def is_folder(spec: str) -> bool:
    """Whether this is the name of a model whose configuration lies in a folder of the user's."""
    return is_library(spec) and Path(parse(spec).name.removeprefix("local-dir:")).is_dir()


def shape_from_weights(spec: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """num_classes, image_size and in_channels of the built-in model that has these weights.

    Raises KeyError for a missing entry, IndexError for an entry of too few dimensions.
    """
    parsed = parse(spec)
    return _network(parsed).shape_from_weights(parsed, weights)


def least_entries(spec: str) -> int:
    """How many entries the layers of this built-in model have in its state dict, at least."""
    parsed = parse(spec)
    return _network(parsed).least_entries(parsed)


def _network(parsed: Spec) -> type[Any]:
    """The class of a built-in model. Raises ModelError."""
    if network := _built_in(parsed.family):
        return network
    raise ModelError(unknown("model", parsed.family, known()))


def _built_in(family: str) -> type[Any] | None:
    found = (entry.model for entry in FAMILIES if re.fullmatch(entry.pattern, family))
    return next(found, None)
