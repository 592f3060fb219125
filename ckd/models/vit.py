"""The student vision transformer of CLIP-Embed-KD (arXiv 2404.06170)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ckd.models.base import Model, ModelError, ModelOutput
from ckd.models.spec import Spec

DEFAULTS = {"patch": 4, "width": 256, "layers": 6, "heads": 8}
_MEAN_STD = 0.5  # pixels to -1..1, as is usual for vision transformers


class ViT(Model):
    """Patches and a class token through pre-norm transformer blocks.

    `embedding` [B, width] is the class token after the last norm, `logits` a linear map of it.
    """

    def __init__(
        self, spec: Spec, *, num_classes: int | None, image_size: int, in_channels: int
    ) -> None:
        options = spec.integers(DEFAULTS)
        patch, width, heads = options["patch"], options["width"], options["heads"]
        if image_size % patch:
            raise ModelError(
                f"{spec.text!r}: image_size {image_size} is not a multiple of the patch size "
                f"{patch}; choose another patch, as in vit:patch=2, or image_size"
            )
        if width % heads:
            raise ModelError(
                f"{spec.text!r}: width {width} is not a multiple of heads {heads}; change one"
            )
        super().__init__(
            spec=spec.text,
            embedding_dim=width,
            num_classes=num_classes,
            image_size=image_size,
            in_channels=in_channels,
            mean=[_MEAN_STD] * in_channels,
            std=[_MEAN_STD] * in_channels,
        )
        tokens = (image_size // patch) ** 2 + 1
        self.patch_embed = nn.Conv2d(in_channels, width, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, tokens, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(options["layers"])))
        self.norm = nn.LayerNorm(width)
        self.head = None if num_classes is None else nn.Linear(width, num_classes)
        self._initialize()

    def _initialize(self) -> None:
        # As in timm; the patch convolution keeps torch's default, since its fan-in is small.
        for token in (self.class_token, self.position):
            nn.init.trunc_normal_(token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> ModelOutput:
        self.check_images(images)
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        embedding = self.norm(self.blocks(x)[:, 0])
        return ModelOutput(embedding, None if self.head is None else self.head(embedding))

    @property
    def classifier(self) -> nn.Module | None:
        return self.head

    @staticmethod
    def shape_from_weights(spec: Spec, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """num_classes, image_size and in_channels of the ViT that has these weights."""
        tokens = weights["position"].shape[1]
        head = weights.get("head.weight")
        return {
            "num_classes": None if head is None else head.shape[0],
            "image_size": math.isqrt(max(tokens - 1, 0)) * spec.integers(DEFAULTS)["patch"],
            "in_channels": weights["patch_embed.weight"].shape[1],
        }

    @staticmethod
    def least_entries(spec: Spec) -> int:
        """The number of entries that the blocks have in the state dict."""
        return 12 * spec.integers(DEFAULTS)["layers"]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on tokens [B, L, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), QuickGELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attention(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), CLIP's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)
