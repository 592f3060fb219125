"""What torch permits the arithmetic of float32 matrix products to be."""

from __future__ import annotations

import torch


def float32_products(device_type: str) -> str:
    """ "ieee", "tf32" (on GPUs) or "bf16" (on the CPU).

    From `torch.set_float32_matmul_precision`, or from the `fp32_precision` settings of
    `torch.backends`, which torch has from 2.9 on and after which it refuses to read the former.
    """
    products = (torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn).matmul
    wanted = "tf32" if device_type == "cuda" else "bf16"
    setting = getattr(products, "fp32_precision", None)
    if setting is not None:
        return wanted if setting == wanted else "ieee"
    least = {"tf32": ("high", "medium"), "bf16": ("medium",)}[wanted]
    return wanted if torch.get_float32_matmul_precision() in least else "ieee"
