"""Figures of a student against their definitions in float64, what is missing, and memory."""

from __future__ import annotations

from typing import Any

import pytest

from ckd.data import keep_labels
from ckd.eval import evaluate_student
from ckd.eval.report import FIGURES, Report
from tests.eval_tools import Setting, expected, setting, student_with

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


def evaluated(student: Any, given: Setting, **options: Any) -> Report:
    options = {"test_bank": given.test_bank, "batch_size": 7, "progress": False, **options}
    return evaluate_student(student, given.train, given.test, given.bank, **options)


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
