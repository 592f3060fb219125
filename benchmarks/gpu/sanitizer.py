"""Rung 5: compute-sanitizer's four tools, in parallel, on a program that runs every CUDA kernel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gpu.device import Device
from gpu.job import ROOT, Job, NotHere, pack

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
USUAL = Path("/usr/local/cuda/bin/compute-sanitizer")
FOUND = 9  # the exit status of a tool that found an error
SUMMARY = re.compile(r"(ERROR|RACECHECK) SUMMARY: (.*)")
MOST_LINES = 40  # lines kept of a tool's report


@dataclass
class Run:
    tool: str
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    start: float


def run(job: Job) -> None:
    device = Device.of(job)
    reason = device.missing("cuda")
    if reason is not None:
        raise NotHere(f"backend cuda cannot run: {reason}")
    if device.rehearse:
        runs = [begin("no tool", [], job, device)]
    else:
        path = shutil.which("compute-sanitizer") or (str(USUAL) if USUAL.exists() else None)
        if path is None:
            raise NotHere("no compute-sanitizer, in PATH or /usr/local/cuda/bin")
        own = [path, "--error-exitcode", str(FOUND), "--print-limit", "8", "--tool"]
        runs = [begin(tool, [*own, tool], job, device) for tool in TOOLS]
    texts: list[str] = []
    waiting = list(runs)
    while waiting:
        for one in [one for one in waiting if one.process.poll() is not None]:
            waiting.remove(one)
            texts.append(end(one, job))
            job.lines(pack("", texts))
        time.sleep(0.1)


def begin(tool: str, words: list[str], job: Job, device: Device) -> Run:
    """Start a tool, without torch's caching allocator: any access beyond a tensor is an error."""
    log = open(job.work / f"{tool}.txt", "w+b")  # noqa: SIM115  # closed by `end`
    program = [sys.executable, "-m", "gpu.sanitized"]
    program += ["--emulated", str(device.emulated)] if device.rehearse else []
    own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(
        [*words, *program],
        cwd=ROOT,
        env={**os.environ, **own},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    return Run(tool, process, log, time.monotonic())


def end(one: Run, job: Job) -> str:
    """Record a tool's report; returns a summary for the table."""
    one.log.seek(0)
    text = one.log.read().decode(errors="replace")
    one.log.close()
    code, seconds = one.process.returncode, time.monotonic() - one.start
    summaries = [match.group(2) for match in SUMMARY.finditer(text)]
    said = summaries[-1] if summaries else "no summary"
    report = [line for line in text.splitlines() if line.startswith("=====") or "WRONG" in line]
    job.row(tool=one.tool, code=code, seconds=seconds, summary=said, report=report[:MOST_LINES])
    if code == FOUND:
        job.wrong(f"{one.tool}: {said}: {first_finding(report)}")
    elif code != 0:
        last = (text.strip().splitlines() or ["nothing"])[-1]
        job.wrong(f"{one.tool}: exit status {code}: {last[:110]}")
    for line in [line for line in text.splitlines() if line.startswith("WRONG")][:4]:
        job.wrong(f"{one.tool}: {line.removeprefix('WRONG ')}")
    return f"{one.tool} {said if one.tool in TOOLS else 'ran'} ({seconds:.0f} s)"


def first_finding(report: list[str]) -> str:
    lines = [line.strip("= ") for line in report]
    lines = [line for line in lines if line and not line.startswith("COMPUTE-SANITIZER")]
    return (lines or ["nothing is named"])[0][:110]
