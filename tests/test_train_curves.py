"""curves.png: what is drawn for one epoch, few epochs, many, and several banks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ckd.train import curves

pytest.importorskip("matplotlib")


def records(epochs: int, *terms: str, scored: bool = True, scale: float = 1.0) -> list[Any]:
    return [
        {
            "epoch": epoch,
            "lr": 0.1,
            "loss": 3.0 / epoch,
            **{term: scale * (2.0 + number) / epoch for number, term in enumerate(terms)},
            "test_accuracy": 1 - 1 / (epoch + 1) if scored else None,
            "test_loss": 1.5 / epoch if scored else None,
        }
        for epoch in range(1, epochs + 1)
    ]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    figures: list[Any] = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("scored", [True, False])
def test_a_single_epoch_is_bars_with_their_numbers(drawn: list[Any], scored: bool) -> None:
    curves.draw_curves(records(1, "cross_entropy", "mse", scored=scored), Path(), "title")
    loss, *more = drawn[0].axes
    assert [len(axes.lines) for axes in drawn[0].axes] == [0] * (1 + scored)
    assert texts(loss) == ["3.000", "2.000", "3.000", *(["1.500"] if scored else [])]
    assert [texts(axes) for axes in more] == ([["50.00 %"]] if scored else [])
    assert loss.get_xlim()[0] == 0


def test_a_loss_that_overflowed_is_drawn_as_its_name(drawn: list[Any], tmp_path: Path) -> None:
    one = records(1, "mse")
    one[0]["test_loss"] = math.inf
    curves.draw_curves(one, tmp_path, "title")
    assert "inf" in texts(drawn[0].axes[0])
    two = records(2, "mse")
    two[1]["test_loss"] = math.inf
    curves.draw_curves(two, tmp_path, "title")
    for figure in drawn:
        figure.savefig(tmp_path / "figure.png")


@pytest.mark.parametrize(("epochs", "marks"), [(2, "o"), (15, "o"), (16, "None")])
def test_few_epochs_are_marked(drawn: list[Any], epochs: int, marks: str) -> None:
    curves.draw_curves(records(epochs, "mse"), Path(), "title")
    loss, accuracy = drawn[0].axes
    for line in (*loss.lines, accuracy.lines[0]):
        assert len(line.get_xdata()) == epochs
        assert line.get_marker() == marks


def test_banks_differ_in_dashes_and_terms_in_colour(drawn: list[Any]) -> None:
    names = [f"{term}_{bank}" for term in ("contrastive", "cosine", "mse") for bank in (1, 2)]
    curves.draw_curves(records(3, *names, scale=0.02), Path(), "title")
    axes = drawn[0].axes[0]
    _, *terms = [line for line in axes.lines if len(line.get_xdata())][:7]
    looks = [(line.get_color(), str(line._unscaled_dash_pattern)) for line in terms]
    assert len({*looks}) == 6
    assert len({colour for colour, _ in looks}) == 3
    assert len({dashes for _, dashes in looks}) == 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["bank 1", "bank 2"]
    assert {"cosine, bank 1", "cosine, bank 2"} <= {*texts(axes)}
    assert axes.get_yscale() == "log"  # 3.0 beside 0.01


def test_labels_stand_at_the_ends_of_their_lines(drawn: list[Any]) -> None:
    for scale in (1.0, 0.01):  # a linear axis, a logarithmic one
        curves.draw_curves(records(3, "mse", scored=False, scale=scale), Path(), "title")
        axes = drawn[-1].axes[0]
        for text, line in zip(axes.texts, sorted(axes.lines, key=lambda one: one.get_ydata()[-1])):
            point = axes.transData.transform((3, line.get_ydata()[-1]))
            height = axes.transAxes.inverted().transform(point)[1]
            assert text.xy[1] == pytest.approx(height, abs=1e-6)
    assert [one.axes[0].get_yscale() for one in drawn] == ["linear", "log"]


def test_a_long_title_is_wrapped(drawn: list[Any]) -> None:
    curves.draw_curves(records(2, "mse"), Path(), "x" * 150)
    assert "\n" in drawn[0].get_suptitle()
