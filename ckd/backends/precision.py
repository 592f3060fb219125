"""The precision that torch's settings permit for products of float32 matrices."""

from __future__ import annotations

import torch

# device -> (its name in torch's fp32_precision API, the value there that permits less than float32,
# and the values of set_float32_matmul_precision that mean the same).
_SETTINGS = {"cuda": ("cuda", "tf32", ("high", "medium")), "cpu": ("mkldnn", "bf16", ("medium",))}
# Reads torch.backends.cuda.matmul.fp32_precision and that of mkldnn; None before torch 2.9.
_newer_setting = getattr(torch._C, "_get_fp32_precision_getter", None)


def float32_products(device_type: str) -> str:
    """ "ieee", or what may replace it: "tf32" on GPUs, "bf16" on the CPU.

    Reads the `fp32_precision` settings of `torch.backends` where torch has them (2.9 on):
    `torch.set_float32_matmul_precision` sets these too, but its getter may raise once they have
    been set directly. Older torch has only that getter.
    """
    name, wanted, precisions = _SETTINGS[device_type]
    if _newer_setting is None:
        return wanted if torch.get_float32_matmul_precision() in precisions else "ieee"
    return wanted if _newer_setting(name, "matmul") == wanted else "ieee"
