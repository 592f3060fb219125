"""Rung 9: the four methods on a data set, one seed, by benchmarks/accuracy.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gpu.device import Device
from gpu.job import ROOT, Job, NotHere

SETTINGS = "plain,logit-kd,teacher-kd,centroids,samples,mse"
EPOCHS, SECONDS = 60, 960.0  # epochs that fit into these seconds; fewer in less time
STUDENT, TEACHER = "resnet20", "resnet56"
TINY = "vit:width=16,layers=1,heads=2"


def run(job: Job) -> None:
    device = Device.of(job)
    if device.rehearse:
        weights = random_teacher(job.work / "teacher.safetensors")
        words = ["--data", "digits", "--teacher", TINY, "--student", TINY]
        words += ["--settings", "centroids", "--epochs", "1"]
        measure(job, [*words, "--teacher-weights", str(weights)])
        return
    if job.data is None:
        raise NotHere("needs --data, and --teacher-weights of a trained resnet56")
    if job.teacher_weights is None:
        raise NotHere("needs --teacher-weights of a trained resnet56")
    epochs = max(1, min(EPOCHS, int(EPOCHS * job.left / SECONDS)))
    words = ["--data", job.data, "--teacher", TEACHER, "--student", STUDENT]
    words += ["--settings", SETTINGS, "--epochs", str(epochs)]
    job.put(epochs=epochs)
    measure(job, [*words, "--teacher-weights", job.teacher_weights])


def measure(job: Job, words: list[str]) -> None:
    """Run benchmarks/accuracy.py; its table becomes the rung's lines."""
    out = job.work / "accuracy"
    program = str(ROOT / "benchmarks" / "accuracy.py")
    done = subprocess.run(
        [sys.executable, program, *words, "--seeds", "1", "--out", str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    print(done.stdout)
    for line in done.stdout.splitlines():
        if line.startswith("| ") and "---" not in line:
            job.line(line)
    if done.returncode != 0:
        raise RuntimeError(f"benchmarks/accuracy.py ended with status {done.returncode}")


def random_teacher(path: Path) -> Path:
    from ckd import models

    models.save(models.create(TINY, num_classes=10, image_size=8, in_channels=1), path)
    return path
