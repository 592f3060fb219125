"""A teacher of handwritten digits and the bank of its embeddings, for the other examples.

The teacher is a ResNet-8 that is trained here, in some ten seconds, on the labels of all 1,437
training images. Whatever a student learns from its rows, some of these labels are behind it.

    python examples/digits_bank.py --out banks/digits
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import ckd
from ckd import data, models
from ckd.bank.build import build_bank
from ckd.train import Config, train

TEACHER = Config(
    method="plain",
    data="digits",
    student="resnet8:width=32",
    epochs=12,
    lr=2e-3,
    warmup_epochs=1,
    flip=False,  # a mirrored digit is no digit
    log_to=("none",),
)


def digits_bank(folder: Path, epochs: int = TEACHER.epochs) -> ckd.EmbeddingBank:
    """The teacher's embeddings [1437, 128] of the training images, in `folder`/bank."""
    teacher = folder / "teacher"
    train(Config(**{**vars(TEACHER), "epochs": epochs, "out": str(teacher)}), verbose=False)
    return build_bank(
        data.load("digits", "train"), models.load(teacher), folder / "bank", progress=False
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("banks/digits"), help="a new folder")
    parser.add_argument("--epochs", type=int, default=TEACHER.epochs, help="of the teacher")
    arguments = parser.parse_args(argv)
    # Models this small gain nothing from a second thread.
    torch.set_num_threads(1)
    bank = digits_bank(arguments.out, arguments.epochs)
    print(f"{len(bank):,} rows of {bank.dim} numbers, {bank.nbytes / 1024:.0f} KiB: {bank.path}")


if __name__ == "__main__":
    main()
