"""The program that loads an exported student without ckd, as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ckd.export.portable import METADATA, embeddings_of
from ckd.export.weights import Network, folded_head
from ckd.models import Student

IMAGE = '"image.png"'  # the name in the programs, to be replaced


def torch_export_program(student: Student, path: Path) -> str:
    """Loads the .pt2 file by torch alone."""
    return _joined(
        ["import json, numpy, torch", "from PIL import Image, ImageOps"],
        [
            f"extra = {{{METADATA!r}: ''}}",
            f"model = torch.export.load({str(path)!r}, extra_files=extra).module()",
            *_image(student),
            *_tensor(student),
            "outputs = model(images)",
            *(f'{name} = outputs["{name}"]' for name in _outputs(student)),
            *_named(student, f"json.loads(extra[{METADATA!r}])"),
        ],
    )


def onnx_program(student: Student, path: Path) -> str:
    """Loads the .onnx file by ONNX Runtime alone."""
    size, channels = student.image_size, student.in_channels
    names = [*_outputs(student)]
    taken = ", ".join(names) if len(names) > 1 else f"({names[0]},)"
    return _joined(
        ["import json, numpy, onnxruntime", "from PIL import Image, ImageOps"],
        [
            f"model = onnxruntime.InferenceSession({str(path)!r})",
            f"about = json.loads(model.get_modelmeta().custom_metadata_map[{METADATA!r}])",
            *_image(student),
            f"images = pixels.reshape(1, {size}, {size}, {channels}).transpose(0, 3, 1, 2)",
            f'{taken} = model.run({names}, {{"images": images}})',
            *_named(student, "about"),
        ],
    )


def safetensors_program(student: Student, path: Path, network: Network) -> str:
    """Loads the .safetensors file by the library that has the network."""
    make = {"timm": _timm, "transformers": _transformers, "torch": _resnet}
    code = make.get(network.library, _vit)(student, str(path), network.options)
    embedding = ["embedding = features"]
    if student.teachers and (head := student.teachers[0].head) is not None:
        beside = path.with_name(f"{path.stem}.embedding.safetensors")
        embedding = [
            f"head = {_layers(folded_head(head))}",
            f"head.load_state_dict(load_file({str(beside)!r}))",
            "embedding = head(features)  # in the teacher's space",
        ]
    about = f"about = json.loads(safe_open({str(path)!r}, 'pt').metadata()[{METADATA!r}])"
    return _joined(
        [
            "import json, numpy, torch",
            *code.imports,
            "from PIL import Image, ImageOps",
            "from safetensors import safe_open",
            "from safetensors.torch import load_file",
        ],
        [
            about,
            *code.load,
            *_image(student),
            *_tensor(student),
            f"images = (images - {_column(student.mean)}) / {_column(student.std)}",
            *code.run,
            *embedding,
            *_named(student, "about"),
        ],
    )


class _Code(NamedTuple):
    """load: lines that make the network of the file; run: from `images` to `features`, and to
    `logits` with a class head."""

    imports: list[str]
    load: list[str]
    run: list[str]


def _timm(student: Student, path: str, options: Mapping[str, Any]) -> _Code:
    given = {**options, "checkpoint_path": path}
    name = given.pop("model_name")
    load = [f"model = timm.create_model({name!r}, {_keywords(given)}).eval()"]
    return _Code(["import timm"], load, _run_timm(student))


def _vit(student: Student, path: str, options: Mapping[str, Any]) -> _Code:
    load = [
        "norm = functools.partial(torch.nn.LayerNorm, eps=1e-5)",
        f"model = timm.models.VisionTransformer({_keywords(options)}, norm_layer=norm).eval()",
        f"model.load_state_dict(load_file({path!r}))",
    ]
    return _Code(["import functools, timm"], load, _run_timm(student))


def _run_timm(student: Student) -> list[str]:
    features = "features = model.forward_head(model.forward_features(images), pre_logits=True)"
    return [features, *([] if student.num_classes is None else ["logits = model(images)"])]


def _transformers(student: Student, path: str, options: Mapping[str, Any]) -> _Code:
    load = [
        'config = transformers.AutoConfig.for_model(**about["options"]["config"])',
        f"model = transformers.{options['architecture']}(config).eval()",
        f"model.load_state_dict(load_file({path!r}))",
        "taken = []  # the input of the classifier",
        f"model.{options['classifier']}.register_forward_pre_hook(lambda _, x: taken.append(x[0]))",
    ]
    run = [
        "logits = model(pixel_values=images).logits",
        "features = taken[-1].flatten(1)",
    ]
    return _Code(["import transformers"], load, run)


def _resnet(student: Student, path: str, options: Mapping[str, Any]) -> _Code:
    definition = _RESNET.format(path=path, blocks=options["blocks"]).strip().splitlines()
    head = 'logits = F.linear(features, w["linear.weight"], w["linear.bias"])'
    run = ["features = resnet(images)", *([] if student.num_classes is None else [head])]
    return _Code(["import torch.nn.functional as F"], definition, run)


# The CIFAR ResNet of He et al. 2015, whose shortcuts have no weights: in no library.
_RESNET = """
w = load_file({path!r})

def norm(x, name):
    mean, var = w[f"{{name}}.running_mean"], w[f"{{name}}.running_var"]
    return F.batch_norm(x, mean, var, w[f"{{name}}.weight"], w[f"{{name}}.bias"])

def resnet(x):
    x = F.relu(norm(F.conv2d(x, w["conv1.weight"], padding=1), "bn1"))
    for stage in (1, 2, 3):
        for block in range({blocks}):
            name, stride = f"layer{{stage}}.{{block}}", 2 if stage > 1 and block == 0 else 1
            y = F.conv2d(x, w[f"{{name}}.conv1.weight"], stride=stride, padding=1)
            y = F.conv2d(F.relu(norm(y, f"{{name}}.bn1")), w[f"{{name}}.conv2.weight"], padding=1)
            x, new = x[:, :, ::stride, ::stride], y.shape[1] - x.shape[1]
            x = F.pad(x, (0, 0, 0, 0, new // 2, new - new // 2))
            x = F.relu(norm(y, f"{{name}}.bn2") + x)
    return x.mean(dim=(2, 3))
"""


def _outputs(student: Student) -> Iterator[str]:
    if student.num_classes is not None:
        yield "logits"
    yield from (name for name, _ in embeddings_of(student))


def _image(student: Student) -> list[str]:
    """`pixels`, float32 in 0..1, of an image file, as ckd prepares them."""
    size, mode = student.image_size, "L" if student.in_channels == 1 else "RGB"
    square = f"ImageOps.fit(image, ({size}, {size}), Image.Resampling.BICUBIC)"
    return [
        f'image = ImageOps.exif_transpose(Image.open({IMAGE})).convert("{mode}")',
        f"pixels = numpy.asarray({square}, numpy.float32) / 255",
    ]


def _tensor(student: Student) -> list[str]:
    shape = f"1, {student.image_size}, {student.image_size}, {student.in_channels}"
    return [f"images = torch.from_numpy(pixels).reshape({shape}).permute(0, 3, 1, 2)"]


def _named(student: Student, about: str) -> list[str]:
    """Prints the name of the largest logit."""
    if student.num_classes is None:
        return ["print(embedding)"]
    if not student.class_names:
        return ["print(logits.argmax())"]
    return [f'print({about}["class_names"][logits.argmax()])']


def _layers(module: nn.Module) -> str:
    if isinstance(module, nn.Sequential):
        return f"torch.nn.Sequential({', '.join(_layers(child) for child in module)})"
    if isinstance(module, nn.Linear):
        return f"torch.nn.Linear({module.in_features}, {module.out_features})"
    if isinstance(module, nn.LayerNorm):
        return f"torch.nn.LayerNorm({module.normalized_shape[0]})"
    return f"torch.nn.{type(module).__name__}()"


def _column(values: Sequence[float]) -> str:
    if len({*values}) == 1:
        return repr(values[0])
    return f"torch.tensor({list(values)}).view(-1, 1, 1)"


def _keywords(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _joined(imports: Sequence[str], lines: Sequence[str]) -> str:
    return "\n".join([*sorted(imports, key=_is_from), "", *lines, ""])


def _is_from(line: str) -> bool:
    return line.startswith("from")
