"""Small image data sets on disk, for the tests that read them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(n: int, size: int = 8, seed: int = 0) -> np.ndarray:
    """Random images, uint8 [n, size, size, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def write_images(folder: Path, images: np.ndarray) -> None:
    """folder/0.png, folder/1.png, ..."""
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        (folder / f"{i}.png").write_bytes(encoded(image))


def write_layout(root: Path, *folders: str) -> Path:
    """Two images in each of the folders, all different; returns `root`."""
    for seed, folder in enumerate(folders):
        write_images(root / folder, pixels(2, seed=seed))
    return root


def write_parquet(
    path: Path,
    images: list[bytes | None],
    labels: list[int] | None,
    *,
    image_column: str = "img",
    label_column: str = "label",
    class_names: list[str] | None = None,
    row_group_size: int | None = None,
) -> Path:
    """A parquet file as Hugging Face datasets writes them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, object] = {image_column: [{"bytes": data, "path": None} for data in images]}
    if labels is not None:
        columns[label_column] = labels
    table = pa.table(columns)
    if class_names is not None:
        features = {label_column: {"names": class_names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path
