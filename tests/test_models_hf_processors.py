"""Preprocessing of transformers' models: `prepare` gives the pixel_values of their own image
processor, or the model is refused.

The expected values are those of the processor that transformers finds in the model's folder, on
images that look like photographs: smooth, with edges, with black and white areas.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ckd.models import ModelError, load, prepare
from tests.hf_tiny import MODELS, network

transformers = pytest.importorskip("transformers")

# A warning would say that there is no preprocessor_config.json.
pytestmark = pytest.mark.filterwarnings("error:.*preprocessor_config:UserWarning")

SIZES = ((32, 32), (48, 64), (300, 260), (75, 50))

# A resize in 8 bits rounds after each of its two passes, one in floats once. Pillow clips the
# filter's overshoot at edges after each pass too, which moves a few pixels by more.
MEAN, MOST, LEVELS, WORST = 0.4, 0.99, 2.0, 16.0  # of 255 levels


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()


def photos(height: int, width: int, count: int = 2) -> np.ndarray:
    """Images [N, H, W, 3] that resemble photographs: spectrum 1 / f, and a few flat shapes."""
    random = np.random.default_rng(height * 1000 + width)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = np.inf
    spectrum = np.exp(2j * np.pi * random.random((count, 3, *frequency.shape))) / frequency
    waves = np.fft.irfft2(spectrum, (height, width))
    images = 128 + 50 * waves / waves.std((2, 3), keepdims=True)
    images[:, :, height // 8 : height // 3, width // 8 : width // 2] = 240
    images[:, :, height // 2 : height // 2 + height // 5, width // 3 : width // 2] = 15
    images[:, 0, :, width // 2 :] += 40  # the channels differ, so do left and right
    return images.clip(0, 255).round().astype(np.uint8).transpose(0, 2, 3, 1)


def store(folder: Path, model: str, settings: Mapping[str, Any], **changes: Any) -> str:
    """A folder with the table's model, changed, and these settings; returns its name."""
    tiny = next(tiny for tiny in MODELS if tiny.model == model)
    network(tiny._replace(options={**tiny.options, **changes})).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return f"hf:{folder}"


def processor_of(folder: Path) -> Any:
    return transformers.AutoImageProcessor.from_pretrained(folder)


def process(processor: Any, images: np.ndarray) -> Tensor:
    given = [Image.fromarray(image) for image in images]
    return torch.as_tensor(
        np.stack([np.asarray(processor(images=x, return_tensors="pt")["pixel_values"][0])
                  for x in given])
    )  # fmt: skip


def assert_like(spec: str, processor: Any, **options: Any) -> None:
    """`prepare` gives what the processor gives, for images of several sizes."""
    model = load(spec, **options)
    black, white = (
        process(processor, np.full((1, 64, 64, 3), level, np.uint8))[0, :, 8, 8]
        for level in (0, 255)
    )
    gain = (white - black).view(1, 3, 1, 1) / 255
    assert gain.abs().min() > 0
    for size in SIZES:
        images = photos(*size)
        right = process(processor, images)
        ours = prepare(model, torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
        assert ours.shape == right.shape, (size, ours.shape, right.shape)
        error = ((ours - right) / gain).abs()
        share = (error <= LEVELS).float().mean().item()
        told = (size, f"{share:.1%}", error.mean().item(), error.max().item())
        assert share >= MOST, told
        assert error.mean() <= MEAN, told
        assert error.max() <= WORST, told
    x = prepare(model, torch.from_numpy(photos(40, 40).transpose(0, 3, 1, 2).copy()))
    assert torch.isfinite(model(x).embedding).all()


# -- processors -----------------------------------------------------------------------------------

SQUARE32, SQUARE64 = {"height": 32, "width": 32}, {"height": 64, "width": 64}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}

# name: (class of the processor, its settings, model, changes of the model's configuration)
PROCESSORS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "vit": ("ViT", {"size": SQUARE32}, "ViTForImageClassification", {}),
    "deit": ("DeiT", {"size": {"height": 64, "width": 64}, "crop_size": {"height": 56, "width": 56},
                      **IMAGENET}, "DeiTModel", {"image_size": 56}),
    "beit": ("Beit", {"size": {"height": 64, "width": 64}, "do_center_crop": True,
                      "crop_size": {"height": 56, "width": 56}}, "BeitModel", {"image_size": 56}),
    "beit without crop": ("Beit", {"size": SQUARE32}, "BeitForImageClassification", {}),
    "clip": ("CLIP", {"size": {"shortest_edge": 32}, "crop_size": SQUARE32},
             "CLIPVisionModel", {}),
    "clip, odd crop": ("CLIP", {"size": {"shortest_edge": 37}, "crop_size": SQUARE32},
                       "CLIPVisionModel", {}),
    "siglip": ("Siglip", {"size": SQUARE32}, "SiglipVisionModel", {}),
    "convnext": ("ConvNext", {"size": {"shortest_edge": 64}, "crop_pct": 0.875, **IMAGENET},
                 "ConvNextForImageClassification", {}),
    "convnext, crop_pct 0.95": (
        "ConvNext", {"size": {"shortest_edge": 96}, "crop_pct": 0.95, "resample": 2},
        "ConvNextForImageClassification", {}),
    "convnext at 384": ("ConvNext", {"size": {"shortest_edge": 384}, "crop_pct": 1.0},
                        "ConvNextModel", {}),
    "resnet": ("ConvNext", {"size": {"shortest_edge": 224}, "crop_pct": 0.875},
               "ResNetForImageClassification", {}),
    "levit": ("Levit", {"size": {"shortest_edge": 64}, "crop_size": SQUARE64},
              "LevitForImageClassification", {}),
    "bit (dinov2)": ("Bit", {"size": {"shortest_edge": 64},
                             "crop_size": {"height": 56, "width": 56}, **IMAGENET},
                     "Dinov2Model", {"image_size": 56}),
    "efficientnet": ("EfficientNet", {"size": SQUARE64, "resample": 3, "include_top": True},
                     "EfficientNetModel", {"image_size": 64}),
    "efficientnet, nearest": ("EfficientNet", {"size": SQUARE64, "resample": 0,
                                               "include_top": False, **IMAGENET},
                              "EfficientNetModel", {"image_size": 64}),
    "efficientnet, offset": (
        "EfficientNet", {"size": SQUARE64, "rescale_offset": True, "rescale_factor": 1 / 127.5,
                         "do_normalize": False}, "EfficientNetModel", {"image_size": 64}),
    "efficientnet, offset and normalised": (
        "EfficientNet", {"size": SQUARE64, "rescale_offset": True, "rescale_factor": 1 / 127.5,
                         "include_top": True, **IMAGENET},
        "EfficientNetModel", {"image_size": 64}),
    "mobilenet v1": ("MobileNetV1", {"size": {"shortest_edge": 73}, "crop_size": SQUARE64},
                     "MobileNetV1Model", {}),
    "mobilenet v2": ("MobileNetV2", {"size": {"shortest_edge": 72}, "crop_size": SQUARE64},
                     "MobileNetV2ForImageClassification", {}),
    "mobilevit": ("MobileViT", {"size": {"shortest_edge": 72}, "crop_size": SQUARE64,
                                "do_flip_channel_order": True}, "MobileViTModel", {}),
    "mobilevit v2": ("MobileViT", {"size": {"shortest_edge": 72}, "crop_size": SQUARE64,
                                   "do_flip_channel_order": False}, "MobileViTV2Model", {}),
    "poolformer": ("PoolFormer", {"size": {"shortest_edge": 64}, "crop_pct": 0.9,
                                  "crop_size": SQUARE64}, "PoolFormerForImageClassification", {}),
    "poolformer, crop_pct 0.95": (
        "PoolFormer", {"size": {"shortest_edge": 64}, "crop_pct": 0.95, "crop_size": SQUARE64},
        "PoolFormerModel", {}),
    "pvt": ("Pvt", {"size": SQUARE64}, "PvtForImageClassification", {}),
    "segformer": ("Segformer", {"size": SQUARE64, "do_reduce_labels": True},
                  "SegformerForImageClassification", {}),
    "flava": ("Flava", {"size": SQUARE32, "crop_size": SQUARE32}, "ResNetModel", {}),
    "dpt": ("DPT", {"size": SQUARE64}, "DPTModel", {"image_size": 64}),
    "chinese_clip": ("ChineseCLIP", {"size": SQUARE32, "do_center_crop": False},
                     "ChineseCLIPModel", {}),
    "blip": ("Blip", {"size": SQUARE32}, "BlipModel", {}),
    "owlvit": ("OwlViT", {"size": SQUARE32}, "OwlViTModel", {}),
    "swin": ("ViT", {"size": SQUARE64, "resample": 3, **IMAGENET}, "SwinModel",
             {"image_size": 64}),
    "ijepa": ("ViT", {"size": SQUARE32, "resample": 2}, "IJepaModel", {}),
    "cvt": ("ConvNext", {"size": {"shortest_edge": 64}, "crop_pct": 0.875, **IMAGENET},
            "CvtForImageClassification", {}),
    "seggpt": ("SegGpt", {"size": SQUARE64}, "ResNetModel", {}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSORS)
def test_prepare_gives_the_pixels_of_the_processor(name: str, tmp_path: Path) -> None:
    kind, settings, model, changes = PROCESSORS[name]
    spec = store(
        tmp_path, model, {"image_processor_type": f"{kind}ImageProcessor", **settings}, **changes
    )
    assert_like(spec, processor_of(tmp_path))


# name: (class of the processor, its settings): not a resize and crop to one square size.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "crops before it resizes": ("Perceiver", {"crop_size": SQUARE64, "size": SQUARE32}),
    "sizes by aspect": ("TextNet", {"size": {"shortest_edge": 64}}),
    "keeps the aspect": ("DPT", {"size": SQUARE64, "keep_aspect_ratio": True,
                                 "ensure_multiple_of": 32}),
    "multiples of 32": ("GLPN", {}),
    "pads to a square": ("Owlv2", {"size": SQUARE64}),
    "shortest and longest edge": ("Detr", {"size": {"shortest_edge": 64, "longest_edge": 96}}),
    "long side": ("Vilt", {"size": {"shortest_edge": 64}}),
    "pads": ("BridgeTower", {"size": {"shortest_edge": 64}, "crop_size": {"shortest_edge": 64}}),
    "a page": ("Donut", {"size": SQUARE64}),
    "colours as words": ("ImageGPT", {"size": SQUARE32, "clusters": [[0, 0, 0], [1, 1, 1]]}),
    "patches": ("Siglip2", {"patch_size": 8, "max_num_patches": 16}),
    "video": ("VideoMAE", {"size": {"shortest_edge": 32}, "crop_size": SQUARE32}),
    "no resize": ("Swin2SR", {}),
    "persons": ("VitPose", {}),
    "tiles": ("Idefics3", {}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_preprocessing_is_refused_by_the_name_of_its_class(name: str, tmp_path: Path) -> None:
    kind, settings = OTHERS[name]
    settings = {"image_processor_type": f"{kind}ImageProcessor", **settings}
    spec = store(tmp_path, "ResNetModel", settings)
    with pytest.raises((ModelError, ImportError), match=f"{kind}ImageProcessor"):
        load(spec)  # ImportError: of a package that this image processor needs


# -- settings -------------------------------------------------------------------------------------

VIT = {"image_processor_type": "ViTImageProcessor", "size": SQUARE32}
CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 36},
    "crop_size": SQUARE32,
}

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": VIT,
    "an older name": {**VIT, "image_processor_type": None,
                      "feature_extractor_type": "ViTFeatureExtractor"},
    "a newer name": {**VIT, "image_processor_type": "ViTImageProcessorFast"},
    "no name": {"size": SQUARE32, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    "not normalised": {**VIT, "do_normalize": False},
    "not rescaled": {**VIT, "do_rescale": False, "image_mean": [127.0] * 3,
                     "image_std": [60.0, 70.0, 80.0]},
    "neither": {**VIT, "do_rescale": False, "do_normalize": False},
    "another factor": {**VIT, "rescale_factor": 1 / 127.5},
    "another factor, not normalised": {**VIT, "rescale_factor": 1 / 127.5, "do_normalize": False},
    "mean and std per channel": {**VIT, **IMAGENET},
    "nearest": {**VIT, "resample": 0},
    "bilinear": {**VIT, "resample": 2},
    "bicubic": {**VIT, "resample": 3},
    "a size by its number": {**VIT, "size": 32},
    "shortest edge by its number": {**CLIP, "size": 36, "crop_size": 32},
    "shortest edge": CLIP,
    "shortest edge, no crop margin": {**CLIP, "size": {"shortest_edge": 32}},
    "height and width before the crop": {**CLIP, "size": {"height": 40, "width": 40}},
    "a wide margin": {**CLIP, "size": {"shortest_edge": 64}},
    "an odd margin": {**CLIP, "size": {"shortest_edge": 35}},
    "clip, bilinear": {**CLIP, "resample": 2},
    "no crop": {**CLIP, "size": SQUARE32, "do_center_crop": False},
    "values of other numbers of channels are not used": {**VIT, "image_mean": [0.3] * 3,
                                                        "image_std": [0.25] * 3},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_honoured(name: str, tmp_path: Path) -> None:
    settings = {key: value for key, value in SETTINGS[name].items() if value is not None}
    spec = store(tmp_path, "ViTModel", settings)
    assert_like(spec, processor_of(tmp_path))


# The processor's value or a refusal: transformers' versions differ in what they make of these.
DOUBTFUL: dict[str, dict[str, Any]] = {
    "one mean for all channels": {**VIT, "image_mean": 0.3, "image_std": 0.25},
    "null mean": {**VIT, "image_mean": None, "image_std": None},
    "null mean, not normalised": {**VIT, "image_mean": None, "do_normalize": False},
    "clip, nearest": {**CLIP, "resample": 0},
    "box": {**VIT, "resample": 4},
    "hamming": {**VIT, "resample": 5},
    "lanczos": {**VIT, "resample": 1},
    "one value in a list": {**VIT, "image_mean": [0.3], "image_std": [0.25]},
    "std of zero": {**VIT, "image_std": [0.0, 0.0, 0.0]},
    "height and width differ": {**VIT, "size": {"height": 32, "width": 40}},
    "longest edge": {**VIT, "size": {"longest_edge": 32}},
    "no resize": {**VIT, "do_resize": False},
    "no resize, but a crop": {**CLIP, "do_resize": False},
    "a crop that exceeds the image": {**CLIP, "size": {"shortest_edge": 24}},
    "shortest edge without crop": {**CLIP, "do_center_crop": False},
    "flipped channels": {**VIT, "do_flip_channel_order": True},
    "an offset": {**VIT, "rescale_offset": True},
    "a share": {**VIT, "crop_pct": 0.875},
    "an unknown class": {**VIT, "image_processor_type": "NoSuchImageProcessor"},
    "size of a word": {**VIT, "size": "large"},
    "resample of a word": {**VIT, "resample": "bicubic"},
    "an unknown resample": {**VIT, "resample": 17},
    "text for a mean": {**VIT, "image_mean": "half"},
    "an empty file": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DOUBTFUL)
def test_unusual_settings_are_the_processors_or_refused(name: str, tmp_path: Path) -> None:
    spec = store(tmp_path, "ViTModel", DOUBTFUL[name])
    try:
        load(spec)
    except ModelError:
        return
    processor = processor_of(tmp_path)
    if "size" not in DOUBTFUL[name]:
        processor = type(processor)(size=SQUARE32)
    assert_like(spec, processor)


def test_a_size_that_is_not_stored_is_the_models(tmp_path: Path) -> None:
    settings = {"image_processor_type": "ViTImageProcessor", **IMAGENET}
    spec = store(tmp_path, "ViTModel", settings)
    assert_like(spec, type(processor_of(tmp_path))(size=SQUARE32, **IMAGENET))


def test_geometry_is_scaled_to_the_size_of_position_embeddings(tmp_path: Path) -> None:
    settings = {**CLIP, "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    spec = store(tmp_path, "ViTModel", settings, image_size=56)
    right = type(processor_of(tmp_path))(size={"shortest_edge": 64}, crop_size=56)
    assert_like(spec, right)


def test_geometry_is_scaled_to_the_size_that_is_asked_for(tmp_path: Path) -> None:
    spec = store(tmp_path, "ResNetModel", {**CLIP, "size": {"shortest_edge": 64}, "crop_size": 56})
    assert load(spec).image_size == 56
    right = type(processor_of(tmp_path))(size={"shortest_edge": 128}, crop_size=112)
    assert_like(spec, right, image_size=112)


def test_models_of_any_size_take_the_processors(tmp_path: Path) -> None:
    spec = store(tmp_path, "ResNetModel", {**CLIP, "size": {"shortest_edge": 52}, "crop_size": 48})
    assert load(spec).image_size == 48


def test_gray_images_are_repeated_before_channels_are_treated(tmp_path: Path) -> None:
    kind, settings, model, _ = PROCESSORS["mobilevit"]
    settings = {"image_processor_type": f"{kind}ImageProcessor", "do_normalize": True, **settings}
    ours = load(store(tmp_path, model, settings))
    gray = photos(80, 64)[..., :1]
    right = process(processor_of(tmp_path), gray.repeat(3, axis=3))
    x = prepare(ours, torch.from_numpy(gray.transpose(0, 3, 1, 2).copy()))
    assert ((x - right).abs() * 255 <= LEVELS).float().mean() > MOST


# -- files ----------------------------------------------------------------------------------------


def test_settings_in_the_file_of_a_processor_for_images_and_texts(tmp_path: Path) -> None:
    # transformers 5 stores them there, and no preprocessor_config.json.
    spec = store(tmp_path, "CLIPModel", {})
    (tmp_path / "preprocessor_config.json").unlink()
    content = {"image_processor": {**CLIP, **IMAGENET}, "processor_class": "CLIPProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(content))
    processor = processor_of(tmp_path)
    if list(processor.image_mean) != IMAGENET["image_mean"]:
        pytest.skip("this transformers does not read processor_config.json")
    assert_like(spec, processor)


@pytest.mark.parametrize("content", ["{", "", "[]", '{"size": 32,}', "null", "\x00\x01"])
def test_a_broken_file_is_not_said_to_be_missing(content: str, tmp_path: Path) -> None:
    spec = store(tmp_path, "ViTModel", {})
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ModelError) as told:
        load(spec)
    assert "without a" not in str(told.value)
    assert "\n" not in str(told.value)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    spec = store(tmp_path, "ViTModel", {})
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning, match="preprocessor_config.json"):
        model = load(spec)
    assert (model.mean, model.std) == ((0.5,) * 3, (0.5,) * 3)
