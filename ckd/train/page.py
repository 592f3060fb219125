"""report.html: collects what `ckd.report` shows of a finished run."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from typing import Any

import torch

from ckd._files import atomic_write
from ckd._hints import flag
from ckd.report.errors import Outcomes
from ckd.report.run import RunReport, Scored
from ckd.train.config import Config
from ckd.train.evaluation import labelled_rows, scored_batches
from ckd.train.run import Run

REPORT = "report.html"


def write_page(run: Run, result: Mapping[str, Any]) -> None:
    """Write report.html into the folder of a run that ends with `result`. Raises OSError."""
    config = run.config
    tested = _tested(run)
    page = RunReport(
        name=config.folder.absolute().name,
        settings=_settings(config),
        result=result,
        records=run.records,
        banks=config.bank,
        commands=_commands(config, has_head=run.student.num_classes is not None),
        tested=tested,
        unscored="" if tested else _unscored(run),
    )
    atomic_write(config.folder / REPORT, page.html())


def _unscored(run: Run) -> str:
    """Why there is no accuracy, no confusion matrix and no image."""
    if run.student.num_classes is None:
        why = "the student has no class head, since it was trained without labels"
    elif run.test_set is None:
        why = "the data have no test images"
    else:
        why = "no test image has a label"
    return f"Accuracy, confusion matrix and wrong images are left out: {why}."


def _tested(run: Run) -> Scored | None:
    """What the exported student says of the test images; None if none can be scored."""
    config, model, test_set = run.config, run.exported.model, run.test_set
    if test_set is None or not len(rows := labelled_rows(model, test_set)):
        return None
    columns = []
    for batch, logits in scored_batches(
        model, test_set, rows, config.batch_size, run.device, config.workers
    ):
        likely, predicted = logits.softmax(dim=1).max(dim=1)
        true = logits.log_softmax(dim=1).gather(1, batch.labels[:, None])[:, 0]
        columns.append([batch.labels.cpu(), predicted.cpu(), likely.cpu(), true.cpu()])
    outcomes = Outcomes(rows, *(torch.cat(column) for column in zip(*columns)))
    worst = rows[outcomes.worst]
    batches = test_set.batches(worst, config.batch_size, workers=0)
    images = [image for batch in batches for image in batch.images]
    return Scored(outcomes, images, test_set.class_names)


def _settings(config: Config) -> list[tuple[str, str, str]]:
    """(name, value, default) of each field, in words."""
    usual = Config()
    return [
        (field.name, _words(getattr(config, field.name)), _words(getattr(usual, field.name)))
        for field in dataclasses.fields(config)
    ]


def _words(value: Any) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def train_command(config: Config) -> str:
    """The command that trains as `config` says, in a folder beside that of the run."""
    words = ["ckd", "train"]
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), flag(field.name)
        if field.name == "out":
            words += _given(name, f"{config.folder}-again")
        elif value == field.default:
            continue
        elif isinstance(value, bool):
            words.append(name if value else name.replace("--", "--no-", 1))
        elif field.name == "bank":
            words += [word for bank in value for word in _given(name, bank)]
        elif isinstance(value, tuple):
            words += [name, *map(str, value)]
        else:
            words += _given(name, str(value))
    return shlex.join(words)


def _given(name: str, value: str) -> list[str]:
    return [f"{name}={value}"] if value.startswith("-") else [name, value]


def _commands(config: Config, has_head: bool) -> list[tuple[str, str]]:
    """What to do with the student, for paths as the run was given them."""
    folder = shlex.quote(str(config.folder))
    python = [
        "import ckd, torch",
        "from PIL import Image",
        "",
        f"student = ckd.load_student({json.dumps(str(config.folder), ensure_ascii=False)})",
        'x = student.preprocess([Image.open("image.png")])',
        "with torch.inference_mode():",
        "    embedding = student.embedding(x)",
    ]
    commands = []
    if has_head:
        commands.append(("Classify images", f"ckd predict {folder} image.png"))
        python += [
            "    probabilities = student.logits(x).softmax(dim=1)",
            "print(student.class_names[probabilities[0].argmax()])",
        ]
    commands.append(("In Python", "\n".join(python)))
    if config.bank:
        bank = shlex.quote(config.bank[0])
        commands.append(("Measure it beside its teacher", f"ckd eval {folder} --bank {bank}"))
    return [*commands, ("Train it again", train_command(config))]
