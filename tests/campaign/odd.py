"""Odd files in the place of every file and folder: FIFOs, links, devices, folders."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckd import _lock
from tests.campaign.calls import no_flock
from tests.campaign.child import Result
from tests.campaign.targets import Target, Targets

KINDS = ("fifo", "folder", "full folder", "dangling", "link to fifo", "link to zero", "link")
KINDS += ("loop", "socket", "sparse", "empty", *(() if os.geteuid() == 0 else ("mode 000",)))
SPARSE = 512 << 20
# Names that a writer makes itself, beside the files that are there.
SITES = {
    "part": (
        *(".tmp-manifest.json", ".tmp-shard-00002.safetensors", "shard-00002.safetensors"),
        "neighbours",
    ),
    "half": (
        *("checkpoint", "checkpoint/step-00000009", "checkpoint/.tmp-step-00000012"),
        *("checkpoint/step-00000012", "checkpoint/step-abc", "student.safetensors", "result.json"),
        *(".tmp-student.safetensors", ".tmp-result.json", ".tmp-config.json"),
    ),
}
LOCKS = (_lock.LOCK_FILE, f"{_lock.LOCK_FILE}.stale")


def case(targets: Targets, chance: random.Random) -> Result:
    """An odd file at one place; a link may lead to what was there."""
    target = chance.choice(targets.all)
    sites = SITES.get(target.origin.name, ())
    if sites and chance.random() < 0.5:
        target = target._replace(file=chance.choice(sites + LOCKS))
    kind = chance.choice(KINDS)
    path = targets.copy(target.origin) / target.file
    outside = targets.sandbox / "outside"
    put(kind, path, outside)
    before = _content(outside)
    result = _judged(targets, target)
    if _content(outside) != before:
        result = Result("written outside", "the file that the link leads to has changed")
    if result.fault:
        about = f"{target.origin.name}/{target.file} is a {kind}"
        return Result(result.kind, f"{about}: {result.fault}")
    return result


def _judged(targets: Targets, target: Target) -> Result:
    read: Callable[[], Any] = target.read
    if target.file in LOCKS:

        def read() -> Any:
            fcntl.flock = no_flock
            _lock.LOCK_PATIENCE_S = 0.0
            return target.read()

    ended = targets.run(read)
    if isinstance(ended.value, tuple) and isinstance(names := ended.value[-1], dict):
        site = target.file  # a foreign file may stay there, but not under a temporary name
        mine = {k: v for k, v in names.items() if not k.startswith(site) or ".tmp-" in k}
        theirs = {k: v for k, v in target.expected[-1].items() if k.startswith(site)}
        ended = ended._replace(value=(*ended.value[:-1], theirs | mine))
    return target.judge(ended)


def put(kind: str, path: Path, outside: Path) -> None:
    """Move what is at `path` to `outside`, and put an odd file there."""
    if path.exists():
        path.rename(outside)
    elif kind == "link":
        outside.write_bytes(b"outside")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "full folder":
        path.mkdir()
        (path / "file").write_bytes(b"full")
    elif kind == "dangling":
        path.symlink_to("nowhere/at/all")
    elif kind == "link to fifo":
        os.mkfifo(outside.with_name("fifo"))
        path.symlink_to(outside.with_name("fifo"))
    elif kind == "link to zero":
        path.symlink_to("/dev/zero")
    elif kind == "link":
        path.symlink_to(outside)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "socket":
        place = os.open(path.parent, os.O_RDONLY)  # a socket's path is short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{place}/{path.name}")
        os.close(place)
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(SPARSE)
    elif kind == "empty":
        path.touch()
    else:
        if outside.is_dir():
            shutil.copytree(outside, path)
        else:
            path.write_bytes(outside.read_bytes() if outside.exists() else b"")
        path.chmod(0)


def _content(path: Path) -> Any:
    if path.is_dir():
        return {str(p.relative_to(path)): _content(p) for p in path.rglob("*")}
    return path.read_bytes() if path.exists() else None
