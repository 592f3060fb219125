"""The program for compute-sanitizer: every CUDA kernel of ckd, each tensor its own allocation.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m gpu.sanitized

Inputs and float64 results are made on the CPU: hardly any other kernel runs on the GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import ckd
from gpu.cases import EXACT, HALF, Case, Results, Shape, make_case, truth
from gpu.checks import judge, ours
from gpu.device import Device

# Each layout of the kernels, with ragged edges; rows of width 43 begin at odd addresses.
SHAPES = (
    Shape("W 250", 66, 97, 40, 250),
    Shape("W 64", 20, 130, 43, 64, smoothing=0.1, ignored=True),
    Shape("W 300", 9, 70, 40, 300, lse=True),
    Shape("W 128, float32 bank", 33, 70, 20, 128, bank=torch.float32, reduction="none"),
    Shape("no projection", 5, 70, 24, 24, projection=False),
)
CHUNK_ROWS = 64  # cuts the bank into chunks, so that the kernel that joins them runs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Runs every CUDA kernel.")
    parser.add_argument("--emulated", type=Path, help="a rehearsal: the module of emulated kernels")
    path = parser.parse_args(arguments).emulated
    device = Device(path is not None, path or Path())
    device.set_up()
    from ckd.backends import cuda

    cuda.gpu = type(cuda.gpu)(chunk_rows=CHUNK_ROWS)
    wrong: list[str] = []
    for number, shape in enumerate(SHAPES):
        ckd.backends.set_cache_limit(0 if number % 2 == 0 else 1 << 27)
        case = make_case(shape, "cpu")
        exact, sizes = truth(case)
        for kind in (HALF, EXACT):
            found = {name: x.cpu() for name, x in ours(to(case, device), "cuda", kind).items()}
            none = dict.fromkeys(found, 0.0)
            wrong += [
                f"{shape.name} {kind}: {text}"
                for text in judge(found, exact, sizes, none, kind, shape.tau)[1]
            ]
            similarity(case, device, kind)
        device.sync()
    print("\n".join(f"WRONG {text}" for text in wrong) or "all right", flush=True)
    return 1 if wrong else 0


def to(case: Case, device: Device) -> Case:
    moved: dict[str, Any] = {
        name: x.to(device.name) for name, x in vars(case).items() if isinstance(x, torch.Tensor)
    }
    return replace(case, **moved)


def similarity(case: Case, device: Device, kind: str) -> Results:
    """Run forward and backward; rung `right` checks the values."""
    case = to(case, device).with_leaves()
    with torch.autocast(device.name, dtype=torch.bfloat16, enabled=kind == HALF):
        inputs = (case.student, case.bank, case.weight, case.bias, case.logit_scale)
        logits = ckd.normalized_similarity(*inputs, backend="cuda")
    leaves = case.leaves()
    upstream = torch.linspace(-1, 1, logits.numel()).view(logits.shape).to(device.name)
    return dict(zip(leaves, torch.autograd.grad(logits, list(leaves.values()), upstream)))


if __name__ == "__main__":
    sys.exit(main())
