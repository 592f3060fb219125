"""The headings of long helps: for each command, heading -> fields of its settings, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

OUTPUT = "output"
OUTPUT_FLAGS = ("json", "quiet")  # of every command, under the heading OUTPUT

HEADINGS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "train": {
        "method and run": ("method", "out", "resume", "eval", "seed"),
        "data": (
            *("data", "image_size", "max_image_pixels", "crop_padding", "flip", "workers"),
            *("label_fraction",),
        ),
        "student": ("student", "head", "ema"),
        "teacher and bank": (
            *("bank", "bank_weights", "teacher", "teacher_weights", "pool", "teacher_classes"),
        ),
        "loss": (
            *("distill", "distill_weight", "label_weight", "label_smoothing", "temperature"),
            *("targets", "centroids_per_class", "logit_scale", "learn_logit_scale"),
            "paper_compat",
        ),
        "optimisation": (
            *("epochs", "batch_size", "accumulate", "lr", "weight_decay", "warmup_epochs"),
            "clip_norm",
        ),
        "hardware and checkpoints": (
            *("device", "amp", "compile", "deterministic", "checkpoint_minutes"),
            *("checkpoint_steps", "log_to"),
        ),
    },
    "bank build": {
        "bank": ("out", "normalize", "rows_per_shard"),
        "from a teacher": ("teacher", "teacher_weights", "teacher_image_size", "pool"),
        "its images": ("data", "split", "image_size", "max_image_pixels"),
        "from a file of embeddings": ("from_npy", "labels", "ids", "class_names", "teacher_name"),
        "hardware": ("batch_size", "device", "workers"),
    },
    "eval": {
        "student": ("weights", "teacher"),
        "banks of the teacher's rows": ("bank", "test_bank", "texts"),
        "data": ("data", "image_size", "max_image_pixels", "label_fraction", "seed"),
        "figures": ("figures", "out"),
        "hardware": ("batch_size", "device", "workers"),
    },
}


def command_name(prog: str) -> str:
    """The command that is called as `prog`: "ckd bank build", or "python -m ckd.bank build"."""
    words = prog.removeprefix("python -m ").replace("ckd.", "ckd ", 1).split()
    return " ".join(words[1:])
