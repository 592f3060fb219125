"""The CIFAR residual networks of He et al. 2015 (arXiv 1512.03385, section 4.2)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ckd.models.base import Model, ModelError, ModelOutput
from ckd.models.spec import Spec

DEFAULTS = {"width": 16}
# ImageNet's statistics, with which the public CIFAR weights of this architecture were trained.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ResNet(Model):
    """6n + 2 layers: a 3x3 convolution, three stages of n blocks, global average pooling.

    The stages have width, 2 width and 4 width channels and halve the image twice. `embedding`
    [B, 4 width] is the pooled vector, `logits` a linear map of it. Modules are named as in the
    widely used weights of akamaster/pytorch_resnet_cifar10.
    """

    def __init__(
        self, spec: Spec, *, num_classes: int | None, image_size: int, in_channels: int
    ) -> None:
        blocks, width = _blocks_per_stage(spec), spec.integers(DEFAULTS)["width"]
        colour = in_channels == 3
        super().__init__(
            spec=spec.text,
            embedding_dim=4 * width,
            num_classes=num_classes,
            image_size=image_size,
            in_channels=in_channels,
            mean=_MEAN if colour else [0.5] * in_channels,
            std=_STD if colour else [0.5] * in_channels,
        )
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.linear = None if num_classes is None else nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> ModelOutput:
        self.check_images(images)
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        embedding = x.mean(dim=(2, 3))
        return ModelOutput(embedding, None if self.linear is None else self.linear(embedding))

    @property
    def classifier(self) -> nn.Module | None:
        return self.linear

    @staticmethod
    def shape_from_weights(spec: Spec, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """num_classes and in_channels of the ResNet that has these weights; they fit any image
        size, so it is CIFAR's 32."""
        linear = weights.get("linear.weight")
        return {
            "num_classes": None if linear is None else linear.shape[0],
            "image_size": 32,
            "in_channels": weights["conv1.weight"].shape[1],
        }

    @staticmethod
    def least_entries(spec: Spec) -> int:
        """The number of entries that the blocks have in the state dict, without the counters of
        the batch norms, which published weights may lack."""
        return 3 * 10 * _blocks_per_stage(spec)


class Block(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)), 3x3 convolutions without bias.

    The shortcut has no parameters (option A): every `stride`-th pixel, with zeros as the additional
    channels, half of them in front.
    """

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.stride, self.new_channels = stride, planes - channels
        self.conv1 = nn.Conv2d(channels, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return x
        front = self.new_channels // 2
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, front, self.new_channels - front))


def _stage(channels: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(channels, planes, stride)
    return nn.Sequential(first, *(Block(planes, planes, stride=1) for _ in range(blocks - 1)))


def _blocks_per_stage(spec: Spec) -> int:
    depth = int(re.sub(r"\D", "", spec.family))
    if depth < 8 or (depth - 2) % 6:
        raise ModelError(
            f"{spec.text!r}: CIFAR ResNets have 6n + 2 layers (resnet8, resnet14, resnet20, ..., "
            f"resnet56, resnet110); for ImageNet's use timm:resnet{depth}"
        )
    return (depth - 2) // 6
