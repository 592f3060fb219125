"""Stage structure: files whose parts make no sense, also behind a checksum computed anew."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ckd import models
from ckd._json import CHECKSUM, sealed
from ckd.bank.neighbours import FOLDER
from tests.bank_tools import replace_part, replace_shard
from tests.campaign import odd
from tests.campaign.child import Result
from tests.campaign.commands import import_bank
from tests.campaign.targets import CASE, INPUTS, Target, Targets, targets_in
from tests.train_runs import STUDENT

# Tokens that no encoder writes, by the string that stands for them until then.
RAW = {
    "@deep": "[" * 100_000 + "]" * 100_000,
    "@unclosed": '{"a":' * 100_000,
    "@1e999": "1e999",
    "@digits": "1" * 5000,
    "@negative zero": "-0",
}
VALUES: list[Any] = [
    *(None, True, False, [], {}, "", "\0", "\ud800", "../x", "/dev/zero", "x" * 100_000, "1"),
    *(0, -1, 1.5, 1e308, -1e308, 2**31, 2**63, 2**64, 10**400, float("nan"), float("inf")),
    *([[]], [None], [0] * 1000, {"": ""}, {"a": {"b": []}}, *RAW),
]
NUMBERS = [0, 1, -1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 10**30, 1.5, None, "8", True]
DTYPES = ["F64", "F16", "BF16", "I64", "I8", "BOOL", "F8_E4M3", "C64", "F4", "", "X", None, 4]
DESCRIPTIONS = ["<f2", "<f8", ">f4", "<i4", "|O", "<U5", "<c8", "|V8", "|b1", "<f16", "", "x" * 999]
SHAPES = ["()", "(50,)", "(50, 8, 1)", "(-50, 8)", "(50, -8)", "(0, 8)", "(8, 50)", "(2**62, 8)"]
SHAPES += [
    "(4611686018427387904, 8)",
    "(50, 1099511627776)",
    "(True, 8)",
    "'x'",
    "None",
    "(1e9, 8)",
]


def stage(root: Path, seed: int) -> Callable[[int], Result]:
    targets = targets_in(root)
    kinds = [json_case] * 4 + [tensors_case] * 2 + [npy_case, odd.case, odd.case, odd.case]

    def case(number: int) -> Result:
        chance = random.Random(f"structure {seed} {number}")
        return kinds[number % len(kinds)](targets, chance)

    return case


def json_case(targets: Targets, chance: random.Random) -> Result:
    """Other values, missing and extra fields; the checksum is often right."""
    target = chance.choice([t for t in targets.all if ".json" in t.file])
    file = targets.copy(target.origin) / target.file
    lines = file.read_bytes().splitlines(keepends=True) if "jsonl" in target.file else []
    at = chance.randrange(len(lines)) if lines else 0
    values = json.loads(lines[at] if lines else file.read_bytes())
    stored = values.pop(CHECKSUM, None)
    told = "; ".join(_change(values, chance) for _ in range(chance.choice((1, 1, 2))))
    anew = chance.random() < 0.7
    if lines:
        lines[at] = _raw(json.dumps(values).encode()) + b"\n"
        file.write_bytes(b"".join(lines))
    elif anew:
        file.write_bytes(_raw(sealed(values)))
    else:
        file.write_bytes(_raw(json.dumps({**values, CHECKSUM: stored}, indent=2).encode()))
    if lines and anew:
        _reseal_state(targets, lambda state: _update_metrics(state, file.read_bytes()))
    return _judged(targets, target, f"{told}, checksum {'new' if anew else 'old'}", exact=not anew)


def _judged(targets: Targets, target: Target, told: str, *, exact: bool = False) -> Result:
    # A value that is read, but cannot be used, is refused by its own name.
    names = () if exact else (str(CASE), "--")
    result = target.judge(targets.run(target.read), exact=exact, names=names)
    if result.fault:
        return Result(result.kind, f"{target.origin.name}/{target.file}, {told}: {result.fault}")
    return result


def _change(values: Any, chance: random.Random) -> str:
    """Change one place of a JSON value; returns what was changed."""
    places = list(_places(values, ""))
    inside, key, where = chance.choice(places)
    how = chance.choice(("value", "value", "value", "value", "delete", "extra"))
    if how == "delete":
        del inside[key]
    elif how == "extra" and isinstance(inside, dict):
        inside[chance.choice(("extra", "", "\0", "__class__", "self"))] = chance.choice(VALUES)
    else:
        new = chance.choice(VALUES)
        inside[key], how = new, f"{new!r:.20}"
    return f"{where} {how}"


def _places(value: Any, where: str) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key, f"{where}.{key}"
        if isinstance(item, (dict, list)):
            yield from _places(item, f"{where}.{key}")


def _raw(data: bytes) -> bytes:
    for name, text in RAW.items():
        data = data.replace(json.dumps(name).encode(), text.encode())
    return data


def _reseal_state(targets: Targets, change: Callable[[dict[str, Any]], Any]) -> None:
    for file in targets.case.glob("checkpoint/*/state.json"):
        values = json.loads(file.read_bytes())
        del values[CHECKSUM]
        change(values)
        file.write_bytes(sealed(values))


def _update_metrics(state: dict[str, Any], data: bytes) -> None:
    hashes = {"metrics_bytes": len(data), "metrics_xxh3": xxhash.xxh3_64_hexdigest(data)}
    state["state"]["progress"].update(hashes)


def tensors_case(targets: Targets, chance: random.Random) -> Result:
    """Headers of safetensors that cannot be; hashes outside of the file are right."""
    target = chance.choice([t for t in targets.all if t.file.endswith(".safetensors")])
    if target.origin.name == "part":
        target = next(t for t in targets.all if t.file.startswith("shard"))
    file = targets.copy(target.origin) / target.file
    data, how, told = _other_header(file.read_bytes(), chance)
    file.write_bytes(data)
    if target.file.startswith("shard"):
        replace_shard(targets.case, int(target.file[6:11]), data)
    elif target.file.startswith(FOLDER):
        replace_part(targets.case, Path(target.file).name, data)
    elif target.file.startswith("checkpoint"):
        hashes = {"tensors_bytes": len(data), "tensors_xxh3": xxhash.xxh3_64_hexdigest(data)}
        _reseal_state(targets, lambda state: state.update(hashes))
    else:
        if chance.random() < 0.3:
            target = target._replace(read=_load_foreign)
        # The header as a whole has no checksum; its description and the tensors have.
        exact = target.read is not _load_foreign and how != "about"
        return _judged(targets, target, told, exact=exact)
    return _judged(targets, target, told)


def _load_foreign() -> None:
    """Weights without a description."""
    models.load(STUDENT, weights=CASE / "student.safetensors")


def _other_header(data: bytes, chance: random.Random) -> tuple[bytes, str, str]:
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    how = chance.choice(
        ("length", "shape", "dtype", "offsets", "json", "names", "body", "twice", "about")
    )
    name = chance.choice([name for name in header if name != "__metadata__"])
    entry, told = header[name], how
    if how == "shape":
        entry["shape"] = [chance.choice(NUMBERS) for _ in range(chance.randint(0, 4))]
        told = f"shape {entry['shape']}"
    elif how == "dtype":
        entry["dtype"] = chance.choice(DTYPES)
        told = f"dtype {entry['dtype']}"
    elif how == "offsets":
        entry["data_offsets"] = [chance.choice([*NUMBERS, len(body)]) for _ in range(2)]
        told = f"offsets {entry['data_offsets']}"
    elif how == "json":
        told = _change(header, chance)
    elif how == "about":
        told = "; ".join(_resealed(header.get("__metadata__", {}), chance))
    elif how == "names":
        header[chance.choice(("", "\0", "x" * 1000, "student.x", "a.b"))] = header.pop(name)
    elif how == "body":
        body = chance.choice((body[:-1], body + b"\0", b"", body * 2))
    text = _raw(json.dumps(header).encode())
    if how == "twice":
        text = text[:-1] + b"," + json.dumps({name: entry}).encode()[1:]
    length = len(text)
    if how == "length":
        length = chance.choice((0, 1, length - 1, length + 1, 10**8 + 1, 2**31, 2**63, 2**64 - 1))
        told = f"length {length}"
    return struct.pack("<Q", length) + text + body, how, told


def _resealed(metadata: dict[str, str], chance: random.Random) -> Iterator[str]:
    """Change the description of a student, with a right checksum; yields what was changed."""
    for name, text in metadata.items():
        values = json.loads(text)
        values.pop(CHECKSUM, None)
        yield _change(values, chance)
        metadata[name] = sealed(values).decode()


def _import_odd() -> int:
    return import_bank(INPUTS, CASE, Path("odd.npy")).dim


def npy_case(targets: Targets, chance: random.Random) -> Result:
    """Headers of .npy that cannot be."""
    targets.empty()
    text = "{'descr': '<f4', 'fortran_order': False, 'shape': (50, 8), }"
    old, new = chance.choice(
        [
            ("'<f4'", repr(chance.choice(DESCRIPTIONS))),
            ("'<f4'", "[('a', '<f4'), ('b', '|O')]"),
            ("(50, 8)", chance.choice(SHAPES)),
            ("False", chance.choice(("True", "None", "3", "'x'"))),
            (
                "{",
                chance.choice(("", "(" * 9000, "[" * 9000, "{'a': 1, ", "\0", "__import__('os').")),
            ),
            (
                text,
                chance.choice(("", "None", "[]", "1" * 9999, "'" + "x" * 70000 + "'", "\xff" * 99)),
            ),
        ]
    )
    header = text.replace(old, new, 1).encode("latin-1") + b"\n"
    version = chance.choice((b"\1\0", b"\2\0", b"\3\0", b"\4\0", b"\xff\xff"))
    length = len(header) + (chance.choice((-1, 1, 2**15, 2**31)) if chance.random() < 0.2 else 0)
    form = "<H" if version == b"\1\0" else "<I"
    length %= 2 ** (8 * struct.calcsize(form))
    body = np.ones((50, 8), np.float32).tobytes()[: chance.choice((None, None, -1, 0))]
    file = targets.sandbox / "odd.npy"
    file.write_bytes(b"\x93NUMPY" + version + struct.pack(form, length) + header + body)
    bank = next(t for t in targets.all if t.origin.name == "bank")
    target = bank._replace(
        file="odd.npy", read=lambda: import_bank(INPUTS, CASE, Path("odd.npy")).dim
    )
    return _judged(targets, target, f"{old:.20} -> {new!r:.40}")
