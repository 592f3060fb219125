"""Models of the transformers library (extra `hf`): hf:NAME, a hub name or a local folder."""

from __future__ import annotations

import contextlib
import inspect
import math
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
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
from ckd.models.hf_processors import measured, quiet, stored_normalisation
from ckd.models.preprocessing import Preprocessing
from ckd.models.spec import Pool, Spec
from ckd.models.weights import Weights, classes_in, named_as, refuse_misfits

# Errors of transformers and the hub for wrong names, files and settings.
_ERRORS = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError),
    *(SafetensorError, pickle.PickleError, EOFError),
)
_CLASSIFIER = "ForImageClassification"
# Classes that are loaded as they were saved; others by transformers' AutoModel.
_AS_SAVED = ("VisionModel", "ImageModel", "VisionModelWithProjection", "Backbone")
_TOWERS = ("vision_model", "image_model", "vision_tower")
_CLASS_TOKENS = {"cls_token", "class_token", "class_embedding"}


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
        embed = _Embed(network, image_size).eval()
        output = probe(spec, embed.run, image_size, in_channels)
        head = None
        if type(network).__name__.endswith(_CLASSIFIER):
            head = _take_head(spec, embed, output, image_size, in_channels)
            embed.kind = "classifier"
        else:
            embed.kind = _kind(spec, embed, output, pool)
            if hasattr(network, "get_image_features"):
                embed.dropped = _drop_text(spec, embed, image_size, in_channels)
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
            self.native_size = _side(getattr(embed.config, "image_size", None))
        self.class_names = () if head is None else _class_names(network.config)

    def forward(self, images: Tensor) -> ModelOutput:
        self.check_images(images)
        embedding = self.embed(images)
        return ModelOutput(embedding, None if self.head is None else self.head(embedding))


class _Embed(nn.Module):
    """One vector per image from a transformers network.

    `kind` names the part of its output that is used: a Pool; "projection", the image's point in
    the space shared with texts; or "classifier", the input of the last layer.
    """

    def __init__(self, network: Any, image_size: int) -> None:
        super().__init__()
        self.network, self.kind = network, ""
        self.config = config = getattr(network.config, "vision_config", network.config)
        accepted = inspect.signature(self.tower.forward).parameters
        self.options: dict[str, Any] = {}
        if (
            _side(getattr(config, "image_size", image_size)) != image_size
            and "interpolate_pos_encoding" in accepted
        ):
            self.options["interpolate_pos_encoding"] = True
        patch = _side(getattr(config, "patch_size", None))
        self.patches = (image_size // patch) ** 2 if isinstance(patch, int) else None
        # Masked autoencoders sort the patches by noise; `run` passes rising noise, which keeps
        # their order. `create` sets mask_ratio to 0, so that none is dropped.
        self.masks = "noise" in accepted and hasattr(config, "mask_ratio")
        self.dropped: set[str] = set()  # children of the network that were deleted
        self.extra_tokens = 0  # number of tokens before the patches, where `kind` is "mean"

    @property
    def tower(self) -> Any:
        """The module that takes the images: the network, or its image tower."""
        if hasattr(self.network, "get_image_features"):
            for name in _TOWERS:
                if hasattr(self.network, name):
                    return getattr(self.network, name)
        return self.network

    def run(self, images: Tensor) -> Any:
        """The output of the network, or of its image tower."""
        options = dict(self.options)
        if self.masks:
            assert self.patches is not None
            order = torch.arange(float(self.patches), device=images.device)
            options["noise"] = order.expand(len(images), -1)
        return self.tower(pixel_values=images, **options)

    def forward(self, images: Tensor) -> Tensor:
        if self.kind == "projection" and hasattr(self.network, "get_image_features"):
            output = self.network.get_image_features(pixel_values=images, **self.options)
            return output if isinstance(output, Tensor) else output.pooler_output
        output = self.run(images)
        if self.kind == "classifier":  # an Identity is in the classifier's place
            return output.logits.flatten(1)
        if self.kind == "projection":
            return output.image_embeds
        if self.kind == "pooler":
            return output.pooler_output.flatten(1)
        values = _values(output)
        assert values is not None  # `_kind` saw them
        if values.dim() == 4:
            return values.mean(dim=(2, 3))
        return values[:, 0] if self.kind == "cls" else values[:, self.extra_tokens :].mean(dim=1)


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
    """The model by name, with its own classifier, or a new one if `num_classes` is given.

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
        native_size = _side(getattr(vision, "image_size", None)) or 224
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
        family = _class_for(spec, transformers, config, num_classes, pool)
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
    except (*_ERRORS, getattr(hub, "StrictDataclassError", OSError)) as error:
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
    spec: Spec, transformers: Any, config: Any, num_classes: int | None, pool: Pool | None
) -> Any:
    """The class of transformers, or one of its Auto classes, that loads the model."""
    if config.model_type in ("timm_wrapper", "timm_backbone"):
        raise ModelError(
            f"{spec.text!r} is a model of timm; load it as timm:hf-hub:{spec.name}, or from a "
            "folder as timm:local-dir:FOLDER"
        )
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if num_classes is not None or (architecture.endswith(_CLASSIFIER) and pool is None):
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


def _kind(spec: Spec, embed: _Embed, output: Any, pool: Pool | None) -> str:
    """The part of the network's output that is the embedding; see `catalog.create`.

    Raises ModelError if the output does not have it.
    """
    if pool is None and hasattr(embed.network, "get_image_features"):
        return "projection"
    if pool is None and getattr(output, "image_embeds", None) is not None:
        return "projection"
    if getattr(output, "encoder_last_hidden_state", None) is not None:
        raise ModelError(f"{spec.text!r} gives the queries of a decoder, not tokens of the image")
    pooled, tokens = getattr(output, "pooler_output", None), _values(output)
    special = _special_tokens(embed, tokens)
    if pool is None:
        dense = hasattr(getattr(embed.network, "pooler", None), "dense")
        pool = "pooler" if pooled is not None and not dense else "cls" if special else "mean"
    if pool == "pooler" and pooled is None:
        raise ModelError(f"{spec.text!r} has no pooling layer; use pool='mean' or 'cls'")
    if pool == "cls" and not special:
        raise ModelError(f"{spec.text!r} has no class token; use pool='mean' or 'pooler'")
    if pool == "mean":
        patches = 0 if tokens is None or tokens.dim() != 3 else tokens.shape[1] - special
        square = math.isqrt(patches) ** 2 == patches and patches <= (embed.patches or patches)
        is_map = tokens is not None and tokens.dim() == 4 and tokens.shape[2] == tokens.shape[3]
        if not is_map and not (patches and square):
            came = "none" if tokens is None else f"an output of shape {list(tokens.shape)}"
            raise ModelError(
                f"{spec.text!r} gives no tokens that are known to be those of patches ({came}); "
                "use pool='cls' or 'pooler'"
            )
        embed.extra_tokens = special
    return pool


def _special_tokens(embed: _Embed, tokens: Tensor | None) -> int:
    """How many tokens come before those of the patches: class and distillation token, registers."""
    names = {name.rpartition(".")[2] for name, _ in embed.tower.named_parameters()}
    if tokens is None or tokens.dim() != 3 or not names & _CLASS_TOKENS:
        return 0
    if tokens.shape[1] == embed.patches:  # the class token is a parameter of the pooling layer
        return 0
    registers = getattr(embed.config, "num_register_tokens", None) or 0
    return 1 + ("distillation_token" in names) + registers


def _values(output: Any) -> Tensor | None:
    """The tokens [B, L, E] or the last feature map [B, E, H, W] of a network's output, if any."""
    maps = getattr(output, "feature_maps", None)
    return maps[-1] if maps else getattr(output, "last_hidden_state", None)


def _calls(
    spec: Spec, embed: _Embed, run: Any, image_size: int, in_channels: int
) -> list[tuple[str, Any, Any]]:
    """The (name, first argument, result) of each call of a child of the network by `run`."""
    calls: list[tuple[str, Any, Any]] = []

    def recorder(name: str) -> Any:
        return lambda _, given, result: calls.append((name, given[0] if given else None, result))

    with contextlib.ExitStack() as hooks:
        for name, child in embed.network.named_children():
            hooks.callback(child.register_forward_hook(recorder(name)).remove)
        probe(spec, run, image_size, in_channels)
    return calls


def _take_head(spec: Spec, embed: _Embed, output: Any, image_size: int, in_channels: int) -> Any:
    """Replace the network's classifier, the child that gives the logits, by an Identity.

    Returns the classifier; None if the network has no classes.
    """
    network, logits = embed.network, getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ModelError(f"{spec.text!r}: {type(network).__name__} gives no logits")
    heads = [
        (name, given)
        for name, given, result in _calls(spec, embed, embed.run, image_size, in_channels)
        if isinstance(result, Tensor) and _same(result, logits)
    ]
    name, given = heads[-1] if heads else ("", None)
    if not isinstance(given, Tensor) or given.flatten(1).shape != given.shape[:2]:
        raise ModelError(
            f"{spec.text!r}: {type(network).__name__} has no single classifier whose input is one "
            "vector per image; pass pool= (--pool) for an embedding without logits"
        )
    head = getattr(network, name)
    setattr(network, name, nn.Identity())
    return None if isinstance(head, nn.Identity) else head  # where num_labels is 0


def _same(result: Tensor, logits: Tensor) -> bool:
    """Equal, and NaN in the same places."""
    return torch.equal(result.nan_to_num(), logits.nan_to_num())


def _drop_text(spec: Spec, embed: _Embed, image_size: int, in_channels: int) -> set[str]:
    """Delete the children of the network that the embedding of images does not call; returns
    their names."""
    used = {name for name, *_ in _calls(spec, embed, embed, image_size, in_channels)}
    unused = {name for name, _ in embed.network.named_children()} - used
    for name in unused:
        delattr(embed.network, name)
    return unused


def _class_names(config: Any) -> tuple[str, ...]:
    """The names of the logits; () for the placeholders LABEL_0, LABEL_1, ..., and if some are
    missing."""
    labels = config.id2label or {}
    names = tuple(str(labels[label]) for label in sorted(labels))
    placeholders = tuple(f"LABEL_{label}" for label in range(len(names)))
    return () if names == placeholders or {*labels} != {*range(len(names))} else names


def _side(size: Any) -> Any:
    return size[-1] if isinstance(size, list | tuple) else size
