"""The settings of a run: a frozen dataclass; its fields are the flags of `python -m ckd.train`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import tyro

from ckd._files import atomic_write, user_path
from ckd._hints import check_choices
from ckd._json import CHECKSUM, JsonError, as_dataclass, is_number, read_object, sealed, unsealed
from ckd.data import MAX_PIXELS
from ckd.losses import HeadKind
from ckd.models import Pool
from ckd.train.errors import ConfigError
from ckd.train.mix import HEAD_TERMS, WEIGHTS, parse_mix
from ckd.train.ranges import check_ranges

MethodName = Literal["plain", "logit-kd", "teacher-kd", "embed-kd"]
Targets = Literal["samples", "centroids"]
AmpMode = Literal["off", "bf16", "fp16"]
LogTo = Literal["auto", "none", "tensorboard", "wandb", "mlflow"]
AMP_MODES = get_args(AmpMode)

# Under `paper_compat`, a field that was left at its default takes the value of the paper's code.
# Besides, the class head's softmax is applied twice (method.py) and logit-kd is a cross-entropy
# against the teacher's probabilities (methods.py), the learning rate changes once an epoch and
# every parameter decays (schedule.py).
PAPER_SETTINGS: Mapping[str, Any] = {
    "epochs": 200,
    "targets": "centroids",
    "logit_scale": 1.0,
    "learn_logit_scale": False,
    "centroids_per_class": 100,
    "crop_padding": 0,
}

# A run may be resumed with other values of these: they say where and how fast it runs and what it
# refuses, not what it computes. (Another device or --compile rounds differently; the run goes on
# all the same.)
MAY_DIFFER_ON_RESUME = frozenset(
    {
        *("out", "device", "workers", "compile", "max_image_pixels"),
        *("checkpoint_minutes", "checkpoint_steps", "log_to"),
    }
)


@dataclass(frozen=True)
class Config:
    """Settings of one training run."""

    method: MethodName = "embed-kd"
    """plain: no teacher; logit-kd, teacher-kd: logits, embeddings of a running teacher;
    embed-kd: its stored embeddings (--bank)."""
    data: str = "digits"
    """The data set: digits, an image folder, parquet file(s) or .npz."""
    image_size: int | None = None
    """Resize and centre-crop the images to this many pixels; default: their own size."""
    max_image_pixels: int = MAX_PIXELS
    """Refuse encoded images of more pixels than this (default: 2^26) before decoding them."""
    student: str = "vit"
    """The student model, NAME[:key=value,...]; vit is the paper's (patch 4, width 256)."""
    bank: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """embed-kd: the folder of teacher embeddings, made by `python -m ckd.bank build`; several
    (--bank A --bank B) are distilled at once, each with terms, head and projection of its own."""
    bank_weights: tuple[float, ...] = ()
    """Weight of the terms of each --bank, in their order; default: 1 each."""
    teacher: str | None = None
    """logit-kd and teacher-kd: a model spec, a run folder or a .safetensors file."""
    teacher_weights: str | None = None
    """The weights of a --teacher or --eval that is a model's name: a file, or a run folder."""
    pool: Pool | None = None
    """teacher-kd: how an hf: teacher's tokens become its embedding, as in `ckd bank build`."""
    teacher_classes: str | None = None
    """logit-kd, --distill logits, --eval: a text file with the names of the teacher's classes, one
    per line in the order of its logits; default: the names that the model stores."""
    out: str | None = None
    """The run folder; default: runs/DATA-METHOD-seedSEED."""

    epochs: int = 30
    """Passes over the training set (200 under --paper-compat)."""
    batch_size: int = 64
    """Images per forward pass."""
    accumulate: int = 1
    """Forward passes per optimizer step; gradients are averaged over their images."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.1
    """Weight decay of matrices only; of every parameter under --paper-compat."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up, before the cosine decay of the learning rate to zero."""
    clip_norm: float = 0.0
    """Clip the norm of the gradient to this value; 0: off."""
    label_fraction: float = 1.0
    """Train with this fraction of the labels only, as many of each class, drawn by seed; of the
    other images, without theirs. 0: without labels."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy against the labels."""
    ema: float = 0.0
    """Decay of a moving average of the weights, evaluated and saved as the student; 0: off."""
    crop_padding: int | None = None
    """Random crop after padding by this many pixels; default: an eighth of the image size."""
    flip: bool = True
    """Random horizontal flip."""

    label_weight: float = 1.0
    """Weight of the cross-entropy against the labels: the sum over the images that have one,
    divided by the number of all images."""
    distill_weight: float | None = None
    """Weight of the distillation term, and of terms of --distill without a weight of their own;
    default: mse 2, cosine 5, soft and logits 1; contrastive, logit-kd, teacher-kd 0.5."""
    distill: str | None = None
    """embed-kd: the terms with their weights, as in contrastive=0.5,mse=2. mse, cosine: with the
    image's own row, through a --head into the teacher's space; soft: KL of the similarities to all
    rows (needs `ckd bank neighbours`); logits: KL with the logits of the bank's class head at
    --temperature; contrastive: with the projected bank. Default: mse; contrastive with --targets
    or --paper-compat."""
    head: HeadKind = "linear"
    """The head that cosine, mse and soft share: linear, or mlp with a hidden layer."""
    targets: Targets | None = None
    """embed-kd, the term contrastive: samples: with all rows of the bank; the image's own is the
    target. centroids: with the mean row of each class, as published; cheaper, less accurate
    (docs/results/accuracy.md). Default: samples; centroids under --paper-compat."""
    centroids_per_class: int | None = None
    """embed-kd: average this many rows per class, drawn by seed, in a centroid; default: all."""
    logit_scale: float = 14.2857
    """teacher-kd and the term contrastive: the initial scale of the cosines (1 / temperature)."""
    learn_logit_scale: bool = True
    """Whether the logit scale is trained."""
    temperature: float = 4.0
    """logit-kd, --distill logits: the temperature of both softmaxes."""
    paper_compat: bool = False
    """Train as the paper's published code does: its defaults, softmax applied twice,
    learning rate changed once an epoch, weight decay of every parameter."""

    seed: int = 0
    """Seed of the initial weights, the data order, augmentation and dropout."""
    amp: AmpMode = "off"
    """Mixed precision: autocast to this dtype."""
    compile: bool = False
    """Compile the student, and a teacher that runs beside it, with torch.compile."""
    deterministic: bool = False
    """Use deterministic GPU kernels only; CPU kernels always are."""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda, cuda:1, ..."""
    workers: int = 0
    """Processes that decode images; a data set in memory needs none."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints within an epoch; each epoch also ends with one."""
    checkpoint_steps: int = 0
    """Also save a checkpoint every this many optimizer steps; 0: off."""
    log_to: tuple[LogTo, ...] = ("auto",)
    """Where the numbers of each epoch go beside metrics.jsonl; several may be named. auto:
    TensorBoard if it is installed; none: nowhere else."""

    def __post_init__(self) -> None:
        # The dataclass is frozen. One bank or logger may be given as a string.
        for name in ("bank", "log_to"):
            object.__setattr__(self, name, _tuple(getattr(self, name)))
        if not self.paper_compat:
            return
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, value in PAPER_SETTINGS.items():
            if getattr(self, name) == defaults[name]:
                object.__setattr__(self, name, value)

    @property
    def folder(self) -> Path:
        """The run folder."""
        if self.out is not None:
            return user_path(self.out)
        return Path("runs") / f"{Path(self.data).stem}-{self.method}-seed{self.seed}"

    @property
    def mix(self) -> dict[str, float]:
        """embed-kd: the weight of each term, by name. Raises ConfigError for a bad --distill."""
        if self.distill is not None:
            return parse_mix(self.distill, self.distill_weight)
        name = "mse" if self.targets is None else "contrastive"
        return {name: WEIGHTS[name] if self.distill_weight is None else self.distill_weight}

    @property
    def term_weight(self) -> float:
        """logit-kd, teacher-kd: the weight of their one term."""
        return 0.5 if self.distill_weight is None else self.distill_weight

    @property
    def distils(self) -> bool:
        """Whether the loss has a term beside the cross-entropy against the labels."""
        if self.method == "embed-kd":
            return any(self.mix.values())
        return self.method != "plain" and self.term_weight > 0

    def check(self) -> None:
        """Raise ConfigError for the first setting that cannot work.

        What the method needs is checked by `ckd.train.methods.method_class`.
        """
        check_choices(self)
        check_ranges(self)
        if not self.log_to or (len(self.log_to) > 1 and {"auto", "none"} & {*self.log_to}):
            raise ConfigError(
                f"--log-to takes auto or none alone, or names of loggers, got {self.log_to}"
            )
        few_rows = self.method == "embed-kd" and self.centroids_per_class is not None
        if few_rows and self.targets != "centroids":
            raise ConfigError("--centroids-per-class needs --targets centroids")
        self._check_banks()
        self._check_mix()
        if self.pool is not None and self.method != "teacher-kd":
            raise ConfigError(
                "--pool goes with --method teacher-kd, which runs the teacher for its embeddings; "
                "a bank is built with its own --pool"
            )
        if self.warmup_epochs > self.epochs:
            raise ConfigError(
                f"--warmup-epochs must be at most --epochs ({self.epochs}), "
                f"got {self.warmup_epochs}"
            )

    def _check_banks(self) -> None:
        """Raise ConfigError for a bank that is named twice, and unless each weight has its bank."""
        folders = [os.path.normpath(bank) for bank in self.bank]
        if twice := [folder for folder in folders if folders.count(folder) > 1]:
            raise ConfigError(f"--bank names {twice[0]} twice")
        if self.bank_weights and len(self.bank_weights) != len(self.bank):
            raise ConfigError(
                f"--bank-weights must be one number for each --bank ({len(self.bank)}), "
                f"got {len(self.bank_weights)}"
            )
        for weight in self.bank_weights:
            if not (is_number(weight) and weight > 0):
                raise ConfigError(
                    f"--bank-weights must be above 0, got {weight}; leave out the bank instead"
                )

    def _check_mix(self) -> None:
        """Raise ConfigError for terms that cannot be parsed, or do not go with other settings."""
        if self.distill is not None and self.method != "embed-kd":
            raise ConfigError(
                "--distill goes with --method embed-kd, whose terms it names; the one term of "
                "logit-kd and teacher-kd has the weight --distill-weight, plain has none"
            )
        names = self.mix.keys() if self.method == "embed-kd" else set()
        if self.paper_compat and names - {"contrastive"}:
            raise ConfigError(
                "--paper-compat trains by the published loss, which is --distill contrastive; "
                "leave out one of the two"
            )
        if self.head != "linear" and not names & HEAD_TERMS:
            raise ConfigError(
                "--head goes with --distill cosine, mse or soft, which compare the student in the "
                "teacher's space"
            )
        if self.distill is not None and self.targets is not None and "contrastive" not in names:
            raise ConfigError(
                "--targets goes with the term contrastive, which --distill leaves out"
            )
        if not self.label_weight and not self.distils:
            raise ConfigError(
                "--label-weight 0 leaves nothing to learn from: there is no distillation term of a "
                "weight above 0; use --method embed-kd with a --bank"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as config.json holds them. With one bank it is that of earlier versions."""
        settings = dataclasses.asdict(self)
        settings["bank"] = [*self.bank] if len(self.bank) > 1 else next(iter(self.bank), None)
        settings["log_to"] = [*self.log_to]
        weights = settings.pop("bank_weights")
        return {**settings, "bank_weights": [*weights]} if weights else settings

    def save(self, path: Path) -> None:
        """Write config.json. Raises OSError."""
        atomic_write(path, sealed(self.to_dict()))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], source: Path) -> Config:
        """The inverse of `to_dict`; ConfigError names `source` and the fields that do not fit."""
        settings = {"bank_weights": [], **settings}
        if isinstance(old := settings.get("tensorboard"), bool) and "log_to" not in settings:
            del settings["tensorboard"]  # of version 0.1
            settings["log_to"] = ["auto" if old else "none"]
        known = {field.name for field in dataclasses.fields(cls)}
        if settings.keys() != known:
            misfits = ", ".join(sorted(settings.keys() ^ known))
            raise ConfigError(f"{source} was written by another version of ckd (fields: {misfits})")
        for name in ("bank", "bank_weights", "log_to"):
            settings[name] = _tuple(settings[name])
        try:
            config = as_dataclass(cls, settings)
            config.check()
        except (JsonError, ConfigError) as error:
            raise ConfigError(f"{source}: {error}") from error
        return config

    @classmethod
    def load(cls, path: Path) -> Config:
        """Read config.json. Raises ConfigError or FileNotFoundError, both naming the file."""
        try:
            values, data = read_object(path)
            if CHECKSUM not in values:
                raise ConfigError(
                    f"{path} was written by another version of ckd: it has no checksum; resume "
                    "with that version (its student.safetensors is read by this one too)"
                )
            settings = unsealed(values, data)
        except JsonError as error:
            raise ConfigError(
                f"{path} is damaged: {error}; restore it, or begin another run"
            ) from error
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        return cls.from_dict(settings, path)


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Fields that differ and forbid a resume (not in MAY_DIFFER_ON_RESUME), with both values."""
    before, after = old.to_dict(), new.to_dict()
    return {
        name: (before.get(name), after.get(name))
        for name in before | after
        if name not in MAY_DIFFER_ON_RESUME and before.get(name) != after.get(name)
    }


def _tuple(given: Any) -> Any:
    """The tuple that a string, a list or None stands for; anything else as it is."""
    if given is None or isinstance(given, str):
        return () if given is None else (given,)
    return tuple(given) if isinstance(given, list) else given
