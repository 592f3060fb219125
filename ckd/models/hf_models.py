"""Models of the transformers library (extra `hf`): hf:NAME, a hub name or a local folder."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ckd._hints import require
from ckd.models.base import (
    Model,
    ModelError,
    ModelOutput,
    agree,
    first_line,
    one_vector_each,
    per_channel,
    probe,
    reason,
)
from ckd.models.hf_embedding import Embed, drop_text, kind_of, side, take_head
from ckd.models.hf_processors import measured, quiet, stored_normalisation
from ckd.models.preprocessing import Preprocessing
from ckd.models.spec import Pool, Spec
from ckd.models.weights import DAMAGE, Weights, classes_in, named_as, refuse_misfits

_CLASSIFIER = "ForImageClassification"
# Classes that are loaded as they were saved; others by transformers' AutoModel.
_AS_SAVED = ("VisionModel", "ImageModel", "VisionModelWithProjection", "Backbone")


class HFModel(Model):
    """A vision model of transformers; see `catalog.create` for its embedding.

    A model of images and texts loses its text part.
    """

    def __init__(
        self,
        spec: Spec,
        network: Any,
        *,
        pool: Pool | None,
        image_size: int,
        in_channels: int,
        preprocessing: Preprocessing,
    ) -> None:
        embed = Embed(network, image_size).eval()
        output = probe(spec, embed.run, image_size, in_channels)
        head = None
        if type(network).__name__.endswith(_CLASSIFIER):
            head = take_head(spec, embed, output, image_size, in_channels)
            embed.kind = "classifier"
        else:
            embed.kind = kind_of(spec, embed, output, pool)
            if hasattr(network, "get_image_features"):
                embed.dropped = drop_text(spec, embed, image_size, in_channels)
        embedding = one_vector_each(spec, probe(spec, embed, image_size, in_channels))
        if head is not None and not agree(head(embedding), output.logits, 1e-4):
            raise ModelError(
                f"{spec.text!r}: the logits of {type(network).__name__} are not those of its last "
                "layer alone; pass pool= (--pool) for its embedding without logits"
            )
        super().__init__(
            spec=spec.text,
            embedding_dim=embedding.shape[1],
            num_classes=None if head is None else output.logits.shape[1],
            image_size=image_size,
            in_channels=in_channels,
            mean=per_channel(preprocessing.mean, in_channels),
            std=per_channel(preprocessing.std, in_channels),
            resize=preprocessing.resize,
            flip_channels=preprocessing.flip_channels,
        )
        self.embed, self.head, self.pool = embed.train(), head, embed.kind
        if any("position" in name for name, _ in network.named_parameters()):
            self.native_size = side(getattr(embed.config, "image_size", None))
        self.class_names = () if head is None else _class_names(network.config)

    def forward(self, images: Tensor) -> ModelOutput:
        self.check_images(images)
        embedding = self.embed(images)
        return ModelOutput(embedding, None if self.head is None else self.head(embedding))

    @property
    def classifier(self) -> nn.Module | None:
        return self.head


def create(
    spec: Spec,
    *,
    num_classes: int | None,
    image_size: int | None,
    in_channels: int | None,
    pretrained: bool,
    weights: Weights | None,
    pool: Pool | None,
) -> HFModel:
    """The model by name: a new classifier if `num_classes` is given, else a trained one's own.

    `image_size` and `in_channels` default to the model's own. Position embeddings of a pretrained
    model are interpolated to another image size.
    """
    transformers = require("transformers", extra="hf", purpose=f"the model {spec.text!r}")
    hub = require("huggingface_hub.errors", extra="hf", purpose=f"the model {spec.text!r}")
    trained = pretrained or weights is not None
    if spec.name.startswith((".", "/")) and not Path(spec.name).is_dir():
        raise ModelError(
            f"{spec.text!r}: transformers could not make the model: there is no folder {spec.name}"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(spec.name, trust_remote_code=False)
        vision = getattr(config, "vision_config", config)
        native_size = side(getattr(vision, "image_size", None)) or 224
        native_channels = getattr(vision, "num_channels", 3)
        channels = in_channels or native_channels
        if trained and channels != native_channels:
            raise ModelError(
                f"{spec.text!r} takes {native_channels} channels, {channels} were asked for; "
                "leave in_channels out, prepare() repeats gray images"
            )
        if hasattr(vision, "mask_ratio"):
            vision.mask_ratio = 0.0  # the embedding of the whole image
        if trained:
            own = measured(spec, native_size, channels)
        else:
            own = stored_normalisation(spec, native_size)
            vision.image_size, vision.num_channels = image_size or native_size, channels
        keep = trained and pool is None
        family = _class_for(spec, transformers, config, num_classes, keep)
        with quiet(transformers):  # `_refuse_unfit` tells what matters of its report
            if weights is not None:
                network, fit = _from_weights(family, config, weights, pool)
            else:
                network, fit = _build(spec, family, config, num_classes, pretrained)
        # Models with position embeddings of one size are run at that size, others at the one that
        # their images are prepared for.
        fixed = "interpolate_pos_encoding" in inspect.signature(network.forward).parameters
        size = image_size or (native_size if fixed else own.image_size)
    except ModelError:
        raise
    except ImportError as error:  # of a package that this one model needs
        raise ImportError(f"{spec.text!r}: {first_line(error)}") from error
    except (*DAMAGE, getattr(hub, "StrictDataclassError", OSError)) as error:
        raise ModelError(
            f"{spec.text!r}: transformers could not make the model: "
            f"{reason(error, Path(spec.name))}"
        ) from error
    model = HFModel(
        spec,
        network.float(),
        pool=pool,
        image_size=size,
        in_channels=channels,
        preprocessing=own.at(size),
    )
    _refuse_unfit(spec, model, fit, weights)
    return model


class _Fit(NamedTuple):
    """How stored weights fit a network: the names of those that do not."""

    missing: Iterable[str] = ()
    unexpected: Iterable[str] = ()
    misshapen: Iterable[str] = ()


def _refuse_unfit(spec: Spec, model: HFModel, fit: _Fit, weights: Weights | None) -> None:
    """Raise ModelError for weights that do not fit the part of the network that the model uses."""
    missing = [
        name
        for name in fit.missing
        if name.partition(".")[0] not in model.embed.dropped
        and (model.pool == "pooler" or ".pooler." not in f".{name}")
    ]
    if weights is not None:
        refuse_misfits(weights.path, spec.text, **{**fit._asdict(), "missing": missing})
    elif missing:
        raise ModelError(
            f"{spec.text!r}: the stored weights lack {len(missing)} of the model's: "
            f"{', '.join(sorted(missing)[:5])}"
        )


def _class_for(
    spec: Spec, transformers: Any, config: Any, num_classes: int | None, keep: bool
) -> Any:
    """The class of transformers, or one of its Auto classes, that loads the model.

    keep: keep the model's own classifier, if it has one.
    """
    if config.model_type in ("timm_wrapper", "timm_backbone"):
        raise ModelError(
            f"{spec.text!r} is a model of timm; load it as timm:hf-hub:{spec.name}, or from a "
            "folder as timm:local-dir:FOLDER"
        )
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if num_classes is not None or (architecture.endswith(_CLASSIFIER) and keep):
        return transformers.AutoModelForImageClassification
    if architecture.endswith(_AS_SAVED):
        if not hasattr(transformers, architecture):
            raise ModelError(f"{spec.text!r}: transformers has no class {architecture}")
        return getattr(transformers, architecture)
    return transformers.AutoModel


def _build(
    spec: Spec, family: Any, config: Any, num_classes: int | None, pretrained: bool
) -> tuple[Any, _Fit]:
    """The network, untrained or with its published weights, and how these fit."""
    if num_classes is not None:
        config.num_labels = num_classes
    if not pretrained:
        return _untrained(family, config), _Fit()
    network, report = family.from_pretrained(
        spec.name,
        config=config,
        trust_remote_code=False,
        ignore_mismatched_sizes=num_classes is not None,
        output_loading_info=True,
    )
    missing = [
        name
        for name in report["missing_keys"]
        if num_classes is None or not name.startswith("classifier.")  # else it is a new one
    ]
    return network, _Fit(missing)


def _from_weights(
    family: Any, config: Any, weights: Weights, pool: Pool | None
) -> tuple[Any, _Fit]:
    """The network with these weights and as many classes as they have, and how they fit.

    With `pool`, classifiers among the weights are left out.
    """
    network = _untrained(family, config)
    own = network.state_dict()
    weights = named_as(own, weights)
    if classes := classes_in(own, weights):
        config.num_labels = classes
        network = _untrained(family, config)
    # Not load_state_dict: transformers renames entries of its earlier versions.
    network, report = type(network).from_pretrained(
        None,
        config=config,
        trust_remote_code=False,
        state_dict=dict(weights.tensors),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    unexpected = report["unexpected_keys"]
    if pool is not None:
        heads = [name for name in unexpected if name.partition(".")[0].endswith("classifier")]
        unexpected = {*unexpected} - {*heads}
    misshapen = [name for name, *_ in report["mismatched_keys"]]
    return network, _Fit(report["missing_keys"], unexpected, misshapen)


def _untrained(family: Any, config: Any) -> Any:
    if hasattr(family, "from_config"):
        return family.from_config(config, trust_remote_code=False)
    return family(config)


def _class_names(config: Any) -> tuple[str, ...]:
    """The names of the logits; () for the placeholders LABEL_0, LABEL_1, ..., and if some are
    missing."""
    labels = config.id2label or {}
    names = tuple(str(labels[label]) for label in sorted(labels))
    placeholders = tuple(f"LABEL_{label}" for label in range(len(names)))
    return () if names == placeholders or {*labels} != {*range(len(names))} else names
