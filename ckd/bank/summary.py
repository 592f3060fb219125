"""Summary of a bank as a dictionary and as text, with its savings over running the teacher."""

from __future__ import annotations

from typing import Any, TypeGuard

from ckd.bank import neighbours
from ckd.bank.manifest import INTEGER_LIMIT, BankError
from ckd.bank.reader import EmbeddingBank

# With more classes than this, rows per class are given as a range and a median.
_CLASSES_LISTED = 20


def summarize(bank: EmbeddingBank) -> dict[str, Any]:
    """The bank in plain JSON values; `saves` is None where the teacher's cost was not recorded."""
    meta = bank.meta
    counts = bank.class_counts()
    head = bank.class_head()
    return {
        "path": str(bank.path),
        "schema_version": meta["schema_version"],
        "rows": len(bank),
        "dim": bank.dim,
        "dtype": meta["dtype"],
        "normalized": meta["normalized"],
        "shards": len(meta["shards"]),
        "bytes": bank.nbytes,
        "teacher": meta["teacher"],
        "class_head": head
        and {"classes": head.num_classes, "class_names": head.class_names, "order": head.order},
        "preprocessing": meta["preprocessing"],
        "dataset": meta["dataset"],
        "fingerprint": meta["fingerprint"],
        "versions": meta["versions"],
        "classes": [{"name": name, "rows": count} for name, count in counts],
        "rows_without_label": int((bank.labels < 0).sum()),
        "saves": _savings(bank, len(counts)),
        "neighbours": _neighbours(bank),
    }


def describe(bank: EmbeddingBank) -> str:
    """The summary as a few aligned lines."""
    facts = summarize(bank)
    normalized = "scaled to length 1" if facts["normalized"] else "as the teacher gave them"
    shards = "1 shard" if facts["shards"] == 1 else f"{facts['shards']} shards"
    lines = [
        ("bank", facts["path"]),
        ("rows", f"{facts['rows']:,} x {facts['dim']} float16, {normalized}"),
        ("on disk", f"{human_bytes(facts['bytes'])} in {shards}"),
        ("teacher", _teacher_line(facts["teacher"])),
        ("", _head_line(facts["class_head"])),
        ("data", _data_line(facts["dataset"], facts["fingerprint"])),
        *_class_lines(facts["classes"], facts["rows_without_label"]),
        *_saving_lines(facts["saves"], facts["rows"]),
        *_neighbour_lines(facts["neighbours"]),
    ]
    return "\n".join(f"{head:<9}{text}" for head, text in lines)


def human_bytes(count: float) -> str:
    """Binary units, three significant digits: 7.21 MiB."""
    return _scaled(count, ("bytes", "KiB", "MiB", "GiB", "TiB"), 1024)


def percent(share: float) -> str:
    """Three significant digits: 12.3 %."""
    return f"{100 * share:.3g} %"


def _scaled(value: float, units: tuple[str, ...], step: int = 1000) -> str:
    for unit in units[:-1]:
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= step
    return f"{value:.3g} {units[-1]}"


def _flops(count: float) -> str:
    return _scaled(count, ("FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs", "PFLOPs", "EFLOPs"))


def _savings(bank: EmbeddingBank, classes: int) -> dict[str, int] | None:
    """Compute and memory of the teacher, reads and memory of the bank; None if not recorded."""
    teacher = bank.meta["teacher"] or {}
    flops, weights = teacher.get("flops_per_image"), teacher.get("weights_bytes")
    if not _is_count(flops) or not _is_count(weights):
        return None
    return {
        "teacher_flops_per_image": flops,
        "teacher_flops_per_epoch": flops * len(bank),
        "teacher_weights_bytes": weights,
        "bank_bytes_read_per_image": 2 * bank.dim,
        "bank_bytes_held_as_centroids": 2 * bank.dim * classes,
        "bank_bytes_held_as_samples": 2 * bank.dim * len(bank),
    }


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < INTEGER_LIMIT


def _teacher_line(teacher: dict[str, Any] | None) -> str:
    if not teacher:
        return "not recorded"
    text = str(teacher.get("name", "unnamed"))
    if "pool" in teacher:
        text += f" ({teacher['pool']})"
    if _is_count(teacher.get("parameters")):
        text += f", {teacher['parameters']:,} parameters"
    if "weights_sha256" in teacher:
        text += f", weights {str(teacher['weights_sha256'])[:12]}"
    return text


def _head_line(head: dict[str, Any] | None) -> str:
    if head is None:
        return "its class head is not stored"
    names = head["class_names"]
    named = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
    return f"with its class head of {head['classes']} classes{named}"


def _data_line(dataset: str | None, fingerprint: str | None) -> str:
    return f"{dataset or 'not named'}, fingerprint {fingerprint or 'not recorded'}"


def _class_lines(classes: list[dict[str, Any]], unlabelled: int) -> list[tuple[str, str]]:
    lines = []
    counts = sorted(entry["rows"] for entry in classes)
    if not classes:
        lines.append(("classes", "none"))
    elif counts[0] == counts[-1]:
        lines.append(("classes", f"{len(classes)} of {counts[0]:,} rows each"))
    elif len(classes) > _CLASSES_LISTED:
        middle = counts[len(counts) // 2]
        spread = f"{counts[0]:,} to {counts[-1]:,} rows, median {middle:,}"
        lines.append(("classes", f"{len(classes)} of {spread}"))
    else:
        lines.append(("classes", f"{len(classes)}"))
        width = max(len(entry["name"]) for entry in classes)
        lines += [("", f"  {entry['name']:<{width}}  {entry['rows']:>9,}") for entry in classes]
    if unlabelled:
        lines.append(("", f"and {unlabelled:,} rows without a label"))
    return lines


def _saving_lines(saves: dict[str, int] | None, rows: int) -> list[tuple[str, str]]:
    if saves is None:
        return [("saves", "unknown: the cost of the teacher was not recorded")]
    held = human_bytes(saves["bank_bytes_held_as_samples"]) + " with every sample's own row"
    if saves["bank_bytes_held_as_centroids"]:
        held = f"{human_bytes(saves['bank_bytes_held_as_centroids'])} of centroids, or {held}"
    return [
        ("saves", "against running the teacher while the student trains:"),
        (
            "",
            f"  compute  {_flops(saves['teacher_flops_per_image'])} an image, "
            f"{_flops(saves['teacher_flops_per_epoch'])} an epoch of {rows:,} images; now none",
        ),
        (
            "",
            f"  memory   {human_bytes(saves['teacher_weights_bytes'])} of weights; now {held}",
        ),
        (
            "",
            f"  reading  {human_bytes(saves['bank_bytes_read_per_image'])} an image "
            "with every sample's own row"
            f"{'; nothing with centroids' if saves['bank_bytes_held_as_centroids'] else ''}",
        ),
    ]


def _neighbours(bank: EmbeddingBank) -> dict[str, Any] | None:
    """Settings of the stored neighbours and the mass they leave out, or what is wrong with them."""
    if not neighbours.exist(bank.path):
        return None
    try:
        return neighbour_facts(bank.neighbours())
    except BankError as error:
        return {"error": str(error)}


def neighbour_facts(found: neighbours.Neighbours) -> dict[str, Any]:
    """Settings of stored neighbours, their size, and the mass of the softmax they leave out."""
    return {
        "k": found.k,
        "temperature": found.temperature,
        "exact": found.exact,
        "bytes": found.nbytes,
        "left_out_mean": found.left_out_mean,
        "left_out_max": found.left_out_max,
    }


def _neighbour_lines(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    if found is None:
        return []
    if "error" in found:
        return [("nearest", found["error"])]
    means = " and mean rows" if found["exact"] else ""
    return [
        (
            "nearest",
            f"{found['k']} rows of each{means} at temperature {found['temperature']}, "
            f"{human_bytes(found['bytes'])}",
        ),
        (
            "",
            f"  they leave out {percent(found['left_out_mean'])} of the softmax on average, "
            f"at most {percent(found['left_out_max'])}",
        ),
    ]
