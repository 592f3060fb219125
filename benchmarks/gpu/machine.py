"""Rung 1: names and versions; rates of copies and half-precision products, cost of launches."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from typing import Any

import torch

from gpu.device import Device
from gpu.job import Job, NotHere

PACKAGES = (
    *("torch", "triton", "setuptools", "pybind11", "ninja", "pytest", "pytest-xdist"),
    *("timm", "transformers", "matplotlib", "nvidia-ml-py"),
)
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"


def run(job: Job) -> None:
    from common import machine

    job.put(commit=machine.commit(), versions=versions())
    if not job.rehearse and not torch.cuda.is_available():
        raise NotHere("torch sees no GPU")
    device = Device.of(job)
    gpu = "the CPU" if job.rehearse else torch.cuda.get_device_name()
    found = job.record["versions"]
    text = ", ".join(f"{name} {found[name]}" for name in ("torch", "triton", "nvcc"))
    job.put(machine=machine.describe(torch.get_num_threads(), device.name), smi=smi())
    job.line(f"{gpu}, {text}, commit {job.record['commit']}")
    tera, giga = product_rate(device), copy_rate(device)
    called, replayed = launch_us(device)
    job.row(fp16_tflops=tera, copy_gb_s=giga, launch_us=called, graph_launch_us=replayed)
    job.line(
        f"fp16 product {tera:,.3g} TF/s, copy {giga:,.4g} GB/s, a launch {called:.1f} us, "
        f"in a graph {replayed:.1f} us"
    )


def versions() -> dict[str, str]:
    found = {"nvcc": nvcc()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def nvcc() -> str:
    if shutil.which("nvcc") is None:
        return "none"
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    return text.partition("release ")[2].partition(",")[0] or "unknown"


def smi() -> str:
    """The output of nvidia-smi on the GPU, its clocks and its power limit."""
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def product_rate(device: Device) -> float:
    """TF/s of a product of square float16 matrices."""
    size = 256 if device.rehearse else 8192
    a, b = torch.randn(2, size, size, device=device.name).half()
    return 2 * size**3 / device.median_ms(lambda: a @ b, 3 if device.rehearse else 20) / 1e9


def copy_rate(device: Device) -> float:
    """GB/s of a copy, reads plus writes."""
    size = (1 << 20) if device.rehearse else (1 << 30)
    source = torch.ones(size, dtype=torch.uint8, device=device.name)
    to = torch.empty_like(source)
    return 2 * source.numel() / device.median_ms(lambda: to.copy_(source), 10) / 1e6


def launch_us(device: Device, launches: int = 200) -> tuple[float, float]:
    """Microseconds per launch of a tiny kernel: from Python, and replayed in a CUDA graph."""
    x = torch.zeros(16, device=device.name)

    def calls() -> None:
        for _ in range(launches):
            x.add_(1)

    called = 1e3 * device.median_ms(calls, 5, queue_ms=0) / launches
    if device.rehearse:
        return called, called
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return called, 1e3 * device.median_ms(graph.replay, 5) / launches
