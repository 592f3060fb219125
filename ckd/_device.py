"""The device that the `--device` of a command names."""

from __future__ import annotations

import torch

from ckd._errors import ConfigError


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA if torch sees a GPU, else the CPU.

    Raises ConfigError for a device that is absent, or whose tensors hold no values (`meta`).
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device must be auto, cpu, cuda, cuda:1, ..., got {name}") from error
    try:
        torch.zeros(1, device=device).cpu()  # a meta tensor can be made, but not copied
    except (RuntimeError, AssertionError, ImportError) as error:  # torch built without the device
        reason = str(error).splitlines()[0].partition(". ")[0].rstrip(".")
        raise ConfigError(f"--device {name} cannot be used here: {reason}; try auto") from error
    return device
