"""The part of a transformers network's output that is the embedding of an image."""

from __future__ import annotations

import contextlib
import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from ckd.models.base import probe
from ckd.models.spec import ModelError, Pool, Spec

_TOWERS = ("vision_model", "image_model", "vision_tower")
_CLASS_TOKENS = {"cls_token", "class_token", "class_embedding"}


class Embed(nn.Module):
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
            side(getattr(config, "image_size", image_size)) != image_size
            and "interpolate_pos_encoding" in accepted
        ):
            self.options["interpolate_pos_encoding"] = True
        patch = side(getattr(config, "patch_size", None))
        self.patches = (image_size // patch) ** 2 if isinstance(patch, int) else None
        # Masked autoencoders sort the patches by noise; `run` passes rising noise, which keeps
        # their order. `create` sets mask_ratio to 0, so that none is dropped.
        self.masks = "noise" in accepted and hasattr(config, "mask_ratio")
        self.dropped: set[str] = set()  # children of the network that were deleted
        self.head_name = ""  # the child that `take_head` replaced
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
            options["noise"] = order.expand(images.shape[0], -1)
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
        assert values is not None  # `kind_of` saw them
        if values.dim() == 4:
            return values.mean(dim=(2, 3))
        return values[:, 0] if self.kind == "cls" else values[:, self.extra_tokens :].mean(dim=1)


def kind_of(spec: Spec, embed: Embed, output: Any, pool: Pool | None) -> str:
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


def _special_tokens(embed: Embed, tokens: Tensor | None) -> int:
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
    spec: Spec, embed: Embed, run: Any, image_size: int, in_channels: int
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


def take_head(spec: Spec, embed: Embed, output: Any, image_size: int, in_channels: int) -> Any:
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
    embed.head_name = name
    return None if isinstance(head, nn.Identity) else head  # where num_labels is 0


def _same(result: Tensor, logits: Tensor) -> bool:
    """Equal, and NaN in the same places."""
    return torch.equal(result.nan_to_num(), logits.nan_to_num())


def drop_text(spec: Spec, embed: Embed, image_size: int, in_channels: int) -> set[str]:
    """Delete the children of the network that the embedding of images does not call; returns
    their names."""
    used = {name for name, *_ in _calls(spec, embed, embed, image_size, in_channels)}
    unused = {name for name, _ in embed.network.named_children()} - used
    for name in unused:
        delattr(embed.network, name)
    return unused


def side(size: Any) -> Any:
    return size[-1] if isinstance(size, list | tuple) else size
