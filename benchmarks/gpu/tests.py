"""Rung 6: the tests that need a GPU, in as many processes as there are cores."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

from gpu.device import Device
from gpu.job import ROOT, Job

# The files with tests that run on every backend installed, or are marked for GPUs.
FILES = (
    "test_contrastive_ce.py",
    "test_contrastive_ce_autograd.py",
    "test_weighted_targets.py",
    "test_gpu_backends.py",
    "test_similarity.py",
    "test_triton_tuning.py",
    "test_cuda_kernels.py",
    "test_ops_library.py",
)
CHOSEN = "triton or cuda or gpu"
REHEARSED = "(triton or cuda) and (one_bank_row or ignore_index_inside)"
MOST_WORKERS = 12
# "tests/test_a.py::test_b[c] PASSED [ 1%]", or by xdist: "[gw0] [ 1%] PASSED tests/..."
RESULT = re.compile(r"(?:(tests/\S.*?) )?(PASSED|FAILED|ERROR|SKIPPED)(?: (tests/\S.*))?")


def run(job: Job) -> None:
    device = Device.of(job)
    counts = {"PASSED": 0, "FAILED": 0, "ERROR": 0, "SKIPPED": 0}
    process = subprocess.Popen(
        command(job),
        cwd=ROOT,
        env=environment(device),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for text in process.stdout:
        print(text, end="", flush=True)
        match = RESULT.search(text)
        if match is None or "::" not in text or text.startswith(("FAILED", "ERROR")):
            continue  # lines that begin with these are pytest's summary
        counts[match.group(2)] += 1
        if match.group(2) in ("FAILED", "ERROR"):
            job.wrong((match.group(1) or match.group(3)).removeprefix("tests/").strip())
        if sum(counts.values()) % 10 == 0:
            job.lines([in_words(counts)])
    code = process.wait()
    job.put(counts=counts)
    job.lines([in_words(counts)])
    if code != 0 and not job.record["wrong"]:
        job.wrong(f"pytest ended with status {code}")
    if counts["PASSED"] == 0:
        job.wrong("no test passed")


def in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name.lower()}" for name, count in counts.items() if count)


def command(job: Job) -> list[str]:
    files = [f"tests/{file}" for file in FILES if (ROOT / "tests" / file).exists()]
    words = [sys.executable, "-m", "pytest", "-vv", "-W", "ignore", "--color=no"]
    if job.rehearse:
        return [*words, "-k", REHEARSED, files[0]]
    if "--slow" in (ROOT / "tests" / "conftest.py").read_text():
        words.append("--slow")  # slow is said of a CPU
    words += ["-k", CHOSEN, *files]
    if importlib.util.find_spec("xdist") is not None:
        words += ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1))]
    return words


def environment(device: Device) -> dict[str, str]:
    own = {}
    if device.rehearse and device.emulated.exists():
        own["CKD_TEST_EMULATED"] = str(device.emulated)
    return {**os.environ, **own}
