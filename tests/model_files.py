"""Files of `ckd.models.save` with other content, and what loading a folder of such files costs."""

from __future__ import annotations

import json
import resource
import struct
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ckd import _json
from ckd.models import ModelError, create, load, save

SPECS = {"vit": "vit:patch=4,width=16,layers=2,heads=2", "resnet": "resnet8:width=4"}
NAMES = ("a", "b", "ç")


def saved(path: Path, kind: str = "vit") -> Path:
    model = create(SPECS[kind], num_classes=3, image_size=8)
    save(model, path, class_names=NAMES)
    return path


def description(path: Path) -> dict[str, Any]:
    """The description in a file of `save`, without its checksum."""
    with safe_open(path, "pt") as file:
        values = _json.parse_object(file.metadata()["ckd_model"].encode())
    del values[_json.CHECKSUM]
    return values


def resealed(path: Path, **changed: object) -> str:
    """The description in a file of `save`, with other values and the checksum of those."""
    return _json.sealed({**description(path), **changed}).decode()


def write(path: Path, text: str, tensors: dict[str, list[int]]) -> None:
    """A file of safetensors with this description and zeros in float32 tensors of these shapes."""
    header: dict[str, Any] = {"__metadata__": {"ckd_model": text}}
    end = 0
    for name, shape in tensors.items():
        size = 4
        for side in shape:
            size *= side
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    data = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data + bytes(end))


def main(folder: Path) -> None:
    """Loads each file of the folder, and prints the outcomes and seconds by name, and the growth
    of the process in MiB. A name before `@` is the model whose weights the file is."""
    files = sorted(folder.iterdir())
    # What is imported by the first load of its kind is not counted.
    saved(folder / "good.safetensors")
    torch.save(load(folder / "good.safetensors").state_dict(), folder / "good.pt")
    for name in ("good.safetensors", "good.pt"):
        load(SPECS["vit"], weights=folder / name)
    load(saved(folder / "resnet.safetensors", "resnet"))
    before, outcomes = _peak(), {}
    for file in files:
        spec = file.name.partition("@")[0] if "@" in file.name else None
        began = time.process_time()
        try:
            load(spec, weights=file) if spec else load(file)
            outcome = "loaded"
        except ModelError as error:
            outcome = "refused" if str(file) in str(error) else f"nameless: {error}"
        outcomes[file.name] = (outcome, time.process_time() - began)
    print(json.dumps({"outcomes": outcomes, "grown_mib": _peak() - before}))


def _peak() -> float:
    """The most MiB of this process. On Linux, getrusage also counts the process that forked it."""
    if (status := Path("/proc/self/status")).exists():
        (line,) = (one for one in status.read_text().splitlines() if one.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]))
