"""Rung 2: builds ckd._C with the CUDA kernels, for the compute capability of this GPU alone.

A rehearsal compiles the kernels for the CPU, with the emulation.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from gpu.job import ROOT, Job, NotHere

WARNING = re.compile(r": warning|warning #|ptxas.*warning")  # of g++, nvcc and ptxas


def run(job: Job) -> None:
    start = time.monotonic()
    if job.rehearse:
        emulate(job)
        job.line(f"CUDA kernels for the CPU in {time.monotonic() - start:.0f} s")
        return
    if not torch.cuda.is_available():
        raise NotHere("torch sees no GPU to build for")
    arch = "{}{}".format(*torch.cuda.get_device_capability())
    output, code = install(arch, job)
    warnings = [text.strip() for text in output.splitlines() if WARNING.search(text)]
    job.put(seconds_to_build=time.monotonic() - start, warnings=warnings[:40])
    job.line(
        f"ckd._C for sm_{arch} in {time.monotonic() - start:.0f} s on {os.cpu_count()} cores, "
        f"{len(warnings)} warnings{': ' + warnings[0][:60] if warnings else ''}"
    )
    if code != 0:
        job.wrong(f"the build failed, exit status {code}: {last_error(output)}")
    reason = missing()
    if reason:
        job.wrong(f"backend cuda is not there: {reason}")


def install(arch: str, job: Job) -> tuple[str, int]:
    """The output of pip, and its exit status."""
    words = ["pip", "install", "-e", ".", "--no-build-isolation", "--no-deps", "-v"]
    own = {"CKD_CUDA": "1", "CKD_CUDA_ARCHS": arch}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout[-6000:])
    return done.stdout, done.returncode


def last_error(output: str) -> str:
    errors = [text.strip() for text in output.splitlines() if "error" in text.lower()]
    return errors[0][:120] if errors else "no error is named"


def missing() -> str | None:
    """The reason why backend cuda is missing in a new process, or None."""
    code = "from ckd import backends; print(backends.ORDER['cuda'].missing() or '')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or ["it cannot be imported"])[-1][:120]
    return done.stdout.strip() or None


def emulate(job: Job) -> None:
    """Build the emulated kernels, or copy a module built before, which CKD_TEST_EMULATED names."""
    from tests import cuda_emulation

    reason = cuda_emulation.missing()
    if reason is not None:
        raise NotHere(f"the CUDA kernels cannot be emulated: {reason}")
    job.emulated.parent.mkdir(parents=True, exist_ok=True)
    ready = os.environ.get("CKD_TEST_EMULATED")
    if ready:
        shutil.copy(ready, job.emulated)
    else:
        made = cuda_emulation.build_module(Path(job.work))
        made.replace(job.emulated)
