"""What torch permits the arithmetic of float32 matrix products to be."""

from __future__ import annotations

import torch

# What holds torch's newer setting, what it may permit, and which of the older settings permit that.
_SETTINGS = {
    "cuda": (torch.backends.cuda.matmul, "tf32", ("high", "medium")),
    "cpu": (getattr(torch.backends.mkldnn, "matmul", None), "bf16", ("medium",)),
}


def float32_products(device_type: str) -> str:
    """ "ieee", "tf32" (on GPUs) or "bf16" (on the CPU).

    From `torch.set_float32_matmul_precision`, or from the `fp32_precision` settings of
    `torch.backends`, which torch has from 2.9 on and after which it refuses to read the former.
    """
    products, wanted, precisions = _SETTINGS[device_type]
    setting = getattr(products, "fp32_precision", None)
    if setting is None:
        return wanted if torch.get_float32_matmul_precision() in precisions else "ieee"
    return wanted if setting == wanted else "ieee"
