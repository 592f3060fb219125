"""What torch permits the arithmetic of float32 matrix products to be."""

from __future__ import annotations

import torch

# Under which name torch keeps its newer setting, what it may permit, and which of the older ones
# permit that.
_SETTINGS = {"cuda": ("cuda", "tf32", ("high", "medium")), "cpu": ("mkldnn", "bf16", ("medium",))}
# As torch.backends.cuda.matmul and torch.backends.mkldnn.matmul read it.
_newer_setting = getattr(torch._C, "_get_fp32_precision_getter", None)


def float32_products(device_type: str) -> str:
    """ "ieee", "tf32" (on GPUs) or "bf16" (on the CPU).

    From `torch.set_float32_matmul_precision`, or from the `fp32_precision` settings of
    `torch.backends`, which torch has from 2.9 on and after which it refuses to read the former.
    """
    name, wanted, precisions = _SETTINGS[device_type]
    if _newer_setting is None:
        return wanted if torch.get_float32_matmul_precision() in precisions else "ieee"
    return wanted if _newer_setting(name, "matmul") == wanted else "ieee"
