"""The picture of a bank: drawn for every kind of bank, the same each time, never of wrong data."""

from __future__ import annotations

import builtins

import pytest
import torch

from ckd.bank import BankError, BankWriter, EmbeddingBank
from ckd.bank.picture import _project, draw_bank
from tests.bank_tools import DIM, sample, write_bank

pytest.importorskip("matplotlib")


def test_a_picture_is_the_same_each_time_and_leaves_the_generator_alone(tmp_path):
    bank = write_bank(tmp_path / "bank")
    state = torch.random.get_rng_state()
    draw_bank(bank, tmp_path / "a.png", max_rows=30)
    draw_bank(bank, tmp_path / "b.png", max_rows=30)
    draw_bank(bank, tmp_path / "c.png", max_rows=30, per_class=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


def test_principal_components_are_those_of_the_covariance():
    rows = sample(200)[1].double() * torch.tensor([9.0, 5, 1, 1, 1, 1, 1, 1]).double()
    centroids = rows[:3] + 1
    plane, names = _project(rows.float(), centroids.float(), "pca", seed=0)
    values, vectors = torch.linalg.eigh((rows - rows.mean(0)).T @ (rows - rows.mean(0)))
    expected = (torch.cat([rows, centroids]) - rows.mean(0)) @ vectors[:, [-1, -2]]
    assert torch.allclose(plane.double().abs(), expected.abs(), rtol=1e-3, atol=1e-3)
    assert f"({100 * values[-1] / values.sum():.0f} % of the variance)" in names[0]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (None, None),  # no labels at all
        (torch.arange(50) % 3 - 1, ("a", "b$x$")),  # some without; a name that looks like a formula
        (torch.arange(50) % 3, ("a", "b", "c", "empty")),
        (torch.arange(50) * 1_000_000, None),  # labels with gaps, more than a legend holds
        (torch.arange(50) % 25, None),
    ],
)
def test_banks_of_all_kinds_are_drawn(tmp_path, labels, names):
    ids, embeddings, _ = sample()
    with BankWriter(tmp_path / "bank", DIM, class_names=names) as writer:
        writer.write(ids, embeddings, labels)
    draw_bank(EmbeddingBank.open(tmp_path / "bank"), tmp_path / "bank.svg")
    assert "</svg>" in (tmp_path / "bank.svg").read_text()


def test_tsne_draws_or_says_what_to_install(tmp_path, monkeypatch):
    bank = write_bank(tmp_path / "bank")
    real_import = builtins.__import__

    def without_sklearn(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError("no sklearn here")
        return real_import(name, *args, **kwargs)

    with monkeypatch.context() as patches:
        patches.setattr(builtins, "__import__", without_sklearn)
        with pytest.raises(ImportError, match="pip install scikit-learn"):
            draw_bank(bank, tmp_path / "a.png", method="tsne")
    assert not (tmp_path / "a.png").exists()
    pytest.importorskip("sklearn")
    draw_bank(bank, tmp_path / "a.png", method="tsne")
    assert (tmp_path / "a.png").exists()


def test_a_class_whose_name_begins_with_an_underscore_is_in_the_legend(tmp_path):
    write_bank(tmp_path / "bank", class_names=("_bg", "bee", "cat"))
    figures = []

    class Kept(pytest.importorskip("matplotlib.figure").Figure):
        def savefig(self, *args, **kwargs):
            figures.append(self)
            return super().savefig(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr("matplotlib.figure.Figure", Kept)
        draw_bank(EmbeddingBank.open(tmp_path / "bank"), tmp_path / "bank.png")
    legend = [text.get_text().strip() for text in figures[0].axes[0].get_legend().get_texts()]
    assert legend == ["_bg", "bee", "cat", "centroid of a class"]


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_rows_that_are_all_the_same_are_refused(tmp_path, method):
    with BankWriter(tmp_path / "bank", DIM) as writer:
        writer.write(torch.arange(50), torch.full((50, DIM), 0.1), torch.zeros(50).long())
    with pytest.raises(BankError, match="zero variance: they are all the same"):
        draw_bank(EmbeddingBank.open(tmp_path / "bank"), tmp_path / "a.png", method=method)
    assert not (tmp_path / "a.png").exists()


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(BankError, match="image format 'txt'"):
        draw_bank(write_bank(tmp_path / "bank"), tmp_path / "bank.txt")
    with pytest.raises(BankError, match="3 rows"):
        draw_bank(write_bank(tmp_path / "small", rows=2), tmp_path / "small.png")
