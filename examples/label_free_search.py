"""Distillation without labels, and search with the student.

A student of handwritten digits learns from the teacher's rows alone, and lies in the teacher's
space. So it is compared with everything that the teacher has embedded, without the teacher:

    by image   a new image -> the nearest stored rows, which are images of the training set
    by class   the mean row of each class -> the nearest new images

The class means stand in for texts: a teacher of images and texts, such as CLIP, would give a row
for each query that is typed. They and the shown figures take labels; the training takes none.

    python examples/label_free_search.py
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import ckd
from ckd import data
from ckd.train import Config, train
from digits_bank import digits_bank

NEAREST = 10


def student_without_labels(bank: ckd.EmbeddingBank, folder: Path, epochs: int) -> ckd.Student:
    """What `ckd train --label-fraction 0 --student resnet8 --bank BANK --out FOLDER` trains."""
    config = Config(
        data="digits",
        bank=(str(bank.path),),
        label_fraction=0.0,
        student="resnet8",
        epochs=epochs,
        lr=2e-3,
        warmup_epochs=1,
        flip=False,  # a mirrored digit is no digit
        log_to=("none",),
        out=str(folder),
    )
    train(config, verbose=False)
    return ckd.load_student(folder).eval()


def embeddings(student: ckd.Student, dataset: data.Dataset) -> Tensor:
    """The student's embeddings of all images, in the teacher's space."""
    batches = dataset.batches(torch.arange(len(dataset)), 256)
    return torch.cat([student.embedding(student.preprocess(batch.images)) for batch in batches])


def share_of_class(found: Tensor, labels: Tensor, wanted: Tensor) -> float:
    """The share of the rows found [B, k] that are of the class wanted [B]."""
    return (labels[found] == wanted[:, None]).float().mean().item()


@torch.inference_mode()
def search(student: ckd.Student, bank: ckd.EmbeddingBank) -> dict[str, float]:
    """Both searches, over the test images; prints and returns the share of right results."""
    test_set = data.load("digits", "test")
    names = test_set.class_names
    images = embeddings(student, test_set)
    rows = student.comparable(bank.embeddings())
    results: dict[str, float] = {}

    nearest = ckd.top_k(images, rows, NEAREST).rows
    print("the nearest stored images of the first five test images:")
    for image in range(5):
        ids = bank.sample_ids[nearest[image]].tolist()
        classes = [names[label] for label in bank.labels[nearest[image]]]
        print(f"  a {names[test_set.labels[image]]}: {' '.join(classes)}   {ids=}")
    results["by image"] = share_of_class(nearest, bank.labels, test_set.labels)

    queries = student.comparable(bank.centroids())  # or the rows of texts
    answers = ckd.top_k(queries, images, NEAREST).rows
    print("the test images nearest to the mean row of each class:")
    for name, found in zip(names, answers):
        print(f"  {name}: {' '.join(names[label] for label in test_set.labels[found])}")
    wanted = torch.arange(len(queries))
    results["by class"] = share_of_class(answers, test_set.labels, wanted)

    best = ckd.top_k(images, queries, 1).rows[:, 0]
    results["classified"] = (best == test_set.labels).float().mean().item()
    largest = test_set.labels.bincount().max().item() / len(test_set)
    print(
        f"of the right class, over {len(test_set)} test images (at most {largest:.0%} by chance):\n"
        f"  the {NEAREST} stored rows nearest to an image    {results['by image']:.1%}\n"
        f"  the {NEAREST} images nearest to a class mean   {results['by class']:.1%}\n"
        f"  the class mean nearest to an image      {results['classified']:.1%}\n"
        "One seed. The teacher of digits_bank.py has seen all labels, the student none."
    )
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bank", type=Path, help="of digits_bank.py; default: make it")
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # models this small gain nothing from a second thread
    with tempfile.TemporaryDirectory() as folder:
        if options.bank is None:
            print("training the teacher and storing its embeddings ...", flush=True)
            bank = digits_bank(Path(folder))
        else:
            bank = ckd.EmbeddingBank.open(options.bank)
        student = student_without_labels(bank, Path(folder, "student"), options.epochs)
        return search(student, bank)


if __name__ == "__main__":
    main()
