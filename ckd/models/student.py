"""A trained student with its maps to the teachers whose place it may take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from ckd._fit import fitted
from ckd.models.base import Model
from ckd.models.prepare import prepare
from ckd.models.spec import ModelError
from ckd.models.teacher_map import TeacherMap


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
    def teachers(self) -> tuple[TeacherMap, ...]:
        """The maps, in the order of the banks; each has a `name` and a `dim`."""
        return tuple(self.maps)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(x)

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
        return prepare(self.model, square.to(self.model.channel_mean.device))

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
    shape = list(getattr(image, "shape", ()))
    came = f"{image.dtype} of shape {shape}" if shape else type(image).__name__
    raise ModelError(
        f"images must be PIL images or uint8 [H, W], [H, W, {channels}] or [B, {channels}, H, W], "
        f"got {came}; add the batch's dimension to one image [C, H, W]"
    )
