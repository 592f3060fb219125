"""Measures of a model: parameter count, FLOPs, and a hash of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ckd.models.base import Model, check_model


def parameter_count(model: nn.Module) -> int:
    """Number of parameter elements; shared parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_image(model: Model) -> int:
    """Floating-point operations of the forward of one image (a multiply-add counts as two)."""
    check_model(model, "flops_per_image")
    shape = (1, model.in_channels, model.image_size, model.image_size)
    images = torch.zeros(shape, device=model.channel_mean.device, dtype=model.channel_mean.dtype)
    was_training = model.training
    model.eval()
    # Attention by matrix products: fused kernels are not counted on every device.
    try:
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            model(images)
    finally:
        model.train(was_training)
    return counter.get_total_flops()


def weights_hash(model: nn.Module) -> str:
    """sha256 (hex) over name, dtype, shape and bytes of every entry of the state dict, by name."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    return update_hash(hashlib.sha256(), model.state_dict()).hexdigest()


def update_hash(digest: Any, tensors: Mapping[str, Tensor]) -> Any:
    """`digest`, updated with name, dtype, shape and bytes of every tensor, by name."""
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest
