"""safetensors: a student's weights under the names of the library that has the same network."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from ckd._hints import require
from ckd.export.portable import METADATA, ExportError, check_exportable, embeddings_of, metadata
from ckd.heads import TeacherSpaceHead
from ckd.models import Student
from ckd.models.base import agree, random_images
from ckd.models.hf_models import HFModel
from ckd.models.resnet import ResNet
from ckd.models.spec import parse
from ckd.models.timm_models import TimmModel
from ckd.models.vit import DEFAULTS, ViT

# The parts of a block of ckd's ViT, and what timm's VisionTransformer calls them.
_VIT_NAMES = {
    "class_token": "cls_token",
    "position": "pos_embed",
    "patch_embed.": "patch_embed.proj.",
    ".qkv.": ".attn.qkv.",
    ".out.": ".attn.proj.",
    ".mlp.0.": ".mlp.fc1.",
    ".mlp.2.": ".mlp.fc2.",
}
_TOLERANCE = 1e-4


class Network(NamedTuple):
    """`tensors` for the network that `library` (torch, timm or transformers) makes by `options`.

    options: timm: the arguments of create_model, or, for the package's own vision transformer, of
    timm.models.VisionTransformer; transformers: `architecture`, `config` and `classifier`; torch:
    `blocks` per stage of a CIFAR ResNet, which `programs.py` defines.
    """

    library: str
    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any]


def network_of(student: Student) -> Network:
    """Raises ExportError for a network that no library loads from a file alone."""
    check_exportable(student)
    model = student.model
    if isinstance(model, ViT):
        return _vit(model)
    if isinstance(model, ResNet):
        return Network("torch", model.state_dict(), {"blocks": len(model.layer1)})
    if isinstance(model, TimmModel):
        return _timm(model)
    if isinstance(model, HFModel):
        return _transformers(student, model)
    raise ExportError(
        f"no library but ckd has the network {student.spec}; use torch-export or onnx"
    )


def safetensors_files(student: Student, network: Network) -> dict[str, bytes]:
    """The content of each file by the suffix of its name: ".safetensors" with the network, and
    ".embedding.safetensors" with the map of its embedding into the teacher's space, if it has one.

    The map is in a file of its own, since loaders refuse names that the network has not.
    """
    about = {
        **metadata(student, normalised=False),
        "library": network.library,
        "options": dict(network.options),
    }
    files = {".safetensors": _file(network.tensors, about)}
    for name, number in embeddings_of(student):
        head = student.teachers[number].head if student.teachers else None
        if head is not None:
            folded = folded_head(head)
            files[f".{name}.safetensors"] = _file(folded.state_dict(), about["outputs"][name])
    return files


def folded_head(head: TeacherSpaceHead) -> nn.Module:
    """mean + sigma net(s) as plain layers: those of `net`, with mean and sigma in the last."""
    layers = [head.net] if isinstance(head.net, nn.Linear) else list(head.net.children())
    last = layers[-1]
    assert isinstance(last, nn.Linear)
    folded = nn.Linear(last.in_features, last.out_features)
    sigma, mean = head.sigma.double(), head.mean.double()
    folded.weight = nn.Parameter((sigma * last.weight.double()).float())
    folded.bias = nn.Parameter((mean + sigma * last.bias.double()).float())
    return folded if len(layers) == 1 else nn.Sequential(*layers[:-1], folded)


def _file(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # transformers refuses a file whose format is not named.
    return _in_order(safetensors.torch.save(whole, {"format": "pt", METADATA: json.dumps(about)}))


def _in_order(data: bytes) -> bytes:
    """The same file with the entries of its header's metadata sorted: safetensors writes them in no
    fixed order, but equal students must give equal files."""
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def _vit(model: ViT) -> Network:
    """timm's VisionTransformer with CLIP's activation and torch's epsilon is the same network."""
    sizes = parse(model.spec).integers(DEFAULTS)
    options = {
        "img_size": model.image_size,
        "patch_size": sizes["patch"],
        "in_chans": model.in_channels,
        "num_classes": model.num_classes or 0,
        "embed_dim": sizes["width"],
        "depth": sizes["layers"],
        "num_heads": sizes["heads"],
        "act_layer": "quick_gelu",
    }
    tensors = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in _VIT_NAMES.items():
            name = name.replace(ours, theirs)
        tensors[name] = tensor
    return Network("timm.models.VisionTransformer", tensors, options)


def _timm(model: TimmModel) -> Network:
    timm = require("timm", extra="timm", purpose="the export of a student of timm")
    network = model.embed.network
    name = parse(model.spec).name
    options: dict[str, Any] = {
        "model_name": name,
        "num_classes": model.num_classes or 0,
        "in_chans": model.in_channels,
    }
    config = network.pretrained_cfg or {}
    if config.get("fixed_input_size"):
        options["img_size"] = model.image_size
    fresh = timm.create_model(**options).eval()
    fresh.load_state_dict(network.state_dict())
    _check(model, fresh, lambda images: fresh(images))
    return Network("timm", network.state_dict(), options)


def _transformers(student: Student, model: HFModel) -> Network:
    transformers = require("transformers", extra="hf", purpose="the export of an hf: student")
    network, head = model.embed.network, model.head
    if head is None:
        raise ExportError(
            f"a student {student.spec} without a class head has no class in transformers that "
            "gives its embedding; use torch-export or onnx"
        )
    name = model.embed.head_name
    tensors = {**network.state_dict()}
    tensors |= {f"{name}.{key}": tensor for key, tensor in head.state_dict().items()}
    config = json.loads(network.config.to_json_string(use_diff=True))
    if student.class_names:
        config["id2label"] = {str(i): text for i, text in enumerate(student.class_names)}
        config["label2id"] = {text: i for i, text in enumerate(student.class_names)}
    architecture = type(network).__name__
    again = transformers.AutoConfig.for_model(**config)
    fresh = getattr(transformers, architecture)(again).eval()
    fresh.load_state_dict(tensors)
    _check(model, fresh, lambda images: fresh(images).logits)
    options = {"architecture": architecture, "config": config, "classifier": name}
    return Network("transformers", tensors, options)


@torch.no_grad()
def _check(model: TimmModel | HFModel, fresh: Any, run: Any) -> None:
    """Raise ExportError unless the library's own network gives what the model gives."""
    images = random_images((2, model.in_channels, model.image_size, model.image_size))
    given = model(images)
    expected = given.embedding if given.logits is None else given.logits
    if not agree(run(images), expected, _TOLERANCE):
        raise ExportError(
            f"{type(fresh).__name__}, made anew by its library, gives other outputs than the "
            f"student {model.spec}; use torch-export or onnx"
        )
