"""Compares the results of each wrapper in csrc/cuda/device.cuh on this chip with golden vectors:
the results of the emulation (docs/emulation.md)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import torch

from gpu.job import ROOT

PROGRAM = ROOT / "tests" / "emulation" / "wrappers.cu"
GOLDEN = PROGRAM.with_suffix(".golden")
SECONDS = 60
MOST_WRONG = 4  # vectors that are named


def check_wrappers(work: Path) -> tuple[str, bool]:
    """The program's last line, with the vectors that are wrong, and whether any is."""
    if not GOLDEN.exists() or not PROGRAM.exists():
        return f"wrappers of device.cuh: no {GOLDEN.relative_to(ROOT)}", False
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    arch = "{}{}".format(*torch.cuda.get_device_capability())
    program = work / "wrappers"
    words = [nvcc, "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    words += [f"-I{ROOT / 'csrc'}", str(PROGRAM), "-o", str(program)]
    try:
        built = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
        if built.returncode != 0:
            return f"wrappers of device.cuh: nvcc: {_last(built.stderr)}", True
        command = [str(program), "check", str(GOLDEN)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"wrappers of device.cuh: {error}"[:140], True
    print(done.stdout)
    wrong = [line.removeprefix("WRONG: ") for line in done.stdout.splitlines() if "WRONG" in line]
    texts = [*wrong[:MOST_WRONG], _last(done.stdout)]
    return f"wrappers of device.cuh: {'; '.join(texts)}", done.returncode != 0


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["nothing was said"])[-1][:90]
