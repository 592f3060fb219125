"""The losses in a training loop of your own: plain PyTorch, and a bank of a teacher's embeddings.

A small convolutional student of handwritten digits is trained on labels alone, and with one more
term, whose target is the teacher's embedding of the image, a row of the bank:

    contrastive   pick the image's row among all rows (ckd.EmbeddingDistillationLoss)
    mse           the squared distance to it, in the teacher's space (MSEDistillationLoss)

Five images of each class have a label; `--labels-per-class 0` trains with all labels.

    python examples/own_loop.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import ckd
from ckd import data
from digits_bank import digits_bank

WIDTH = 64  # of the student's embedding


class Student(nn.Module):
    """Any network serves that gives an embedding beside its logits."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self.classifier = nn.Linear(WIDTH, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.body(images.float() / 127.5 - 1)
        return embedding, self.classifier(embedding)


class Contrastive(nn.Module):
    """The loss projects the bank to the student's width; its projection is trained, too."""

    def __init__(self, bank: ckd.EmbeddingBank) -> None:
        super().__init__()
        self.bank = bank
        self.rows = bank.embeddings()  # float16 [N, D], mapped from the file; on a GPU: .cuda()
        self.loss = ckd.EmbeddingDistillationLoss(student_dim=WIDTH, teacher_dim=bank.dim)

    def forward(self, embedding: Tensor, sample_ids: Tensor) -> Tensor:
        return 0.5 * self.loss(embedding, self.rows, self.bank.positions(sample_ids))


class Distance(nn.Module):
    """A linear head, trained with the student, maps its embedding into the teacher's space."""

    def __init__(self, bank: ckd.EmbeddingBank) -> None:
        super().__init__()
        self.bank = bank
        rows = bank.statistics()
        self.head = ckd.losses.TeacherSpaceHead(WIDTH, bank.dim, mean=rows.mean, sigma=rows.sigma)
        self.loss = ckd.losses.MSEDistillationLoss()

    def forward(self, embedding: Tensor, sample_ids: Tensor) -> Tensor:
        own_rows = self.head.standardize(self.bank.rows(sample_ids))  # about 0, of variance 1
        return 2 * self.loss(self.head(embedding), own_rows)


TERMS: dict[str, type[nn.Module] | None] = {
    "labels alone": None,
    "contrastive": Contrastive,
    "mse": Distance,
}


def train(
    name: str, images: TensorDataset, bank: ckd.EmbeddingBank, classes: int, epochs: int
) -> Student:
    """A student trained with the term `name`. A label of -1 is unknown."""
    student = Student(classes)
    term = TERMS[name]
    distil = None if term is None else term(bank)
    loader = DataLoader(images, batch_size=64, shuffle=True)
    parameters = [*student.parameters(), *(distil.parameters() if distil else ())]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, epochs * len(loader))
    for _ in range(epochs):
        for pixels, labels, sample_ids in loader:
            embedding, logits = student(pixels)
            # The mean over all images of the batch, to which those without a label add 0.
            loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / len(labels)
            if distil is not None:
                loss = loss + distil(embedding, sample_ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return student.eval()


@torch.inference_mode()
def accuracy(student: Student, images: data.Batch) -> float:
    _, logits = student(images.images)
    return (logits.argmax(1) == images.labels).float().mean().item()


def whole(dataset: data.Dataset) -> data.Batch:
    """All images, labels and sample ids."""
    return next(dataset.batches(torch.arange(len(dataset)), len(dataset)))


def compare(
    bank: ckd.EmbeddingBank, labels_per_class: int, seeds: int, epochs: int
) -> dict[str, list[float]]:
    """The test accuracies of each term from each seed; prints them as they come."""
    train_set, test_set = data.load("digits", "train"), data.load("digits", "test")
    # Raises BankError unless each image has a row, and one of its own class.
    bank.check_rows(train_set.sample_ids, train_set.labels, "digits")
    classes = len(train_set.class_names)
    share = labels_per_class * classes / len(train_set) or 1.0
    scores: dict[str, list[float]] = {}
    for name in TERMS:
        scores[name] = []
        for seed in range(seeds):
            # Each seed draws other labels and other weights, the same for all terms.
            torch.manual_seed(seed)
            few = TensorDataset(*whole(data.keep_labels(train_set, share, seed)))
            student = train(name, few, bank, classes, epochs)
            scores[name].append(100 * accuracy(student, whole(test_set)))
        print(line(name, scores[name]), flush=True)
    known = data.keep_labels(train_set, share, 0).labelled
    print(
        f"\nTest accuracy on {len(test_set)} images, after {epochs} epochs of {len(train_set):,} "
        f"images, {known:,} of them labelled.\nThe teacher of digits_bank.py has seen all labels."
    )
    return scores


def line(name: str, scores: Sequence[float]) -> str:
    spread = f"± {statistics.stdev(scores):.1f}" if len(scores) > 1 else "(one seed)"
    each = ", ".join(f"{score:.1f}" for score in scores)
    return f"{name:<13} {statistics.mean(scores):5.1f} {spread} %   (by seed: {each})"


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bank", type=Path, help="of digits_bank.py; default: make it")
    parser.add_argument("--labels-per-class", type=int, default=5, help="0: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args(argv)
    if min(options.seeds, options.epochs) < 1 or options.labels_per_class < 0:
        parser.error("--seeds and --epochs must be at least 1, --labels-per-class at least 0")
    torch.set_num_threads(1)  # models this small gain nothing from a second thread
    with tempfile.TemporaryDirectory() as folder:
        if options.bank is None:
            print("training the teacher and storing its embeddings ...", flush=True)
            bank = digits_bank(Path(folder))
        else:
            bank = ckd.EmbeddingBank.open(options.bank)
        return compare(bank, options.labels_per_class, options.seeds, options.epochs)


if __name__ == "__main__":
    main()
