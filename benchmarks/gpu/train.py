"""Rung 8: the cost of training by each method, as in benchmarks/bench_kd.py, the share of a step in
which the device is busy, and the paper's figure.

The busy share is the time of a step's kernels, from a profiler, over the time of a step measured
without the profiler.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from ckd._console import console
from ckd._device import pick_device
from ckd.train.device import torch_state
from ckd.train.loop import train_epoch
from ckd.train.methods import METHODS, method_class
from ckd.train.run import set_up
from common import machine
from common.workers import Failed, Worker
from gpu.device import Device
from gpu.job import Job, Record
from training import report, tasks
from training.case import measure_case, settings_of
from training.gauge import Enough
from training.tasks import Setting

TEACHERS = ("ViT-B/16", "ViT-L/16")
PLAIN_STEPS, PROFILED_STEPS = 40, 10
PATIENCE = 60.0
RESERVE = 2.0  # seconds of the rung's time kept for its last lines
ENOUGH = 30.0  # seconds: with less time left, no further teacher begins
EPOCH_IMAGES = 50_000
FIGURE = "training.png"


def run(job: Job) -> None:
    device = Device.of(job)
    record: Record = {
        "benchmark": "kd",
        "machine": machine.describe(torch.get_num_threads(), device.name),
        "cases": [],
    }
    methods = ["embed-kd", "teacher-kd"] if job.rehearse else list(METHODS)
    for teacher in ("resnet20",) if job.rehearse else TEACHERS:
        if job.left < ENOUGH:
            job.line(f"{teacher}: left out, no time left")
            continue
        with tempfile.TemporaryDirectory(prefix="train-", dir=job.work) as folder:
            setting = setting_of(teacher, folder, job)
            record["settings"] = settings_of(setting, EPOCH_IMAGES)
            case = measure_case(methods, setting, EPOCH_IMAGES)
            record["cases"].append(case)
            job.put(bench_kd=record)
            summarise(case, job)
            draw(record, job)
            busy_shares(case, setting, device, job)


def setting_of(teacher: str, folder: str, job: Job) -> Setting:
    """The setting as published: students at 32 px, batches of 64, class centroids."""
    tiny = {
        "student": "vit:width=8,layers=1,heads=1",
        "image_size": 8,
        "batch_size": 4,
        "steps": 8,
        "seconds": 0.1,
        "amp": "off",
        "device": "cpu",
    }
    usual = {
        "student": "vit",
        "image_size": report.PAPER_SIZE,
        "batch_size": 64,
        "steps": 60,
        "seconds": 3.0,
        "amp": "bf16",
        "device": "cuda",
    }
    values: dict[str, Any] = tiny if job.rehearse else usual
    threads = torch.get_num_threads()
    return Setting(folder=folder, teacher=teacher, compile=False, threads=threads, **values)


def summarise(case: Record, job: Job) -> None:
    """Add a line: each method's time per step and memory, both also as multiples of embed-kd's."""
    texts = []
    for row in case["rows"]:
        if "failed" in row:
            job.wrong(f"{case['teacher']} {row['method']}: {row['failed']}")
            continue
        times, memory = row.get("time_of_embed") or 1, row.get("memory_of_embed") or 1
        joules = f" {1e3 * row['image_j']:.1f} mJ" if row["image_j"] else ""
        texts.append(
            f"{row['method']} {1e3 * row['step_s']['p50']:.3g} ms x{times:.1f} "
            f"{row['peak_mib']:,.0f} MiB x{memory:.1f}{joules}"
        )
    if "failed" in case["bank"]:
        job.wrong(f"{case['teacher']} bank: {case['bank']['failed']}")
    job.packed(f"{case['teacher']}:", texts)


def busy_shares(case: Record, setting: Setting, device: Device, job: Job) -> None:
    """Measure the busy share of each method: one after the other, in processes started together."""
    methods = [row["method"] for row in case["rows"] if "failed" not in row]
    methods = methods[:1] if job.rehearse else methods
    dim = case["about"].get("embedding_dim", 0)
    workers = {method: Worker(Steps, device, method, dim, setting) for method in methods}
    for worker in workers.values():
        worker.send("prepare")
    texts = []
    for method, worker in workers.items():
        try:
            found = worker.ask("measure", seconds=min(PATIENCE, max(1.0, job.left - RESERVE)))
        except Failed as failure:
            job.wrong(f"{case['teacher']} {method}, profiled: {failure}")
            continue
        finally:
            worker.kill()
        job.row(teacher=case["teacher"], method=method, **found)
        watts = f" {found['watts']:.0f} W" if found["watts"] else ""
        share = found["device_ms"] / found["step_ms"]
        texts.append(f"{method} {share:.0%}, {found['launches']:.0f} launches{watts}")
    job.packed(f"{case['teacher']}, device busy:", texts)


class Steps:
    """The trainer's own loop with one method, in a worker."""

    def __init__(self, device: Device, method: str, dim: int, setting: Setting) -> None:
        device.set_up()
        self._device, self._method, self._dim, self._setting = device, method, dim, setting

    def prepare(self) -> None:
        """Load the libraries, at the same time as the other workers."""
        tasks.load_libraries(self._setting, pick_device(self._setting.device))

    def measure(self) -> Record:
        """Time of a step, time and number of its kernels, and mean power."""
        device, setting = pick_device(self._setting.device), self._setting
        config = tasks.config_of(self._method, setting)
        if self._method == "embed-kd" and not Path(f"{setting.folder}/bank").exists():
            tasks.write_bank(Path(f"{setting.folder}/bank"), self._dim)
        counter = Counter(self._device, setting)
        with torch_state(config, device):
            run = set_up(config, device, method_class(config))
            with console(quiet=True), contextlib.suppress(Enough):
                train_epoch(run, counter)
        return counter.result()


class Counter:
    """The trainer's stop function, called after each step: warms up, then times, then profiles."""

    def __init__(self, device: Device, setting: Setting) -> None:
        self._device, self._power = device, Power(device)
        self._calls, self._marks = 0, list[float]()
        self._warm_up = setting.warm_up
        few = setting.steps < PLAIN_STEPS + PROFILED_STEPS
        self._plain, self._profiled = (2, 2) if few else (PLAIN_STEPS, PROFILED_STEPS)
        self._profile: Any = None

    def __call__(self) -> bool:
        self._calls += 1
        after = self._calls - self._warm_up
        if after == 0:
            self._device.sync()
            self._power.start()
        if 0 <= after <= self._plain:
            self._marks.append(time.perf_counter())
        if after == self._plain:
            self._device.sync()
            self._marks[-1] = time.perf_counter()  # after the synchronisation
            self._power.stop()
            kinds = torch.profiler.ProfilerActivity
            activity = kinds.CPU if self._device.rehearse else kinds.CUDA
            self._profile = torch.profiler.profile(activities=[activity])
            self._profile.start()
        if after == self._plain + self._profiled:
            self._device.sync()
            self._profile.stop()
            raise Enough
        return False

    def result(self) -> Record:
        spent, launches = 0.0, 0
        for event in self._profile.key_averages():
            if self._device.rehearse:
                spent += event.self_cpu_time_total
            elif event.self_device_time_total > 0:
                spent += event.self_device_time_total
                launches += event.count
        steps = self._profiled
        return {
            "step_ms": 1e3 * (self._marks[-1] - self._marks[0]) / self._plain,
            "device_ms": spent / 1e3 / steps,
            "launches": launches / steps,
            "watts": self._power.mean,
        }


class Power:
    """Mean watts, sampled by nvidia-smi; not if NVML is installed, which gives bench_kd joules."""

    def __init__(self, device: Device) -> None:
        self.mean: float | None = None
        self._stopped = threading.Event()
        wanted = not device.rehearse and importlib.util.find_spec("pynvml") is None
        self._thread: threading.Thread | None = None
        if wanted and shutil.which("nvidia-smi"):
            self._thread = threading.Thread(target=self._sample, daemon=True)

    def start(self) -> None:
        if self._thread is not None:
            self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _sample(self) -> None:
        watts: list[float] = []
        words = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
        while not self._stopped.is_set():
            done = subprocess.run(words, capture_output=True, text=True)
            with contextlib.suppress(ValueError, IndexError):
                watts.append(float(done.stdout.splitlines()[0]))
                self.mean = statistics.mean(watts)


def draw(record: Record, job: Job) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        job.put(figure="needs matplotlib")
    else:
        report.plot(record, job.file.parent / FIGURE)
