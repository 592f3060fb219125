"""Figures of a student against their definitions in float64, what is missing, and memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ckd._errors import ConfigError
from ckd.bank import BankWriter, EmbeddingBank
from ckd.data import keep_labels
from ckd.eval import evaluate_student
from ckd.eval.probe import TOLERANCE, linear_probe
from ckd.eval.report import FIGURES, Report
from ckd.eval.rows import CHUNK, Rows
from ckd.eval.scores import class_means, vote
from ckd.models import Student
from ckd.ops.top_k import STUDENTS
from tests.eval_tools import CLASSES, Setting, evaluated, expected, setting, student_with

# Equal rows of several classes; fewer rows than k; one of each; a class without a row; images
# without labels; few labels.
CASES: dict[str, dict[str, Any]] = {
    "random": {},
    "ties": {"distinct": 7},
    "few rows": {"train": 6, "test": 9},
    "one row": {"train": 1, "test": 1},
    "a class absent": {"train_classes": (0, 2)},
    "unlabelled": {"unlabelled": 0.4},
    "ties, unlabelled": {"distinct": 5, "unlabelled": 0.3},
}


@pytest.fixture(scope="module", params=CASES)
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return setting(tmp_path_factory.mktemp("case"), **CASES[request.param])


@pytest.mark.parametrize("kind", ["head", "projection", "none"])
@pytest.mark.parametrize("fraction", [1.0, 0.2])
def test_figures_match_their_definitions(given: Setting, kind: str, fraction: float) -> None:
    student = student_with(kind)
    report = evaluated(student, given, label_fraction=fraction, seed=4)
    usable = keep_labels(given.train, fraction, 4).labels >= 0
    truth = expected(student, given, usable)
    assert {*FIGURES} - {*truth} == {"texts", "linear_probe"}
    for name, (value, teacher) in truth.items():
        figure = report[name]
        assert (figure.value, figure.teacher) == (value, teacher), name
        assert (figure.reason is None) == (value is not None), name


def test_a_vote_counts_cosines_and_prefers_the_smaller_class_among_equals() -> None:
    cosines = torch.tensor([[0.9, 0.5, 0.5], [0.9, 0.9, 0.8], [0.9, 0.8, 0.8], [0.5, 0.5, 0.5]])
    labels = torch.tensor([[1, 0, 0], [2, 1, 0], [1, 0, 0], [2, 0, 2]])
    # exp(-0.1 / 0.07) = 0.24, twice which is less than 1; exp(-0.4 / 0.07) = 0.003
    assert vote(cosines, labels).tolist() == [1, 1, 1, 2]
    many = torch.full((3, 20), 0.3)
    many[:, ::2] += 1e-4
    labels = torch.arange(20).expand(3, -1) // 2 % 5  # four votes for each class
    assert vote(many, labels).tolist() == [0, 0, 0]
    assert vote(many[:, :1], labels[:, 3:4]).tolist() == [1, 1, 1]
    # Ten votes for each of two classes, of equal weights that are summed in another order.
    generator = torch.Generator().manual_seed(0)
    pairs = torch.rand(500, 10, generator=generator).sort(descending=True).values
    first = torch.randint(2, (500, 10), generator=generator)
    labels = torch.stack([first, 1 - first], dim=2).flatten(1)
    assert not vote(pairs.repeat_interleave(2, dim=1), labels).any()


def test_class_means_are_those_of_the_classes_that_occur() -> None:
    rows, labels = torch.randn(2 * CHUNK + 3, 4), torch.randint(3, (2 * CHUNK + 3,)) * 2
    means, classes = class_means(Rows.of(rows), labels)
    assert classes.tolist() == [0, 2, 4]
    exact = torch.stack([rows[labels == c].double().mean(0) for c in (0, 2, 4)])
    assert (means - exact).abs().max() <= 2**-24 * exact.abs().max() + 1e-15


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("rows", [30, CHUNK + 5])
def test_the_probe_is_the_minimum_of_its_objective(rows: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    x = 3 * torch.randn(rows, 6, generator=generator) + 1000
    x[:, 2] = 0.1  # constant, up to rounding
    x[::2, 2] = torch.nextafter(x[0, 2], torch.tensor(1.0))
    labels = torch.randint(classes, (rows,), generator=generator) * 3 + 1
    x[:, 0] += labels
    found = linear_probe(Rows.of(x), labels)
    assert found.classes.tolist() == labels.unique().tolist()
    assert found.gradient <= TOLERANCE
    # The gradient, from weight and bias alone, of mean CE + |W|^2 / 2n on standardised rows.
    wide = x.double().numpy()
    deviation = wide.std(0)
    assert found.weight[:, 2].tolist() == [0.0] * classes
    deviation[2] = 1.0
    z = (wide - wide.mean(0)) / deviation
    weight = found.weight.double().numpy() * deviation
    bias = found.bias.double().numpy() + found.weight.double().numpy() @ wide.mean(0)
    logits = z @ weight.T + bias
    odds = np.exp(logits - logits.max(1, keepdims=True))
    target = (labels[:, None] == found.classes).numpy()
    error = odds / odds.sum(1, keepdims=True) - target
    assert np.abs(error.T @ z + weight).max() / rows <= 1e-4
    assert np.abs(error.sum(0)).max() / rows <= 1e-4
    assert np.abs(bias - bias.mean()).max() > 1e-3 or classes == 2


def test_the_probe_of_one_class_gives_it(tmp_path: Path) -> None:
    given = setting(tmp_path, train_classes=(2,))
    wanted = (given.test.labels == 2).double().mean().item()
    assert evaluated(student_with("head"), given)["linear_probe"].value == wanted


def test_texts_are_nearest_rows_by_label_or_in_order(tmp_path: Path) -> None:
    given = setting(tmp_path)
    means = given.bank.centroids()

    def texts(name: str, rows: torch.Tensor, labels: Any, names: Any) -> EmbeddingBank:
        with BankWriter(tmp_path / name, rows.shape[1], class_names=names, teacher="t text") as w:
            w.write(torch.arange(len(rows)), rows, labels)
        return EmbeddingBank.open(tmp_path / name)

    student, none = student_with("head"), torch.full((3,), -1)
    by_means = evaluated(student, given)["class_means"]
    apart = torch.cat([means - 1, means + 1])
    for bank in (
        texts("in order", means, none, None),
        texts("named", means.flip(0), none, CLASSES[::-1]),
        texts("labelled", means.flip(0), torch.tensor([2, 1, 0]), CLASSES),
        texts("several", apart, torch.arange(6) % 3, CLASSES),
    ):
        figure = evaluated(student, given, texts=bank)["texts"]
        assert (figure.value, figure.teacher) == (by_means.value, by_means.teacher)
        assert (figure.gallery, figure.labels) == (3, 0)


def reasons(report: Report) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for figure in report.figures:
        if figure.reason is not None:
            assert figure.value is None
            found.setdefault(figure.reason, set()).add(figure.name)
    return found


HEAD, TEXTS = {"teacher_head"}, {"texts"}
ACROSS = {"class_means", "knn_1", "knn_20", "asymmetric_recall_1", "asymmetric_recall_10"}
OWN_ROW = {"own_row_recall_1", "own_row_recall_10"}
BY_LABELS = {"class_means", "knn_1", "knn_20", "own_knn_1", "own_knn_20", "linear_probe"}
RECALLS = {f"{s}_recall_{k}" for s in ("asymmetric", "symmetric") for k in (1, 10)}


def test_what_is_missing_has_a_reason(tmp_path: Path) -> None:
    given = setting(tmp_path)
    no_texts = "there is no bank of class texts"
    assert reasons(evaluated(student_with("head"), given)) == {no_texts: TEXTS}

    found = reasons(evaluated(student_with("none"), given))
    (why,) = found
    assert "no map between its space and the teacher's" in why
    assert found[why] == HEAD | TEXTS | ACROSS | OWN_ROW

    found = reasons(evaluated(student_with("projection", num_classes=None), given))
    assert found.pop(no_texts) == TEXTS
    assert found.pop("the student has no class head: it was trained without labels")
    (why,) = found
    assert found[why] == HEAD
    assert "no embedding in the teacher's space" in why

    found = reasons(evaluated(student_with("head"), given, test_bank=None))
    assert found == {no_texts: TEXTS, "there is no test bank": OWN_ROW}
    alone = evaluate_student(student_with("head"), given.train, given.test, progress=False)
    assert reasons(alone) == {
        "there is no bank of the teacher's rows": HEAD | TEXTS | ACROSS,
        "there is no test bank": OWN_ROW,
    }
    assert all(figure.teacher is None for figure in alone.figures)

    found = reasons(evaluated(student_with("head"), given, label_fraction=0.0))
    assert found == {no_texts: TEXTS, "no label of a training image is used": BY_LABELS}

    headless = setting(tmp_path / "headless", head=False)
    found = reasons(evaluated(student_with("head"), headless))
    assert found == {no_texts: TEXTS, "the bank holds no class head of the teacher": HEAD}


def test_data_without_labels_gives_what_needs_none(tmp_path: Path) -> None:
    given = setting(tmp_path, unlabelled=1.0)
    report = evaluated(student_with("head"), given)
    (why,) = found = reasons(report)
    assert why == "no test image has a label"
    assert found[why] == {*FIGURES} - OWN_ROW
    assert report["own_row_recall_1"].queries == len(given.test)
    half = setting(tmp_path / "half")
    train = half.train.with_labels(torch.full_like(half.train.labels, -1))
    report = evaluated(student_with("head"), half._replace(train=train))
    assert reasons(report)["no training image has a label"] == BY_LABELS | RECALLS
    assert report["teacher_head"].value is not None


def test_the_map_is_that_of_the_banks_teacher(tmp_path: Path) -> None:
    given = setting(tmp_path)
    right, wrong = student_with("head").teachers[0], student_with("projection").teachers[0]
    alone = evaluated(student_with("head"), given).to_dict()
    wrong.name = "u"
    both = Student(student_with("none").model, [wrong, right]).eval()
    assert evaluated(both, given).to_dict() == alone
    assert evaluated(both, given, teacher=1).to_dict() == alone
    assert evaluated(both, given, teacher=0).to_dict() != alone


def test_a_test_bank_alone_gives_the_recall_of_the_images_own_rows(tmp_path: Path) -> None:
    given, student = setting(tmp_path), student_with("head")
    names = ("own_row_recall_1", "own_row_recall_10", "knn_1")
    alone = evaluated(student, given._replace(bank=None), figures=names)
    whole = evaluated(student, given, figures=names)
    assert alone.figures[1:] == whole.figures[1:]
    assert alone["own_row_recall_10"].value is not None
    assert alone["knn_1"].reason == "there is no bank of the teacher's rows"


def test_convolutions_are_deterministic_within_an_evaluation_only(tmp_path: Path) -> None:
    student, seen, cudnn = student_with("head"), set(), torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    student.model.register_forward_hook(lambda *_: seen.add((cudnn.benchmark, cudnn.deterministic)))
    evaluated(student, setting(tmp_path), figures=("class_head",))
    assert seen == {(False, True)}
    assert before == (cudnn.benchmark, cudnn.deterministic) != (False, True)


def test_equal_evaluations_give_equal_reports(tmp_path: Path) -> None:
    given, student = setting(tmp_path, train=300, test=300), student_with("head")
    first = evaluated(student, given).to_dict()
    student.train()
    with torch.autocast("cpu", torch.bfloat16):
        again = evaluated(student, given).to_dict()
    assert student.training
    assert first == again == json.loads(json.dumps(first))
    assert evaluated(student, given, batch_size=64).to_dict() == first


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that an operator makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_array_has_a_number_for_each_query_and_row(tmp_path: Path) -> None:
    rows, queries = 6000, 4000
    given = setting(tmp_path, train=rows, test=queries)
    with Largest() as largest:
        report = evaluated(student_with("head"), given, batch_size=512)
    assert report["knn_20"].gallery == rows
    assert STUDENTS * rows <= largest.elements < queries * rows / 8


def test_a_choice_of_figures_is_measured_alone(tmp_path: Path) -> None:
    case, student = setting(tmp_path), student_with("head")
    every = evaluated(student, case)
    some = evaluated(student, case, figures=("knn_20", "class_head"))
    assert some.figures == (every["class_head"], every["knn_20"])
    with pytest.raises(ConfigError, match=r"unknown figure 'knn'.*nearest first: knn_1"):
        evaluated(student, case, figures=("knn",))
