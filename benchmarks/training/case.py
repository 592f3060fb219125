"""A table of bench_kd.py: all methods and the bank, for one teacher and one image size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from common.workers import Process, Result, finish, take_turns
from training.report import derive
from training.tasks import (
    CLASSES,
    Setting,
    make_teacher,
    measure_bank,
    measure_training,
    write_images,
)


def measure_case(methods: Sequence[str], setting: Setting, epoch_images: int) -> Result:
    """Measure a case; its record, with figures extrapolated to an epoch of `epoch_images`."""
    write_images(setting)
    about = finish(start(setting, make_teacher, setting))
    results = measure(methods, about, setting)
    case = {
        "teacher": setting.teacher,
        "image_size": setting.image_size,
        "about": about,
        "bank": results["bank"],
        "rows": [{"method": method, **results[method]} for method in methods],
    }
    derive(case, {"epoch_images": epoch_images, "batch_size": setting.batch_size})
    return case


def measure(methods: Sequence[str], about: Result, setting: Setting) -> dict[str, Result]:
    """Results of the methods and the bank by name. If the teacher could not be made, its failure is
    the result of all but `plain`."""
    waiting: dict[str, Callable[[], Process]] = {}
    dim = about.get("embedding_dim", 0)
    for method in methods:
        waiting[method] = partial(start, setting, measure_training, method, dim, setting)
    waiting["bank"] = partial(start, setting, measure_bank, setting)
    if "failed" not in about:
        return take_turns(waiting, together=setting.device == "cuda")
    able = {name: begin for name, begin in waiting.items() if name == "plain"}
    return {name: dict(about) for name in waiting} | take_turns(able)


def start(setting: Setting, task: Callable[..., Result], *arguments: Any) -> Process:
    return Process(task, *arguments, threads=setting.threads)


def settings_of(options: Any, epoch_images: int) -> Result:
    """The settings of a record, from a Setting or from a command's options."""
    names = ("student", "batch_size", "amp", "compile", "steps", "seconds")
    own = {name: getattr(options, name) for name in names} | {"epoch_images": epoch_images}
    return own | {"images": f"synthetic (random uint8, {CLASSES} classes)"}
