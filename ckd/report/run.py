"""The page of one run: report.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ckd._version import __version__
from ckd.report.charts import Series, chart
from ckd.report.errors import PIXELS, Outcomes, confusion, png_uri
from ckd.report.page import render
from ckd.report.words import duration, interval, number, peak_mib, percent, short

EPOCH_ROWS = 100  # of the table of epochs, at most


@dataclass(frozen=True)
class Scored:
    """A student's outcomes on labelled test images.

    images: uint8 [C, H, W] each, those of `outcomes.worst`. class_names: of the labels.
    """

    outcomes: Outcomes
    images: Sequence[Tensor]
    class_names: Sequence[str]


@dataclass(frozen=True)
class RunReport:
    """What the page shows of a run.

    settings: (name, value, default value), in words. result: result.json. records: the lines of
    metrics.jsonl. tested: None if nothing was scored, for the reason `unscored`. banks: names.
    commands: (what it is for, what a user types) of each.
    """

    name: str
    settings: Sequence[tuple[str, str, str]]
    result: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    banks: Sequence[str]
    commands: Sequence[tuple[str, str]]
    tested: Scored | None
    unscored: str = ""

    def html(self) -> bytes:
        """report.html: UTF-8, self-contained, the same bytes for the same values."""
        result, tested = self.result, self.tested
        return render(
            "run.html",
            name=self.name,
            subtitle=f"{result['method']}: {short(result['student'])} on {short(result['data'])}",
            cards=self._cards(),
            unscored=self.unscored,
            charts=_charts(self.records),
            epochs=_epochs(self.records),
            confusion=confusion(tested.outcomes, tested.class_names) if tested else None,
            images=_images(tested) if tested else [],
            commands=self.commands,
            changed=[(name, value) for name, value, usual in self.settings if value != usual],
            unchanged=[(name, value) for name, value, usual in self.settings if value == usual],
            figures=self._figures(),
            version=__version__,
        )

    def _cards(self) -> list[tuple[str, str, str]]:
        """(label, value, detail) of the figures at the top."""
        result = self.result
        cards = []
        if self.tested is not None:
            correct, images = self._correct()
            low, high = interval(correct, images)
            detail = f"{correct:,} of {images:,} test images; 95\u00a0% interval "
            detail += f"{100 * low:.1f} to {100 * high:.1f}\u00a0%"
            cards.append(("test accuracy", percent(result["test_accuracy"]), detail))
        epochs = "1 epoch" if result["epochs"] == 1 else f"{result['epochs']:,} epochs"
        rate = f"{result['images_per_s']:,.0f} images/s"
        where = "on the GPU" if "peak_cuda_mib" in result else "of the process"
        return [
            *cards,
            ("training time", duration(result["train_time_s"]), f"{epochs}, {rate}"),
            ("peak memory", f"{peak_mib(result):,.0f} MiB", where),
            ("parameters", f"{result['parameters']:,}", ""),
        ]

    def _correct(self) -> tuple[int, int]:
        """k of n, the accuracy in result.json."""
        assert self.tested is not None
        images = len(self.tested.outcomes.labels)
        return round(self.result["test_accuracy"] * images), images

    def _figures(self) -> list[tuple[str, str]]:
        result, machine = self.result, self.result["hardware"]
        rows = []
        if self.tested is not None:
            correct, images = self._correct()
            best = f"{percent(result['best_test_accuracy'])} (epoch {result['best_epoch']:,})"
            rows += [
                (
                    "test accuracy",
                    f"{percent(result['test_accuracy'])} ({correct:,} of {images:,} images)",
                ),
                ("test loss", number(result["test_loss"])),
                ("best test accuracy", best),
            ]
        if (trained := result.get("train_images")) is not None:
            rows.append(("training images", f"{trained:,}"))
        if result.get("held_out"):
            rows.append(("test images", "held out of the training images by ckd"))
        memory = (
            "allocated on the GPU"
            if "peak_cuda_mib" in result
            else "of the whole process, PyTorch included"
        )
        rows += [
            ("training time", duration(result["train_time_s"])),
            ("time per epoch (median)", duration(result["time_per_epoch_s"])),
            ("images per second (median)", f"{result['images_per_s']:,.0f}"),
            ("peak memory", f"{peak_mib(result):,.0f} MiB, {memory}"),
            ("parameters", f"{result['parameters']:,}"),
            ("student", result["student"]),
            ("bank", ", ".join(self.banks) or "none"),
        ]
        if "backend" in result:
            rows.append(
                ("backend of the contrastive loss", result["backend"] or "none: no such loss")
            )
        return [
            *rows,
            ("seed", str(result["seed"])),
            ("device", f"{machine['device']}, CPU threads: {machine['threads']}"),
            (
                "system",
                f"{machine['system']}, Python {machine['python']}, torch {machine['torch']}",
            ),
        ]


def loss_terms(record: Mapping[str, Any]) -> list[str]:
    """The names of the loss and its terms in a line of metrics.jsonl: what stands before the
    scores."""
    names = list(record)
    return [name for name in names[: names.index("test_accuracy")] if name not in ("epoch", "step")]


def _words(term: str) -> str:
    return "total" if term == "loss" else term.replace("_", " ")


def _charts(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if len(records) < 2:
        return []
    epochs = [record["epoch"] for record in records]
    terms = loss_terms(records[0])
    if terms == ["loss", "cross_entropy"]:
        terms = terms[:1]  # without distillation both are the same curve
    lines = [
        Series(_words(term), epochs, [record.get(term) for record in records], colour)
        for colour, term in enumerate(terms)
    ]
    scored = records[-1]["test_accuracy"] is not None
    if scored:
        losses = [record["test_loss"] for record in records]
        lines.append(Series("test cross entropy", epochs, losses, colour=6, dashed=True))
    options: dict[str, Any] = {"kind": "lines", "x_label": "epoch", "x_whole": True}
    drawn = [chart("Loss", lines, **options)]
    if scored:
        values = [record["test_accuracy"] for record in records]
        accuracy = [Series("test", epochs, values)]
        drawn.append(chart("Test accuracy (%)", accuracy, percent=True, **options))
    return [one for one in drawn if one is not None]


def _epochs(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The table of epochs: all, or the first, the last and every so many between them."""
    every = -(-len(records) // EPOCH_ROWS)
    kept = [r for i, r in enumerate(records) if i % every == 0 or i == len(records) - 1]
    terms = loss_terms(records[0])
    scored = records[-1]["test_accuracy"] is not None
    heads = ["epoch", *(["test accuracy", "test loss"] if scored else []), *map(_words, terms)]
    rows = [
        [
            str(record["epoch"]),
            *([percent(record["test_accuracy"]), number(record["test_loss"])] if scored else []),
            *(number(record.get(term)) for term in terms),
            number(record["lr"]),
            duration(record["time_s"]),
        ]
        for record in kept
    ]
    caption = "Every epoch" if every == 1 else f"One epoch in {every}, and the last"
    return {"caption": caption, "heads": [*heads, "learning rate", "time"], "rows": rows}


def _images(tested: Scored) -> list[dict[str, Any]]:
    outcomes, names = tested.outcomes, tested.class_names
    shown = []
    for pixels, i in zip(tested.images, outcomes.worst.tolist()):
        true, predicted = int(outcomes.labels[i]), int(outcomes.predicted[i])
        shown.append(
            {
                "uri": png_uri(pixels),
                "row": int(outcomes.rows[i]),
                "true": short(names[true]),
                "predicted": short(names[predicted]),
                "share": f"{100 * float(outcomes.probability[i]):.1f} %",
                "small": max(pixels.shape[1:]) <= PIXELS,
            }
        )
    return shown
