"""The providers of rung `fast`: our backends, eager torch, peers and rivals.

Peers (loss/peers.py) compute the same loss. Rivals compute another one, between the two towers of a
batch of pairs: their rows show the cost of such a step, on the case `pairs` alone. Plain torch
gives them unit rows in half precision, as their documentation shows.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu.device import BACKENDS, Device
from gpu.job import Job
from loss import peers
from loss.problem import LOGIT_SCALE, Inputs, unit_rows

Loss = Callable[[Inputs], Tensor]
CUBLAS = "cublas"  # F0: one product of the logits' shape, in chunks
EAGER = "eager-fp16"
OWN = tuple(f"{backend}-half" for backend in BACKENDS)
# name -> (package, arithmetic); all store the bank's unit rows and a gradient for them.
PEERS = {
    "torch-linear": ("torch", "float32"),
    "liger": ("liger_kernel", "float32"),
    "cut-cross-entropy": ("cut_cross_entropy", "bfloat16"),
    "inf-cl": ("inf_cl", "float32"),
}


@dataclass(frozen=True)
class Rival:
    package: str
    note: str  # how its loss differs
    make: Callable[[], Loss]


def memeff_lit() -> Loss:
    module = importlib.import_module("memeff")
    fused = module.MemoryEfficientLiTLoss(temperature=1 / LOGIT_SCALE, normalized_inputs=True)

    def loss(inputs: Inputs) -> Tensor:
        u, n = unit_rows(inputs)
        result: Tensor = fused(u.half(), n.half())
        return result

    return loss


def siglip() -> Loss:
    fused = importlib.import_module("siglip_kernel").fused_siglip_loss

    def loss(inputs: Inputs) -> Tensor:
        u, n = unit_rows(inputs)
        bias = torch.tensor(peers.SIGLIP_BIAS, device=u.device, requires_grad=True)
        scale = torch.tensor(math.log(LOGIT_SCALE), device=u.device, requires_grad=True)
        result: Tensor = fused(u.bfloat16(), n.bfloat16(), scale, bias)
        return result

    return loss


RIVALS = {
    "memeff": Rival("memeff", "LiT: both directions, one tower's gradient", memeff_lit),
    "siglip-kernel": Rival("siglip_kernel", "a sigmoid for each pair", siglip),
}
NOTES = {name: note for name, (_, note) in PEERS.items()}
NOTES |= {name: rival.note for name, rival in RIVALS.items()}


def contenders(job: Job, device: Device) -> tuple[list[str], dict[str, str]]:
    """The providers that can run here, and the reasons of the peers that cannot."""
    able, absent = [CUBLAS], {}
    for name in OWN:
        reason = device.missing(name.removesuffix("-half"))
        if reason is None:
            able.append(name)
        else:
            job.wrong(f"backend {name} cannot run: {reason}")
    able.append(EAGER)
    packages = {name: package for name, (package, _) in PEERS.items()}
    packages |= {name: rival.package for name, rival in RIVALS.items()}
    for name, package in packages.items():
        # Not imported here: an import is slow and may fail, so its worker does it.
        reason = None if importlib.util.find_spec(package) else "not installed"
        if name == "torch-linear":
            reason = peers.no_linear_cross_entropy()
        if device.rehearse:
            reason = reason or "not in a rehearsal"
        if reason is None:
            able.append(name)
        else:
            absent[name] = reason
    return able, absent


def absent_text(absent: dict[str, str]) -> str:
    reasons = {why: [n for n, other in absent.items() if other == why] for why in absent.values()}
    return "; ".join(f"{why}: {', '.join(names)}" for why, names in reasons.items())
