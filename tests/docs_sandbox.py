"""A folder with small data, teachers, banks and runs of the names that the docs use."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path

import numpy as np
import torch

from ckd import cli, models
from tests.hf_tiny import TEXT, Tiny, V, store
from tests.image_files import encoded, pixels, write_parquet

CLIP = Tiny(
    "CLIPModel",
    "CLIPConfig",
    {
        "text_config": TEXT,
        "vision_config": {**V, "projection_dim": 12},
        "projection_dim": 12,
    },
    "features",
)
COMMANDS = (
    "train --data digits --method plain --student resnet8 --epochs 1 --lr 2e-3 --out runs/teacher",
    "bank build --data digits --teacher runs/teacher --out banks/digits",
    "train --data digits --bank banks/digits --student resnet8:width=8 --epochs 1 --lr 2e-3"
    " --out runs/student",
    "bank build --data photos --image-size 32 --teacher hf:clip --out banks/photos",
)


def fill(folder: Path) -> None:
    """Fill `folder`, which is the working directory."""
    for number, name in enumerate(("rose", "tulip", "violet")):
        (folder / "photos" / name).mkdir(parents=True)
        for i, image in enumerate(pixels(12, size=40, seed=number)):
            (folder / "photos" / name / f"{i}.jpg").write_bytes(encoded(image[:36], "JPEG"))
    shutil.copytree(folder / "photos" / "rose", folder / "new")
    for split, count in (("train", 60), ("test", 20)):
        images = [encoded(image) for image in pixels(count, size=32, seed=count)]
        write_parquet(
            folder / "cifar10" / f"{split}-00000-of-00001.parquet",
            images,
            [i % 10 for i in range(count)],
            class_names=[f"class {c}" for c in range(10)],
        )
    labels = np.arange(200) % 4
    names = np.array(["a", "b", "c", "d"])
    np.savez("mine.npz", images=pixels(200, size=16), labels=labels, class_names=names)
    generator = np.random.default_rng(0)
    np.save("clip.npy", generator.normal(size=(200, 24)).astype("float16"))
    np.save("labels.npy", labels)
    np.save("texts.npy", generator.normal(size=(10, 64)).astype("float32"))
    np.save("classes.npy", np.arange(10))
    Path("classes.txt").write_text("".join(f"{digit}\n" for digit in range(10)))
    store(CLIP, folder / "clip")
    torch.manual_seed(0)
    resnet = models.create("resnet56", num_classes=10, image_size=32)
    models.save(resnet, folder / "resnet56.safetensors")
    for command in COMMANDS:
        status, output = run_command(command.split())
        assert status == 0, f"ckd {command}\n{output}"
    shutil.copytree("runs/student", "runs/mine")


def run_command(argv: list[str]) -> tuple[int, str]:
    """Run `ckd ARGV` in this process: its exit status, and what it printed."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            status = cli.main(argv)
        except SystemExit as stop:
            status = 0 if stop.code is None else int(stop.code)
    return status, output.getvalue()
