"""Where a run computes, and torch's own switches for it, put back afterwards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from ckd.train.config import Config
from ckd.train.errors import ConfigError

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA if there is one, else the CPU. Raises ConfigError for one that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device must be auto, cpu, cuda, cuda:1, ..., got {name}") from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name} is not here ({reason}); try auto") from error
    return device


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """Mixed precision as `--amp` says; float32 parameters and losses stay float32."""
    dtype = AMP_DTYPES.get(config.amp, torch.bfloat16)
    return torch.autocast(device.type, dtype=dtype, enabled=config.amp != "off")


@contextlib.contextmanager
def torch_state(config: Config, device: torch.device) -> Iterator[None]:
    """The random state and the determinism switches of torch for one run, restored on exit."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            if config.deterministic:
                # cuBLAS reads this when it starts; without it torch refuses its matmuls here.
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = not config.deterministic
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic)
            torch.backends.cudnn.benchmark = benchmark
