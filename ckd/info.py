"""`python -m ckd.info`: what is installed, which backends work, and why the others do not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ckd
from ckd._json import document
from ckd.backends import Explanation, cpu, native
from ckd.cli.command import Output, parse, run

CORE = (
    *("torch", "triton", "numpy", "safetensors", "xxhash", "tqdm", "pillow"),
    *("tyro", "typeguard"),
)
# extra -> the distributions that it installs
EXTRAS = {
    "parquet": ("pyarrow",),
    "hf": ("transformers",),
    "timm": ("timm",),
    "onnx": ("onnx", "onnxscript"),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "plots": ("matplotlib",),
}


def native_module() -> str:
    """One line on `ckd._C`: how it was compiled, or why it is missing."""
    if importlib.util.find_spec("ckd._C") is None:
        return f"missing: {native.why_missing(Path(__file__).parent)}"
    if native.missing is not None:  # it cannot be loaded, or is of another tree
        return native.missing.removeprefix("ckd._C ").removeprefix("is ")
    info = native._C.build_info()
    openmp = "OpenMP" if info["openmp"] else "no OpenMP: one thread"
    return f"{info['compiler']}, C++ {info['cxx_standard']}, {info['architecture']}, {openmp}"


def cpu_tiers() -> str:
    """The instruction sets that the cpu backend has kernels for and this processor runs."""
    names = [f"{name} (with bfloat16)" if half else name for name, half in cpu.TIERS.items()]
    return f"{', '.join(names)}; the first is used" if names else "none"


def cuda_kernels() -> str:
    """What the CUDA kernels were compiled with and for, or why there are none."""
    return "none" if cpu.missing() is not None else cpu._C.build_info()["cuda"]


def gpus() -> list[str]:
    """The names of the GPUs that torch sees."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def explanations() -> dict[str, Explanation]:
    """For a bank on the CPU, and on the GPU if there is one: the backend that `auto` takes for
    float32 tensors, and why not the others."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {
        device: ckd.backends.explain(*torch.zeros(2, 1, 1, device=device).unbind())
        for device in devices
    }


def remedy() -> str | None:
    """What to do about missing CPU kernels, or None if they are there."""
    if cpu.missing() is None:
        return None
    return (
        f"the loss runs in plain PyTorch, with the same results but more slowly. This ckd is "
        f"{Path(ckd.__file__).parent}: if it is a source tree, install a C++ compiler (g++ or "
        "clang++) and run pip install -e . in it; if you meant an installed ckd, start Python in "
        "another folder than that source tree"
    )


def facts() -> dict[str, Any]:
    """The report in plain JSON values."""
    return {
        "ckd": ckd.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpus": gpus(),
        "native_module": native_module(),
        "cpu_kernels": [*cpu.TIERS],
        "cuda_kernels": cuda_kernels(),
        "packages": {name: version(name) for name in CORE},
        "extras": {extra: {name: version(name) for name in EXTRAS[extra]} for extra in EXTRAS},
        "backends": [*ckd.backends.available()],
        "auto": {
            device: {"backend": found.chosen, "reasons": found.reasons}
            for device, found in explanations().items()
        },
        "remedy": remedy(),
    }


def report() -> str:
    """The report, one fact per line."""
    rows = [
        ("ckd", ckd.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"),
        ("gpu", ", ".join(gpus()) or "no GPU"),
        ("ckd._C", native_module()),
        ("cpu kernels", cpu_tiers()),
        ("cuda kernels", cuda_kernels()),
    ]
    rows += [(name, version(name) or "missing") for name in CORE]
    for extra, distributions in EXTRAS.items():
        found = [f"{name} {version(name) or 'missing'}" for name in distributions]
        missing = any(version(name) is None for name in distributions)
        install = f"; pip install 'ckd[{extra}]'" if missing else ""
        rows.append((f"[{extra}]", ", ".join(found) + install))
    rows.append(("backends", ", ".join(ckd.backends.available())))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]
    if remedy() is not None:
        lines += ["", f"The CPU kernels are missing: {remedy()}."]
    for device, explanation in explanations().items():
        where = {"cpu": "CPU", "cuda": "GPU"}[device]
        lines += ["", f"for float32 tensors on the {where}:", str(explanation)]
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Command(Output):
    """Show what is installed, which backends work, and why the others do not."""

    def run(self) -> None:
        print(document(facts()) if self.json else report())


COMMAND = Command


def main(argv: Sequence[str] | None = None, prog: str = "python -m ckd.info") -> int:
    """Run the command line; returns the exit status."""
    return run(lambda given: parse(Command, given, prog), argv)


if __name__ == "__main__":
    sys.exit(main())
