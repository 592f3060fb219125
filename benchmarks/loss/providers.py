"""The providers of bench_loss.py: implementations of the loss by name."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ckd
from ckd import backends
from ckd.backends import cpu
from loss import peers
from loss.problem import Inputs, Problem, eager

Loss = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Provider:
    """An implementation; make() is called once, in the provider's worker, and returns the loss."""

    about: str
    make: Callable[[], Loss]
    half: bool = False  # computes with bfloat16
    compiles: bool = False  # its first call also compiles
    devices: tuple[str, ...] = ("cpu",)
    missing: Callable[[], str | None] = lambda: None  # why it cannot run here
    is_peer: bool = False  # another project's
    unfit: Callable[[Problem], str | None] = lambda problem: None  # why it lacks this loss
    truth: str = "eager"  # the key in TRUTHS of its reference


def eager_malloc() -> Loss:
    """eager with glibc's thresholds raised, as many training scripts do: by default glibc returns
    large blocks to the system after every call, and page faults cost more than some arithmetic."""
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max, top_pad = -1, -4, -2  # malloc.h
    for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 64 << 20)):
        if not libc.mallopt(option, value):
            raise RuntimeError(f"mallopt({option}, {value}) was refused")
    return eager


def compiled() -> Loss:
    """torch.compile without its on-disk cache, whose key lacks the vector width (torch 2.13): code
    that another process generated for AVX2 (ATEN_CPU_CAPABILITY) would be compiled for AVX-512 and
    write beyond the ends of arrays."""
    return torch.compile(eager, dynamic=False, options={"fx_graph_cache": False})


def eager_half(inputs: Inputs, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """eager under autocast, but the bank is converted directly, not by way of float32."""
    with torch.autocast(inputs.student.device.type, dtype=dtype):
        bank = inputs.bank.to(dtype)
        z = bank if inputs.weight is None else F.linear(bank, inputs.weight, inputs.bias)
        cosines = F.normalize(inputs.student, dim=1) @ F.normalize(z, dim=1).T
    return F.cross_entropy(inputs.logit_scale * cosines.float(), inputs.target)


def by_backend(name: backends.BackendName, half: bool, tier: str | None = None) -> Loss:
    def loss(inputs: Inputs) -> Tensor:
        i = inputs
        chosen: AbstractContextManager[None] = cpu.use_tier(tier) if tier else NOTHING
        device = i.student.device.type
        permitted = torch.autocast(device, dtype=torch.bfloat16) if half else NOTHING
        more: Any = {} if i.target_weight is None else {"target_weight": i.target_weight}
        with chosen, permitted:
            return ckd.contrastive_cross_entropy(
                i.student, i.bank, i.target, i.weight, i.bias, i.logit_scale, backend=name, **more
            )

    return loss


NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


def _no_glibc() -> str | None:
    return None if sys.platform == "linux" else "mallopt is glibc's"


def _no_compiler() -> str | None:
    return None if shutil.which("c++") or shutil.which("g++") else "needs a C++ compiler"


def _no_half() -> str | None:
    reason = backends.ORDER["cpu"].missing()
    if reason is None and not next(iter(cpu.TIERS.values())):
        reason = f"the kernels that are best here ({next(iter(cpu.TIERS))}) know float32 alone"
    return reason


BOTH = ("cpu", "cuda")


def _on_gpu(backend: backends.BackendName, half: bool) -> Provider:
    return Provider(
        f"ckd, {backend} kernels, {'float16 arithmetic' if half else 'float32'}",
        lambda: by_backend(backend, half),
        half,
        compiles=True,  # and tunes tiles
        devices=("cuda",),
        missing=lambda: backends.ORDER[backend].missing(),
    )


def _peer(
    about: str,
    make: Callable[[], Loss],
    package: str,
    devices: tuple[str, ...] = ("cuda",),
    **more: Any,
) -> Provider:
    missing = peers.needs(package)
    return Provider(about, make, devices=devices, missing=missing, is_peer=True, **more)


def _clip(about: str, make: Callable[[], Loss], truth: str) -> Provider:
    return _peer(about, make, "open_clip", BOTH, unfit=peers.only_in_batch, truth=truth)


PROVIDERS = {
    "eager": Provider("plain torch, float32", lambda: eager, devices=BOTH),
    "eager-malloc": Provider(
        "the same, malloc keeps freed blocks", eager_malloc, missing=_no_glibc
    ),
    "eager-bf16": Provider(
        "plain torch under autocast", lambda: eager_half, half=True, devices=BOTH
    ),
    "compile": Provider(
        "torch.compile of eager",
        compiled,
        compiles=True,
        missing=_no_compiler,
        devices=BOTH,
    ),
    "reference": Provider(
        "ckd, plain torch by tiles", lambda: by_backend("reference", False), devices=BOTH
    ),
    "cpu": Provider(
        "ckd, C++ kernels, float32",
        lambda: by_backend("cpu", False),
        missing=lambda: backends.ORDER["cpu"].missing(),
    ),
    "cpu-bf16": Provider(
        "ckd, C++ kernels, bfloat16 arithmetic",
        lambda: by_backend("cpu", True),
        half=True,
        missing=_no_half,
    ),
    "triton": _on_gpu("triton", False),
    "triton-half": _on_gpu("triton", True),
    "cuda": _on_gpu("cuda", False),
    "cuda-half": _on_gpu("cuda", True),
    "torch-linear": Provider(
        "torch's linear_cross_entropy in chunks",
        peers.torch_linear,
        is_peer=True,
        missing=peers.no_linear_cross_entropy,
        devices=BOTH,
    ),
    "liger": _peer(
        "liger-kernel's fused linear cross-entropy", peers.liger, "liger_kernel", compiles=True
    ),
    "cut-cross-entropy": _peer(
        "Apple's cut-cross-entropy, bfloat16 operands",
        peers.cut_cross_entropy,
        "cut_cross_entropy",
        half=True,
        compiles=True,
    ),
    "inf-cl": _peer(
        "Inf-CL's flash loss", peers.inf_cl, "inf_cl", compiles=True, unfit=peers.head_fits
    ),
    "open-clip": _clip("open_clip's ClipLoss, both directions", peers.clip, "clip"),
    "open-clip-siglip": _clip("open_clip's SigLipLoss", peers.siglip, "siglip"),
}
TRUTHS: dict[str, Loss] = {
    "eager": eager,
    "clip": peers.clip_truth,
    "siglip": peers.siglip_truth,
}


def of_device(device: str) -> list[str]:
    return [name for name, provider in PROVIDERS.items() if device in provider.devices]


def find(name: str) -> Provider:
    """A provider by its name; cpu:TIER and cpu-bf16:TIER force an instruction set.

    Raises ValueError for an unknown one.
    """
    base, _, tier = name.partition(":")
    if base not in PROVIDERS or (tier and not base.startswith("cpu")):
        raise ValueError(
            f"a provider is one of {', '.join(PROVIDERS)}, cpu:TIER or cpu-bf16:TIER; got {name!r}"
        )
    provider = PROVIDERS[base]
    if not tier:
        return provider
    half = provider.half
    if tier not in cpu.TIERS or (half and not cpu.TIERS[tier]):
        fit = [t for t, has_half in cpu.TIERS.items() if has_half or not half]
        raise ValueError(f"{name!r}: the tiers for {base} here are {', '.join(fit) or 'none'}")
    return Provider(f"{provider.about}, {tier}", lambda: by_backend("cpu", half, tier), half)
