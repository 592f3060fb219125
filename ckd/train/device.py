"""torch's global settings for a run, restored afterwards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from ckd.train.config import Config

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """The autocast context of `--amp`; parameters and losses stay float32."""
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
                # Read when cuBLAS starts; without it, deterministic mode refuses cuBLAS products.
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = not config.deterministic
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic)
            torch.backends.cudnn.benchmark = benchmark
