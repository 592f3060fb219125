"""Stage flips: bytes of a file change, vanish or come from elsewhere, as on a bad disk."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from tests.campaign.child import Result
from tests.campaign.targets import targets_in


def stage(root: Path, seed: int) -> Callable[[int], Result]:
    targets = targets_in(root)

    def case(number: int) -> Result:
        chance = random.Random(f"flips {seed} {number}")
        target = targets.all[number % len(targets.all)]
        file = targets.copy(target.origin) / target.file
        data = file.read_bytes()
        how = chance.choice(list(DAMAGES))
        if chance.random() < 0.1:
            other = chance.choice([t for t in targets.all if t.file != target.file])
            how, damaged = f"swapped with {other.file}", (other.origin / other.file).read_bytes()
        else:
            damaged = DAMAGES[how](data, chance)
        if damaged == data:
            return Result("no change")
        file.write_bytes(damaged)
        result = target.judge(targets.run(target.read))
        if result.fault:
            about = f"{target.origin.name}/{target.file}, {how}"
            return Result(result.kind, f"{about}: {result.fault}")
        return result

    return case


def _at(data: bytes, chance: random.Random) -> int:
    return chance.randrange(len(data))


def flip(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 9))):
        changed[_at(data, chance)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, chance: random.Random) -> bytes:
    at, few = _at(data, chance), chance.randbytes(chance.randint(1, 9))
    return data[:at] + few + data[at + len(few) :]


def digit(data: bytes, chance: random.Random) -> bytes:
    """Another digit or letter in place of one: JSON stays JSON."""
    places = [i for i, c in enumerate(data) if chr(c).isalnum() and c < 128]
    at = chance.choice(places)
    alphabet = b"0123456789" if chr(data[at]).isdigit() else b"abcdefghijklmnopqrstuvwxyz"
    return data[:at] + bytes([chance.choice(alphabet)]) + data[at + 1 :]


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: _at(data, chance)]


def remove(data: bytes, chance: random.Random) -> bytes:
    at = _at(data, chance)
    return data[:at] + data[at + chance.randint(1, 64) :]


def insert(data: bytes, chance: random.Random) -> bytes:
    at = _at(data, chance)
    return data[:at] + chance.randbytes(chance.randint(1, 9)) + data[at:]


def append(data: bytes, chance: random.Random) -> bytes:
    return data + chance.choice((b"\0", b"\n", b" ", b"{}", chance.randbytes(9), data))


def zero(data: bytes, chance: random.Random) -> bytes:
    """A block of zeros: pages that were never written."""
    size = chance.choice((8, 64, 512, 4096))
    at = _at(data, chance) // size * size
    return data[:at] + bytes(len(data[at : at + size])) + data[at + size :]


def repeat(data: bytes, chance: random.Random) -> bytes:
    """A line twice, or gone."""
    lines = data.splitlines(keepends=True)
    at = chance.randrange(len(lines))
    return b"".join(lines[:at] + lines[at : at + 1] * chance.choice((0, 2)) + lines[at + 1 :])


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    f.__name__: f for f in (flip, overwrite, digit, cut, remove, insert, append, zero, repeat)
}
