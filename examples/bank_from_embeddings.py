"""A bank from embeddings that your own code computes, with transformers, timm, or as a .npy file.

`ckd bank build --teacher hf:NAME` (or `timm:NAME`) does this for the models that ckd reads. Where
the teacher is your own, or its embeddings exist already, ckd.BankWriter takes them, in batches:

    python examples/bank_from_embeddings.py --out banks/tiny
    python examples/bank_from_embeddings.py --out banks/clip --model openai/clip-vit-base-patch32
    python examples/bank_from_embeddings.py --out banks/timm --model timm/resnet18.a1_in1k
    python examples/bank_from_embeddings.py --out banks/mine --npy clip.npy --labels labels.npy

Without --model it needs no network: it makes a tiny CLIP with random weights, which shows how it
is done and is no good teacher.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import ckd
from ckd import data
from ckd.bank import import_npy

Embed = Callable[[list[Image.Image]], Tensor]  # of a batch of images: [n, D]


def embed_with_transformers(name: str | Path) -> Embed:
    """The projected image embedding of CLIP or SigLIP, else the class token of a ViT or DINOv2."""
    from transformers import AutoImageProcessor, AutoModel

    processor = AutoImageProcessor.from_pretrained(name)
    model: Any = AutoModel.from_pretrained(name).eval()

    def embed(images: list[Image.Image]) -> Tensor:
        inputs = processor(images=images, return_tensors="pt")
        if not hasattr(model, "get_image_features"):
            # Not pooler_output: for many published ViTs its layer has random weights.
            return model(**inputs).last_hidden_state[:, 0]
        features = model.get_image_features(**inputs)
        # A tensor up to transformers 4, from 5 on an output that holds it.
        return features if isinstance(features, Tensor) else features.pooler_output

    return embed


def save_tiny_clip(folder: Path) -> Path:
    """A CLIP with random weights, as `save_pretrained` stores a model."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = CLIPConfig(
        text_config={**tower, **ends, "num_hidden_layers": 1, "vocab_size": 50},
        vision_config={**tower, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8},
        projection_dim=64,
    )
    CLIPModel(config).save_pretrained(folder)
    processor = {"image_processor_type": "CLIPImageProcessor", "size": 32, "crop_size": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def embed_with_timm(name: str, pretrained: bool = True) -> Embed:
    """The input of the classifier, which `num_classes=0` leaves out."""
    import timm

    model = timm.create_model(name, pretrained=pretrained, num_classes=0).eval()
    transform: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return lambda images: model(torch.stack([transform(image) for image in images]))


def pictures(dataset: data.Dataset, batch_size: int = 64) -> Iterator[tuple[Any, ...]]:
    """(sample ids, PIL images, labels), a batch at a time."""
    for batch in dataset.batches(torch.arange(len(dataset)), batch_size):
        pixels = batch.images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3)  # gray as RGB
        yield batch.sample_ids, [Image.fromarray(p.numpy()) for p in pixels], batch.labels


@torch.inference_mode()
def bank_of_model(folder: Path, dataset: data.Dataset, embed: Embed, teacher: str) -> None:
    """Embed all images of a data set, under its own sample ids.

    `ckd train --data digits --bank FOLDER` finds each image's row by that id, and the fingerprint
    lets it refuse a bank of other data. Killed and run again, this goes on after the last full
    shard: the writer skips rows that it has.
    """
    _, first, _ = next(pictures(dataset, batch_size=1))
    writer = ckd.BankWriter(
        folder,
        dim=embed(first).shape[1],
        teacher=teacher,
        dataset=f"{dataset.name} ({dataset.split})",
        fingerprint=dataset.fingerprint,
        class_names=dataset.class_names,
        rows=len(dataset),  # fewer would leave the bank incomplete, with an error
    )
    if writer.is_complete():  # a finished bank is not opened for writing again
        return
    with writer:
        for sample_ids, images, labels in pictures(dataset):
            writer.write(sample_ids, embed(images), labels)


def describe(folder: Path) -> ckd.EmbeddingBank:
    """Open the bank, and say how often the nearest other row is of the same class."""
    bank = ckd.EmbeddingBank.open(folder)
    print(f"{len(bank):,} rows of {bank.dim} numbers by {bank.teacher_name}: {bank.path}")
    if bool((bank.labels >= 0).all()) and len(bank) > 1:
        rows = bank.embeddings().float()
        rows = rows - bank.statistics().mean.float()  # rows share a mean that hides differences
        nearest = ckd.top_k(rows, rows, 2).rows  # the first is, as a rule, the row itself
        others = nearest[:, 1].where(nearest[:, 0] == torch.arange(len(bank)), nearest[:, 0])
        same = (bank.labels[others] == bank.labels).float().mean().item()
        print(f"the nearest other row is of the same class: {same:.1%}")
    return bank


def main(argv: Sequence[str] | None = None) -> ckd.EmbeddingBank:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the bank's folder")
    parser.add_argument("--data", default="digits", help="as --data of ckd train")
    parser.add_argument("--image-size", type=int, help="as --image-size of ckd train")
    parser.add_argument("--model", help="a transformers model of the hub, or timm/NAME")
    parser.add_argument("--npy", type=Path, help="embeddings [N, D], instead of a model")
    parser.add_argument("--labels", type=Path, help="with --npy: classes, integers [N]")
    options = parser.parse_args(argv)
    if options.npy is not None:
        # What `ckd bank build --from-npy FILE --labels FILE --out FOLDER` does. Row i gets the
        # sample id i; `ids=` names a file of other ids.
        import_npy(options.npy, options.out, labels=options.labels, teacher=options.npy.name)
        return describe(options.out)
    if options.model is None:
        with tempfile.TemporaryDirectory() as folder:
            embed = embed_with_transformers(save_tiny_clip(Path(folder)))
    elif options.model.startswith("timm/"):
        embed = embed_with_timm(options.model.removeprefix("timm/"))
    else:
        embed = embed_with_transformers(options.model)
    dataset = data.load(options.data, "train", image_size=options.image_size)
    bank_of_model(options.out, dataset, embed, options.model or "tiny random CLIP")
    return describe(options.out)


if __name__ == "__main__":
    main()
