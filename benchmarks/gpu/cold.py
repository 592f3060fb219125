"""Part of rung `fast`: the first step of a new process, with an empty Triton cache."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from gpu.contenders import OWN
from gpu.device import BACKENDS, Device
from gpu.job import ROOT, Job, Record
from loss.problem import Problem

COLD = """
import time, torch
start = time.perf_counter()
import ckd
from gpu.device import Device
from gpu.timed import Bench
from loss.problem import Problem
from pathlib import Path
bench = Bench(Device({rehearse}, Path({emulated!r})), {provider!r})
imported = time.perf_counter()
found = bench.load(Problem{sizes})
print("cold", imported - start, found["first_step_s"])
"""


def cold_starts(job: Job, device: Device, problem: Problem) -> None:
    """Time the first step of a new process, with an empty Triton cache, for each backend."""
    texts = []
    able = [name for name, backend in zip(OWN, BACKENDS) if device.missing(backend) is None]
    start = functools.partial(
        cold_start, device=device, problem=problem, seconds=min(60.0, job.left)
    )
    with ThreadPoolExecutor() as pool:  # in parallel: each compiles on a core of its own
        results = list(pool.map(start, able))
    for provider, found in zip(able, results):
        job.row(case="cold start", provider=provider, **found)
        text = found.get("failed") or f"{found['step_s']:.1f} s (import {found['import_s']:.1f} s)"
        texts.append(f"{provider} {text}")
    job.line(f"cold start, a first step: {', '.join(texts)}")


def cold_start(provider: str, device: Device, problem: Problem, seconds: float) -> Record:
    sizes = (problem.batch, problem.bank_rows, problem.teacher_dim, problem.student_dim)
    code = COLD.format(
        rehearse=device.rehearse, emulated=str(device.emulated), provider=provider, sizes=sizes
    )
    with tempfile.TemporaryDirectory(prefix="cold-") as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        start = time.perf_counter()
        try:
            done = subprocess.run(
                [sys.executable, "-c", code],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {seconds:.0f} s"}
    for text in done.stdout.splitlines():
        if text.startswith("cold "):
            imported, step = map(float, text.split()[1:])
            whole = time.perf_counter() - start
            return {"import_s": imported, "step_s": step, "process_s": whole}
    return {"failed": (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:100]}
