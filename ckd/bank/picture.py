"""A picture of a bank: its rows in two dimensions, coloured by class, and the class centroids."""

from __future__ import annotations

import io
import os
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ckd._console import clock
from ckd._files import atomic_write, user_path
from ckd._hints import require, unknown
from ckd.bank.manifest import BankError
from ckd.bank.reader import EmbeddingBank

Projection = Literal["pca", "tsne"]

# Beyond this many classes neither colours nor a legend can tell them apart.
_NAMED_CLASSES = 20
# Grey is for rows without a class.
_NO_CLASS = (0.75, 0.75, 0.75)
_INSTEAD_OF_GREY = (0.13, 0.20, 0.38)


def draw_bank(
    bank: EmbeddingBank,
    path: str | os.PathLike[str],
    *,
    method: Projection = "pca",
    per_class: int | None = None,
    max_rows: int = 3000,
    seed: int = 0,
) -> None:
    """Draw the bank to the image file `path` (.png, .pdf, .svg, ...).

    method: "pca" (the first two principal components) or "tsne" (needs scikit-learn). At most
    `max_rows` rows are drawn, chosen at random by `seed`. The centroids are
    `bank.centroids(per_class)`; none are drawn if a class has no row. Needs the extra `plots`.

    Raises BankError for a bank that is too small to draw or whose rows are all the same, and for an
    unknown method or image format, ImportError for a missing package.
    """
    if method not in get_args(Projection):
        raise BankError(unknown("method", method, get_args(Projection)))
    if len(bank) < 3 or bank.dim < 2:
        raise BankError(f"a picture needs 3 rows of width 2 at least, {bank.path} has fewer")
    figures = require("matplotlib.figure", extra="plots", purpose="drawing a bank")
    figure = figures.Figure(figsize=(9.5, 7), dpi=150, layout="constrained")
    path = user_path(path)
    suffix = path.suffix.lstrip(".").lower()
    formats = figure.canvas.get_supported_filetypes()
    if suffix not in formats:
        raise BankError(unknown("image format", suffix, formats))

    chosen = torch.randperm(len(bank), generator=torch.Generator().manual_seed(seed))[:max_rows]
    chosen = chosen.sort().values
    rows, labels = bank.rows(bank.sample_ids[chosen]).float(), bank.labels[chosen]
    if bool((rows == rows[0]).all()):
        # Without variance, PCA's shares are NaN and scikit-learn's t-SNE crashes (SIGSEGV).
        raise BankError(
            f"a picture needs rows that differ; the {len(rows)} drawn of {bank.path} have zero "
            "variance: they are all the same"
        )
    if not bank.class_names:  # number the labels that occur, as class_counts does
        present = bank.labels[bank.labels >= 0].unique()
        labels = torch.where(labels < 0, -1, torch.searchsorted(present, labels))
    centroids = _centroids(bank, per_class)
    plane, axis_names = _project(rows, centroids, method, seed)
    axes = figure.add_subplot()
    names = [_verbatim(name) for name, _ in bank.class_counts()]
    _scatter(axes, plane[: len(rows)], labels, plane[len(rows) :], names)
    _title(axes, bank, len(rows), method)
    _frame(axes, axis_names)

    image = io.BytesIO()
    figure.savefig(image, format=suffix)
    atomic_write(path, image.getvalue())


def _centroids(bank: EmbeddingBank, per_class: int | None) -> Tensor:
    """Class centroids [C, D]; [0, D] if a class has no row."""
    counts = bank.class_counts()
    without_gaps = bool(bank.class_names) or len(counts) == int(bank.labels.max()) + 1
    if counts and without_gaps and all(count for _, count in counts):
        return bank.centroids(per_class)
    return torch.empty(0, bank.dim)


def _project(
    rows: Tensor, centroids: Tensor, method: Projection, seed: int
) -> tuple[Tensor, tuple[str, str]]:
    """Project rows and centroids to [n + C, 2]; returns the points and the names of both axes."""
    if method == "tsne":
        return _tsne(torch.cat([rows, centroids]), seed), ("", "")
    mean = rows.mean(dim=0)
    # pca_lowrank draws from the global generator, whose state must not change.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _, singular, directions = torch.pca_lowrank(rows - mean, q=min(6, *rows.shape), niter=4)
    directions = directions[:, :2]
    # The sign of a principal component is arbitrary: let its largest entry be positive.
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    directions = directions * largest.sign()
    share = 100 * singular[:2].square() / (rows - mean).square().sum()
    axis_names = tuple(
        f"principal component {i + 1} ({float(s):.0f} % of the variance)"
        for i, s in enumerate(share)
    )
    return (torch.cat([rows, centroids]) - mean) @ directions, (axis_names[0], axis_names[1])


def _tsne(points: Tensor, seed: int) -> Tensor:
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError(
            f"method tsne needs scikit-learn, which could not be imported ({error}); "
            "install it with: pip install scikit-learn, or use pca"
        ) from error
    # scikit-learn's default perplexity is 30; it must be below the number of points.
    perplexity = min(30.0, (len(points) - 1) / 3)
    projection = TSNE(perplexity=perplexity, init="pca", random_state=seed)
    with clock(f"t-SNE of {len(points):,} points"):
        plane = projection.fit_transform(points.numpy())
    return torch.from_numpy(plane)


def _scatter(axes: Any, rows: Tensor, labels: Tensor, centroids: Tensor, names: list[str]) -> None:
    """Rows as small points, centroids as large ones, and the legend."""
    few = len(names) <= _NAMED_CLASSES
    bare = labels < 0
    if bool(bare.any()):
        axes.scatter(*rows[bare].T, s=8, color=_NO_CLASS, linewidths=0, label="no class")
    colors = _colors(len(names))
    # In a random order, so that no class lies on top of all the others.
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    order = order[~bare[order]]
    axes.scatter(
        *rows[order].T,
        s=8,
        c=[colors[label] for label in labels[order].tolist()],
        alpha=0.6,
        linewidths=0,
    )
    size, edge = (190, 1.6) if few else (34, 0.7)
    axes.scatter(
        *centroids.T, s=size, c=colors[: len(centroids)], edgecolors="black", linewidths=edge
    )
    if few:
        for color, name in zip(colors, names):
            axes.scatter([], [], s=60, color=color, label=name)
        for (x, y), name in zip(centroids.tolist(), names):
            _write_beside(axes, x, y, name)
    else:
        axes.scatter([], [], s=14, c="dimgray", label=f"row (colour: one of {len(names)} classes)")
    if len(centroids):
        axes.scatter([], [], s=60, c="white", edgecolors="black", label="centroid of a class")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _write_beside(axes: Any, x: float, y: float, text: str) -> None:
    """A class name above its centroid, outlined in white to be legible on the points."""
    effects = require("matplotlib.patheffects", extra="plots", purpose="drawing a bank")
    axes.annotate(
        text,
        (x, y),
        xytext=(0, 8),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=10.5,
        fontweight="bold",
        path_effects=[effects.withStroke(linewidth=3, foreground="white")],
    )


def _colors(classes: int) -> list[Any]:
    colormaps = require("matplotlib", extra="plots", purpose="drawing a bank").colormaps
    if classes <= _NAMED_CLASSES:
        colors = list(colormaps["tab10" if classes <= 10 else "tab20"].colors)
        colors[7 if classes <= 10 else 14] = _INSTEAD_OF_GREY
        return colors[:classes]
    return [colormaps["turbo"](label / (classes - 1)) for label in range(classes)]


def _title(axes: Any, bank: EmbeddingBank, drawn: int, method: Projection) -> None:
    teacher = (bank.meta["teacher"] or {}).get("name", "an unnamed teacher")
    dataset = bank.meta["dataset"] or "imported embeddings"
    rows = f"{drawn:,} of {len(bank):,} rows" if drawn < len(bank) else f"all {drawn:,} rows"
    how = {"pca": "principal components", "tsne": "t-SNE"}[method]
    axes.set_title(
        _verbatim(f"Bank of {teacher}: {dataset}"),
        loc="left",
        fontsize=14,
        fontweight="bold",
        pad=24,
    )
    axes.text(
        0,
        1.015,
        f"{rows} of width {bank.dim}, {how}",
        transform=axes.transAxes,
        color="dimgray",
        fontsize=10.5,
    )


def _verbatim(text: str) -> str:
    """Escape text: matplotlib reads $ as a formula and hides labels that begin with _."""
    text = " " + text if text.startswith("_") else text
    return text.replace("$", r"\$")


def _frame(axes: Any, axis_names: tuple[str, str]) -> None:
    """The same scale on both axes, so that distances are true, and little ink."""
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel(axis_names[0])
    axes.set_ylabel(axis_names[1])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    if not axis_names[0]:  # the units of t-SNE mean nothing
        axes.tick_params(length=0, labelbottom=False, labelleft=False)
        axes.spines[["bottom", "left"]].set_visible(False)
