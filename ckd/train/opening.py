"""The first lines of a run: what it trains on, what it trains, and what computes its loss."""

from __future__ import annotations

from ckd import models
from ckd._errors import one_line
from ckd.backends import Explanation
from ckd.train.device import autocast
from ckd.train.report import hardware
from ckd.train.run import Run


def backends_of(run: Run) -> dict[str, Explanation]:
    """The choice of a backend for each term that calls an op, by the term's name."""
    batch = min(run.config.batch_size, len(run.train_set))
    with autocast(run.config, run.device):
        return run.method.backends(batch)


def opening_lines(run: Run, backends: dict[str, Explanation]) -> list[str]:
    """The lines to print before the first step."""
    config, hard = run.config, hardware(run.device)
    threads = hard["threads"]
    rows = [
        ("data", f"{config.data}: {_images(run)}"),
        ("student", f"{config.student}, {models.parameter_count(run.student):,} parameters"),
        ("loss", f"{config.method}: {_terms(run)}"),
        *run.method.sources(),
        ("device", f"{run.device} ({hard['device']}), {threads} CPU thread{'s' * (threads > 1)}"),
    ]
    choices: dict[str, list[str]] = {}
    for name, choice in backends.items():
        why = "; ".join(_passed_over(choice))
        words = f"{choice.chosen} ({why})" if why else choice.chosen
        choices.setdefault(words, []).append(name)
    rows += [("backend", f"{words} for {', '.join(names)}") for words, names in choices.items()]
    if run.progress.step:
        rows.append(("resumed", f"after step {run.progress.step:,}"))
    return [one_line(f"{name:<9} {text}") for name, text in rows]  # a bank names its teacher


def _images(run: Run) -> str:
    train, test = run.train_set, run.test_set
    if test is None:
        return f"{len(train):,} training images, no test images"
    words = f"{len(train):,} training images, {len(test):,} test images"
    if train.held_out:
        total = len(train) + len(test)
        words += (
            f" (held out by ckd: {len(test):,} of {total:,}, since the data have no test split)"
        )
    return words


def _terms(run: Run) -> str:
    """The terms of the loss with their weights."""
    names = run.method.term_names()
    if run.method.label_weight > 0 and run.student.num_classes is not None:
        names = ["cross_entropy", *names]
    return " + ".join(f"{run.method.weight_of(name):g} {name}" for name in names)


def _passed_over(choice: Explanation) -> list[str]:
    """Why each backend that comes before the chosen one cannot serve, in one clause."""
    names = list(choice.reasons)
    earlier = names[: names.index(choice.chosen)]
    reasons = {name: (choice.reasons[name] or "").partition("; ")[0] for name in earlier}
    return [f"not {name}: {reason}" for name, reason in reasons.items()]
