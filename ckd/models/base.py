"""The interface of all models: images in, embedding and logits out."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ckd._files import LFS_POINTER, holds_lfs_pointer
from ckd.models.preprocessing import SQUASHED, Resize
from ckd.models.spec import ModelError, Spec

# Errors of a network that gets images of another shape than it was made for.
_FORWARD_ERRORS = (
    RuntimeError,
    ValueError,
    AssertionError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
)


class ModelOutput(NamedTuple):
    """`embedding` [B, E] and `logits` [B, C], or None for a model without a classifier."""

    embedding: Tensor
    logits: Tensor | None


class Model(nn.Module):
    """A network that gives ModelOutput for normalised images [B, in_channels, size, size].

    `spec` is its name for `create`; `resize`, `flip_channels`, `mean` and `std` (one value per
    channel, for pixels in 0..1) are the preprocessing it expects, which `prepare` applies.
    `class_names` are the names of the logits, () where they are not known, and
    `other_class_names` the same classes in other vocabularies, such as WordNet ids. `pool` names
    the part of the output that is the embedding of an hf: model: a Pool, "projection" or
    "classifier"; None for other models.
    """

    channel_mean: Tensor
    channel_std: Tensor
    class_names: tuple[str, ...] = ()
    other_class_names: tuple[tuple[str, ...], ...] = ()
    pool: str | None = None
    # That of the network's position embeddings, if they are interpolated to `image_size`.
    native_size: int | None = None

    def __init__(
        self,
        *,
        spec: str,
        embedding_dim: int,
        num_classes: int | None,
        image_size: int,
        in_channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        resize: Resize = SQUASHED,
        flip_channels: bool = False,
    ) -> None:
        super().__init__()
        self.spec, self.embedding_dim, self.num_classes = spec, embedding_dim, num_classes
        self.image_size, self.in_channels = image_size, in_channels
        self.preprocess_with(mean, std, resize, flip_channels)

    def preprocess_with(
        self, mean: Sequence[float], std: Sequence[float], resize: Resize, flip_channels: bool
    ) -> None:
        """Set what `prepare` does for this model."""
        self.mean, self.std = tuple(mean), tuple(std)
        self.resize, self.flip_channels = resize, flip_channels
        # The same numbers on the model's device, so that `prepare` needs no copy to the device.
        shape = (1, self.in_channels, 1, 1)
        self.register_buffer("channel_mean", torch.tensor(mean).view(shape), persistent=False)
        self.register_buffer("channel_std", torch.tensor(std).view(shape), persistent=False)

    @property
    def classifier(self) -> nn.Module | None:
        """The layer from the embedding to the logits; None without classes or a single layer."""
        return None

    def check_images(self, images: Tensor) -> None:
        """ModelError unless `images` are floats of the shape this model was made for."""
        expected = (self.in_channels, self.image_size, self.image_size)
        given = isinstance(images, Tensor) and images.dim() == 4 and images.is_floating_point()
        if not given or images.shape[1:] != expected:
            raise ModelError(
                f"{self.spec} expects floating-point images of shape [B, "
                f"{', '.join(map(str, expected))}], got {came(images)}; use "
                "ckd.models.prepare, or the student's own preprocess"
            )


def check_model(model: object, function: str) -> None:
    """ModelError unless `model` is a Model, for a public function that takes one."""
    # torch.compile keeps the original model there.
    if isinstance(getattr(model, "_orig_mod", model), Model):
        return
    remedy = "load one with ckd.models.load"
    if isinstance(getattr(model, "model", None), Model):
        remedy = "pass its .model"
    elif isinstance(model, nn.Module):
        remedy = "make it one of ckd.models.create or load, or a subclass of ckd.models.Model"
    elif isinstance(model, Tensor):
        remedy = "the model comes first, the images second"
    raise ModelError(
        f"the model of ckd.models.{function} must be a ckd.models.Model, got {came(model)}; "
        f"{remedy}"
    )


def came(value: object) -> str:
    """What was passed, for messages: dtype and shape of an array, else its type."""
    shape = getattr(value, "shape", None)
    if shape is None:
        text = f" {value!r:.80}" if isinstance(value, str | Path) else ""
        return f"{type(value).__name__}{text}"
    return f"{getattr(value, 'dtype', type(value).__name__)} of shape {list(shape)}"


def check_teacher(model: Model) -> None:
    """Raise ModelError if an image's embedding is random, or depends on the rest of the batch.

    Stored once, such an embedding would not be the image's. Runs the model in evaluation mode on
    two images, again on the same, and on the second of them before another one.
    """
    check_model(model, "check_teacher")
    mean = model.channel_mean
    shape = (3, model.in_channels, model.image_size, model.image_size)
    # Of different contrast: a batch of like images hides a division by the batch's deviation.
    contrast = torch.tensor([1.0, 0.5, 3.0]).view(3, 1, 1, 1)
    images = (contrast * random_images(shape)).to(mean.device, mean.dtype)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            pair, again = (model(images[:2]).embedding for _ in range(2))
            other = model(images[1:]).embedding
    finally:
        model.train(was_training)
    # GPUs round float32 convolutions to 10 bits (TF32); half precision has 8 to 11 bits.
    for same, what in (
        (agree(again, pair, 0.02), "differs from one forward to the next: it has a random part"),
        (bool(pair.isfinite().all()), "is not finite"),
        (agree(other[:1], pair[1:], 0.02), "depends on the other images of its batch"),
    ):
        if not same:
            raise ModelError(
                f"{model.spec!r} cannot be a teacher: an image's embedding {what}; switch that off "
                "in the model's configuration, or choose another teacher"
            )


def probe(spec: Spec, run: Callable[[Tensor], Any], image_size: int, in_channels: int) -> Any:
    """What `run`, a network or a function that calls one, gives for two random images.

    Raises ModelError if it does not take images of that shape.
    """
    images = random_images((2, in_channels, image_size, image_size))
    try:
        with torch.no_grad():
            return run(images)
    except _FORWARD_ERRORS as error:
        raise ModelError(
            f"{spec.text!r} does not take images of {image_size} x {image_size} pixels with "
            f"{in_channels} channels: {first_line(error)}"
        ) from error


def one_vector_each(spec: Spec, embedding: Any) -> Tensor:
    """`embedding`, if it is a tensor [2, E], as the two images of `probe` should give."""
    if isinstance(embedding, Tensor) and embedding.dim() == 2 and len(embedding) == 2:
        return embedding
    given = f"shape {list(embedding.shape)}" if isinstance(embedding, Tensor) else type(embedding)
    raise ModelError(
        f"{spec.text!r} gives embeddings of {given} for two images, not one vector per image; "
        "choose a model that pools its features"
    )


def per_channel(values: Sequence[float], channels: int) -> list[float]:
    """`values` if there is one per channel, else their mean for every channel."""
    if len(values) == channels:
        return list(values)
    return [sum(values) / len(values)] * channels


def first_line(error: Exception) -> str:
    """The first line of a library's error; the rest is often advice on using that library."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


def reason(error: Exception, folder: Path) -> str:
    """Why a library could not load a model from a folder or the hub, in one line."""
    for file in folder.glob("*"):
        if holds_lfs_pointer(file):
            return f"{file}: {LFS_POINTER}"
    if isinstance(error, pickle.PickleError | EOFError):
        # Without torch's own message, which advises to let the file run any code.
        return "a file of weights is damaged, or holds other objects than tensors"
    return first_line(error)


def agree(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    """Whether two results [B, E] of one computation are equal, relative to the length of a row."""
    if ours.shape != theirs.shape:
        return False
    ours, theirs = ours.double().nan_to_num(), theirs.double().nan_to_num()
    return bool(((ours - theirs).norm(dim=1) <= tolerance * theirs.norm(dim=1) + 1e-12).all())


def random_images(shape: tuple[int, ...]) -> Tensor:
    """The same normal numbers at every call, on the CPU whatever torch's default device is."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
