"""The machine of a measurement: hardware, versions, commit, and its arithmetic and memory rates."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ckd
from ckd.backends import cpu, native
from common.timing import seconds_of


def describe(threads: int, device: str = "cpu") -> dict[str, Any]:
    gpu = {}
    if device == "cuda":
        import triton

        gpu = {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda or torch.version.hip,
            "triton": triton.__version__,
        }
    return gpu | {
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ckd": ckd.__version__,
        "commit": commit(),
        "tiers": list(cpu.TIERS),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def processor() -> str:
    """The processor's name and its numbers, as the kernel reports them: virtual machines often hide
    the name, and may show other numbers than the processor's. What it can do is in `tiers`."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    numbers = "/".join(fields.get(name, "?") for name in ("cpu family", "model", "stepping"))
    name = fields.get("model name", platform.machine())
    return f"{name} (family/model/stepping {numbers})"


def commit() -> str:
    """The commit of the working tree; a + follows it if files differ from it."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + "+" * bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def limits(threads: int, device: str = "cpu") -> dict[str, float]:
    return _limits_of_gpu() if device == "cuda" else _limits_of_cpu(threads)


def _limits_of_gpu() -> dict[str, float]:
    """Best of several measurements, in 10^9 operations or bytes per second.

    gemm_*: torch.mm of 8192 x 8192, with which kernels are compared; read: torch.sum over 1 GiB.
    """
    found: dict[str, float] = {}
    for name, dtype in (("gemm_float32", torch.float32), ("gemm_bfloat16", torch.bfloat16)):
        a, b = torch.randn(2, 8192, 8192, device="cuda").to(dtype)
        found[name] = 2 * 8192**3 / _best(partial(torch.mm, a, b), "cuda") / 1e9
    block = torch.ones(256 << 20, device="cuda")
    found["read"] = 4 * block.numel() / _best(block.sum, "cuda") / 1e9
    return found


def _limits_of_cpu(threads: int) -> dict[str, float]:
    """Best of several short measurements, in 10^9 operations or bytes per second.

    gemm_float32 and gemm_bfloat16: the inner loop of the first tier's kernels on operands in the
    cache; matmul_*: torch.mm of 1024 x 1024; read: torch.sum over 256 MiB.
    """
    torch.set_num_threads(threads)
    found: dict[str, float] = {}
    if cpu.missing() is None:
        tier, half = next(iter(cpu.TIERS.items()))
        for name, wanted in (("gemm_float32", False), ("gemm_bfloat16", True)):
            if half or not wanted:
                found[name] = max(
                    native._C.cpu_gemm_peak(tier, wanted, threads, 0.2) for _ in range(5)
                )
    for name, dtype in (("matmul_float32", torch.float32), ("matmul_bfloat16", torch.bfloat16)):
        a, b = torch.randn(2, 1024, 1024).to(dtype)
        found[name] = 2 * 1024**3 / _best(partial(torch.mm, a, b)) / 1e9
    block = torch.ones(64 << 20)
    found["read"] = 4 * block.numel() / _best(block.sum) / 1e9
    return found


def _best(call: Callable[[], Any], device: str = "cpu", repeats: int = 15) -> float:
    return min(seconds_of(call, device) for _ in range(repeats))
