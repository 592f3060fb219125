"""`python -m ckd.info`: what is installed, which backends work, and why the others do not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import ckd
from ckd.backends import cpu
from ckd.cli.command import parse, run

CORE = (
    *("torch", "triton", "numpy", "safetensors", "xxhash", "tqdm", "pillow"),
    *("tyro", "typeguard"),
)
# extra -> the distributions that it installs
EXTRAS = {
    "parquet": ("pyarrow",),
    "hf": ("transformers",),
    "timm": ("timm",),
    "tensorboard": ("tensorboard",),
    "plots": ("matplotlib",),
}


def native_module() -> str:
    """One line on `ckd._C`: how it was compiled, or why it is missing."""
    if importlib.util.find_spec("ckd._C") is None:
        report = Path(__file__).with_name("_build.json")
        if not report.exists():
            return "missing: never built here; install with pip install -e ."
        return f"missing: {json.loads(report.read_text())['reason']}"
    try:
        from ckd import _C
    except ImportError as error:
        return f"present but cannot be loaded: {error}"
    info = _C.build_info()
    openmp = "OpenMP" if info["openmp"] else "no OpenMP: one thread"
    return f"{info['compiler']}, C++ {info['cxx_standard']}, {info['architecture']}, {openmp}"


def cpu_tiers() -> str:
    """The instruction sets that the cpu backend has kernels for and this processor runs."""
    names = [f"{name} (with bfloat16)" if half else name for name, half in cpu.TIERS.items()]
    return f"{', '.join(names)}; the first is used" if names else "none"


def cuda_kernels() -> str:
    """What the CUDA kernels were compiled with and for, or why there are none."""
    return "none" if cpu.missing() is not None else cpu._C.build_info()["cuda"]


def devices() -> str:
    if not torch.cuda.is_available():
        return "no GPU"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names)


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def report() -> str:
    """The report, one fact per line."""
    rows = [
        ("ckd", ckd.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"),
        ("gpu", devices()),
        ("ckd._C", native_module()),
        ("cpu kernels", cpu_tiers()),
        ("cuda kernels", cuda_kernels()),
    ]
    rows += [(name, version(name) or "missing") for name in CORE]
    for extra, distributions in EXTRAS.items():
        found = [f"{name} {version(name) or 'missing'}" for name in distributions]
        rows.append((f"[{extra}]", ", ".join(found)))
    rows.append(("backends", ", ".join(ckd.backends.available())))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]

    student, bank = torch.zeros(1, 1), torch.zeros(1, 1)
    explanation = str(ckd.backends.explain(student, bank))
    return "\n".join([*lines, "", "for float32 tensors on the CPU:", explanation])


@dataclass(frozen=True)
class Command:
    """Show what is installed, which backends work, and why the others do not."""

    def run(self) -> None:
        print(report())


def main(argv: Sequence[str] | None = None, prog: str = "python -m ckd.info") -> int:
    """Run the command line; returns the exit status."""
    return run(lambda given: parse(Command, given, prog), argv)


if __name__ == "__main__":
    sys.exit(main())
