"""A trained student with its maps to the teachers whose place it may take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from ckd._fit import fitted
from ckd.models.base import Model, came
from ckd.models.prepare import prepare
from ckd.models.spec import ModelError
from ckd.models.teacher_map import TeacherMap


class Prediction(NamedTuple):
    """A class of an image: its number, its name (the number where names are not known), and its
    probability in 0..1."""

    label: int
    class_name: str
    probability: float


class Student(nn.Module):
    """A student as it is used after training; `ckd.load_student` reads one from a run.

    `embedding` is comparable, by cosine, with what `comparable` makes of a teacher's rows. Trained
    with a head (`--distill` cosine, mse, soft) it lies in the teacher's space [B, D], and rows are
    compared as they are. Trained by `contrastive` alone it is the student's own [B, W], and rows
    are projected to that width. Without a map to a teacher (`plain`, `logits`) it is the student's
    own embedding.

    Args:
        model: the network, which `Model` describes. teachers: its maps, in the order of the banks.

    `forward` is `embedding`. Modules are not copied, nor is their mode changed.

    Example:
        >>> student = ckd.load_student("runs/embed-kd")
        >>> student.predict(Image.open("photo.jpg"))[0][0]
        Prediction(label=3, class_name='cat', probability=0.93)
        >>> x = student.preprocess([Image.open(path) for path in paths])
        >>> with torch.inference_mode():
        ...     features = student.features(x)
        ...     logits, embedding = student.logits(x), student.to_embedding(features)
        >>> bank = ckd.EmbeddingBank.open("banks/mine")
        >>> nearest = ckd.top_k(embedding, student.comparable(bank.embeddings()), 5)
    """

    def __init__(self, model: Model, teachers: Sequence[TeacherMap] = ()) -> None:
        super().__init__()
        self.model, self.maps = model, nn.ModuleList(teachers)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the logits; () without a class head, or where they are not known."""
        return self.model.class_names

    @property
    def num_classes(self) -> int | None:
        """C, the number of logits; None without a class head."""
        return self.model.num_classes

    @property
    def spec(self) -> str:
        """The name of the network, as `ckd.models.create` takes it."""
        return self.model.spec

    @property
    def image_size(self) -> int:
        """S: `preprocess` makes images of S x S pixels."""
        return self.model.image_size

    @property
    def in_channels(self) -> int:
        """3 for RGB, 1 for gray images."""
        return self.model.in_channels

    @property
    def mean(self) -> tuple[float, ...]:
        """Of each channel, for pixels in 0..1: `preprocess` gives (pixel - mean) / std."""
        return self.model.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Of each channel, as `mean`."""
        return self.model.std

    @property
    def device(self) -> torch.device:
        """Where the student is; `preprocess` brings images there."""
        return self.model.channel_mean.device

    @property
    def teachers(self) -> tuple[TeacherMap, ...]:
        """The maps, in the order of the banks; each has a `name` and a `dim`."""
        return tuple(self.maps)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(x)

    @torch.inference_mode()
    def predict(self, images: Any, top: int = 5) -> list[list[Prediction]]:
        """The `top` most probable classes (all, if there are fewer) of each image, in order.

        images: as `preprocess` takes them. Runs in evaluation mode; probabilities are the softmax
        of the logits in float32. For many images pass a batch at a time. Raises ModelError without
        a class head.
        """
        was_training = self.training
        self.eval()
        try:
            logits = self.logits(self.preprocess(images))
        finally:
            self.train(was_training)
        return ranked(logits.float().softmax(dim=1), self.class_names, top)

    def preprocess(self, images: Any) -> Tensor:
        """Images as the network expects them, [B, C, S, S] on its device.

        images: a PIL image (turned upright, and converted to RGB, or to gray for a network of one
        channel); uint8 arrays or tensors, one image [H, W] or [H, W, C], or a batch [B, C, H, W],
        gray or of the network's channels; or a list of these, of any sizes. As in
        training, the centre square is scaled to S x S (`--image-size`), for `ckd.models.prepare`.
        Raises ModelError for anything else.
        """
        if isinstance(images, list | tuple):
            if not images:
                raise ModelError("images must be at least one, got an empty list")
            return torch.cat([self.preprocess(image) for image in images])
        pixels = _pixels(images, self.model.in_channels)
        square = fitted(pixels.cpu(), self.model.image_size)
        return prepare(self.model, square.to(self.device))

    def features(self, x: Tensor) -> Tensor:
        """The student's own embedding [B, W] of preprocessed images."""
        return self.model(x).embedding

    def logits(self, x: Tensor) -> Tensor:
        """The logits [B, C] of preprocessed images. Raises ModelError without a class head."""
        logits = self.model(x).logits
        if logits is None:
            raise ModelError(
                f"the student {self.model.spec} has no class head: it was trained without labels; "
                "compare its embedding with rows of known classes"
            )
        return logits

    def embedding(self, x: Tensor, teacher: int = 0) -> Tensor:
        """`to_embedding` of the features of preprocessed images."""
        return self.to_embedding(self.features(x), teacher)

    def to_embedding(self, features: Tensor, teacher: int = 0) -> Tensor:
        """The features [B, W] as they are compared with `comparable` rows of a teacher: [B, D] in
        its space with a head, [B, W] with a projection or without a map."""
        if not self.maps and teacher == 0:
            return features
        return self._map(teacher).to_embedding(features)

    def comparable(self, rows: Tensor, teacher: int = 0) -> Tensor:
        """A teacher's rows [N, D] as they are compared with `embedding`, on the student's device:
        in float32, [N, D] with a head, P t + b [N, W] with a projection. Raises ModelError without
        either, and for rows of another width."""
        return self._map(teacher).comparable(rows)

    def __repr__(self) -> str:
        shape = f"{self.in_channels} x {self.image_size} x {self.image_size}"
        classes = "no class head" if self.num_classes is None else f"{self.num_classes} classes"
        maps = [
            f"{one.name!r} [{one.dim}] by a {'projection' if one.head is None else 'head'}"
            for one in self.teachers
        ]
        told = f"; teachers: {', '.join(maps)}" if maps else ""
        return f"Student({self.spec!r}, images {shape}, {classes}{told})"

    def _map(self, teacher: int) -> TeacherMap:
        if not self.maps:
            raise ModelError(
                "the student has no map to a teacher: only --method embed-kd trains one, by the "
                "terms contrastive, cosine, mse and soft; compare its features with one another"
            )
        if not 0 <= teacher < len(self.maps):
            names = ", ".join(repr(one.name) for one in self.teachers)
            raise ModelError(
                f"teacher must be at least 0 and below {len(self.maps)} ({names}), got {teacher}"
            )
        return self.teachers[teacher]


def ranked(probabilities: Tensor, class_names: Sequence[str], top: int) -> list[list[Prediction]]:
    """The `top` classes of each row [B, C], by falling probability; among equals the smaller number
    first. Raises ModelError for `top` below 1."""
    if top < 1:
        raise ModelError(f"top must be at least 1, got {top}")
    found = probabilities.sort(dim=1, descending=True, stable=True)
    values, labels = (part[:, :top].tolist() for part in found)
    return [
        [
            Prediction(label, class_names[label] if class_names else str(label), value)
            for value, label in zip(*row)
        ]
        for row in zip(values, labels)
    ]


def _pixels(image: Any, channels: int) -> Tensor:
    """uint8 [B, C, H, W] of one image, or of a batch."""
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise ModelError(
                f"pixels of mode {image.mode!r} do not fit 8 bits; convert the image to 8 bits per "
                "channel"
            )
        image = np.asarray(ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB"))
    pixels = image
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        pixels = torch.from_numpy(image.copy())  # which may be read-only, or have negative strides
    if isinstance(pixels, Tensor) and pixels.dtype == torch.uint8:
        if pixels.dim() == 2:
            pixels = pixels[:, :, None]
        if pixels.dim() == 3:
            pixels = pixels.permute(2, 0, 1)[None]
        if pixels.dim() == 4 and pixels.shape[1] in (1, channels) and pixels.numel():
            return pixels
    raise ModelError(
        f"images must be PIL images or uint8 [H, W], [H, W, {channels}] or [B, {channels}, H, W], "
        f"got {came(image)}; {_remedy(image)}"
    )


def _remedy(image: Any) -> str:
    if isinstance(image, str | Path):
        return "open the file: PIL.Image.open(path)"
    dtype = str(getattr(image, "dtype", ""))
    if "float" in dtype:
        return "pass the pixels 0..255 as they are stored: preprocess scales and normalises itself"
    if dtype.endswith("uint8") and getattr(image, "ndim", 0) == 4:
        return "channels come second in a batch: [B, C, H, W]"
    if dtype.endswith("uint8"):
        return "add the batch's dimension to one image [C, H, W]"
    return "convert them to uint8"
