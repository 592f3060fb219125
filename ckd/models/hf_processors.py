"""The image processors of transformers, as a Preprocessing."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ckd._errors import warn
from ckd._hints import require
from ckd.models.base import first_line
from ckd.models.preprocessing import Preprocessing, Unsupported, measure
from ckd.models.spec import ModelError, Spec

# Settings of pixels that some image processors read and others ignore.
_PER_CLASS = ("do_flip_channel_order", "rescale_offset", "crop_pct")


def measured(spec: Spec, native_size: int, channels: int) -> Preprocessing:
    """The preprocessing of the model's own image processor; if it has none, mean and std 0.5."""
    settings = _settings(spec)
    if settings is None:
        warn(
            f"{spec.text!r} comes without a preprocessor_config.json: its images are resized to "
            "the model's size and normalised with mean 0.5 and std 0.5",
            stacklevel=5,
        )
        return Preprocessing(native_size, (0.5,), (0.5,))
    auto = require("transformers", extra="hf", purpose=f"the model {spec.text!r}")
    try:
        with quiet(auto):
            processor = auto.AutoImageProcessor.from_pretrained(spec.name, trust_remote_code=False)
    except ValueError as error:
        raise ModelError(
            f"{spec.text!r}: transformers cannot tell the image processor of its "
            f"preprocessor_config.json, whose image_processor_type is "
            f"{settings.get('image_processor_type')!r}: {first_line(error)[:100]}"
        ) from error
    known = {*inspect.signature(type(processor).__init__).parameters}
    known |= {*getattr(getattr(processor, "valid_kwargs", None), "__annotations__", ())}
    for name in _PER_CLASS:
        if settings.get(name) and name not in known:
            raise ModelError(
                f"{spec.text!r}: its preprocessor_config.json sets {name}, which "
                f"{type(processor).__name__} does not read; name the right image_processor_type "
                f"there, or delete {name}"
            )

    def process(image: np.ndarray) -> np.ndarray:
        if image.shape[2] in (1, 3):  # as a photo, which is what processors are made for
            photo = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
            output = processor(images=photo, return_tensors="pt")
        else:
            output = processor(images=image, return_tensors="pt", input_data_format="channels_last")
        pixels = np.asarray(output.get("pixel_values", ()))
        if pixels.ndim != 4:
            raise Unsupported("it gives something else than an image for an image")
        return pixels[0]

    try:
        own = measure(process, channels, _edges(processor), half_even=False)
    except Unsupported as error:
        raise ModelError(
            f"{spec.text!r}: the preprocessing of {type(processor).__name__} cannot be repeated: "
            f"{error}"
        ) from error
    stores_size = "size" in settings or "crop_size" in settings
    return own if stores_size else own.at(native_size)


def _edges(processor: Any) -> set[int]:
    """The lengths to which this image processor may resize images, by its settings."""
    size = getattr(processor, "size", None) or {}
    sides = [size] if isinstance(size, int) else [value for value in dict(size).values() if value]
    crop = getattr(processor, "crop_pct", None) or 1
    # LeViT resizes the shorter side to 256/224 of its setting, ConvNeXt and PoolFormer to 1 / crop.
    return {edge for side in sides for edge in (side, int(side / crop), int(256 / 224 * side))}


def stored_normalisation(spec: Spec, native_size: int) -> Preprocessing:
    """Mean and std as stored, for a student: its training decides on the rest."""
    settings = _settings(spec) or {}
    mean, std = (
        tuple(value) if isinstance(value, list) else (value or 0.5,)
        for value in (settings.get("image_mean"), settings.get("image_std"))
    )
    return Preprocessing(native_size, mean, std)


def _settings(spec: Spec) -> dict[str, Any] | None:
    """The content of preprocessor_config.json, or None if there is no such file."""
    transformers = require("transformers", extra="hf", purpose=f"the model {spec.text!r}")
    try:
        settings, _ = transformers.ImageProcessingMixin.get_image_processor_dict(spec.name)
    except OSError as error:
        file = Path(spec.name) / "preprocessor_config.json"
        if file.is_file():
            raise ModelError(f"{spec.text!r}: {file} is no JSON object") from error
        if isinstance(error.__context__, ValueError):  # of the hub, and not JSON
            raise
        return None
    return settings


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without the hints and reports that transformers prints."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
