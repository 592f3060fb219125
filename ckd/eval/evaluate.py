"""Every figure of a student on a data set, beside a bank of its teacher's rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

from ckd._errors import ConfigError
from ckd._hints import unknown
from ckd.bank import EmbeddingBank
from ckd.data import DataError, Dataset, keep_labels
from ckd.eval.figures import Evaluation
from ckd.eval.inputs import about_bank, about_data, check_fits, check_rows, class_texts, map_number
from ckd.eval.report import FIGURES, Report
from ckd.eval.scores import TEMPERATURE
from ckd.models import Student


def evaluate_student(
    student: Student,
    train: Dataset,
    test: Dataset,
    bank: EmbeddingBank | None = None,
    *,
    test_bank: EmbeddingBank | None = None,
    texts: EmbeddingBank | None = None,
    teacher: int | None = None,
    figures: Collection[str] = tuple(FIGURES),
    label_fraction: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
    workers: int = 0,
    progress: bool = True,
) -> Report:
    """The figures that docs/evaluation.md defines, computed on the device of the student.

    train: the images whose rows are searched, with all labels that are known. test: the images
    that are classified and searched for. bank: the teacher's rows of `train`; without it, the
    student is compared with itself alone.

    test_bank: the teacher's rows of `test`, for the teacher's own figures and for recall of the
    image's own row. texts: the teacher's rows of class texts, by label in the order of its class
    names, or one for each class without labels.

    teacher: the number of the student's map to the bank's teacher; default: the map of the bank's
    teacher's name, or the only one of its width.

    figures: the names of those to measure, of `ckd.eval.report.FIGURES`.

    label_fraction, seed: the labels of `train` that a prediction may use, drawn by
    `ckd.data.keep_labels` as in training. All known ones tell whether a retrieved row is of the
    right class.

    A figure that these do not give is None in the report, with the reason. Memory: the features of
    both sets and the rows of `test_bank` in float32, and tiles; never an array [queries, gallery].
    Equal arguments give equal reports.

    Raises BankError for a bank of other data, other classes or another width; ConfigError for the
    number of no map, if several maps fit, or for the name of no figure; DataError if the two sets
    have other classes; ModelError for images that the student does not take, and for an
    embedding that is not finite.

    >>> student = ckd.load_student("runs/embed-kd")
    >>> train, test = ckd.data.load("cifar10", "train"), ckd.data.load("cifar10", "test")
    >>> bank = ckd.EmbeddingBank.open("banks/cifar10")
    >>> report = evaluate_student(student, train, test, bank, label_fraction=0.01)
    >>> report["class_means"].value
    """
    for name in figures:
        if name not in FIGURES:
            raise ConfigError(unknown("figure", name, FIGURES))
    if train.class_names != test.class_names:
        raise DataError(
            f"{train.name} ({train.split}) and {test.name} ({test.split}) have other classes; "
            "evaluate on two splits of one data set"
        )
    for rows, dataset in ((bank, train), (test_bank, test)):
        if rows is not None:
            check_rows(rows, dataset)
    check_fits(bank, test_bank, texts)
    if (own := test_bank if bank is None else bank) is not None:
        teacher = map_number(student, own, teacher)
    evaluation = Evaluation(
        student,
        train,
        test,
        bank,
        test_bank,
        None if texts is None else class_texts(texts, test.class_names),
        teacher,
        keep_labels(train, label_fraction, seed).labels >= 0,
        {"batch_size": batch_size, "workers": workers, "progress": progress},
    )
    facts = {
        "train": about_data(train),
        "test": about_data(test),
        "bank": about_bank(bank),
        "test_bank": about_bank(test_bank),
        "texts": about_bank(texts),
        "label_fraction": label_fraction,
        "seed": seed,
        "knn_temperature": TEMPERATURE,
    }
    with torch.no_grad(), _float32(student.model.channel_mean.device):
        return Report(tuple(evaluation.figures(figures)), facts)


@contextmanager
def _float32(device: torch.device) -> Iterator[None]:
    """Within this block there is no autocast, and cuDNN chooses deterministic kernels."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
