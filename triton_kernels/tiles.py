"""Tile sizes of the kernels, and the number of programs that share a sum.

Functions return the tiles that may be launched, best guess first: tuning.py takes the first or
measures all. Registers (65,536 of 32 bits for a thread block) and shared memory bound their size.
docs/results/kernels-triton.md lists the compiled kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

# Families of devices with tiles of their own, by the shared memory of a thread block: 227 KiB (H100
# and later), 163 KiB (A100), 64 KiB (AMD's CDNA, and NVIDIA's for desktops, which have 99).
HOPPER, AMPERE, SMALL = "hopper", "ampere", "small"
TINY = "tiny"  # for simulated devices, where small problems need several tiles
# Products: of float16 or bfloat16 operands; of float32 ones in tensor cores; or outside them.
HALF, TF32, IEEE = "half", "tf32", "ieee"


@dataclass(frozen=True)
class Tiles:
    """Tiles of the kernels over students and bank: powers of two from 16 up."""

    batch: int
    bank: int
    width: int  # columns of the sums over rows that one program keeps in registers
    inner: int  # columns of a step of the logits' sums, if not the whole width
    warps: int = 8
    stages: int = 2

    def launch(self, width: int) -> dict[str, int | bool]:
        """The arguments of a launch, for rows of `width`."""
        return {
            "BLOCK_BATCH": self.batch,
            "BLOCK_BANK": self.bank,
            "BLOCK_WIDTH": self.width,
            "WHOLE": self.width >= width,
            "BLOCK_INNER": self.inner,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


@dataclass(frozen=True)
class ProductTiles:
    """Tiles of a matrix product."""

    rows: int
    columns: int
    sums: int
    warps: int = 8
    stages: int = 2


def power_of_two(n: int, least: int = 16) -> int:
    return max(least, 1 << max(0, n - 1).bit_length())


def waves(rows: int, block: int, processors: int) -> int:
    """Waves of programs of one block each, if every processor runs one program at a time."""
    return -(-rows // (block * processors))


def forward_tiles(
    width: int, arithmetic: str, family: str, batch: int, rows: int, processors: int
) -> tuple[Tiles, ...]:
    """Registers hold the sums of the values, batch x width in float32."""
    whole = power_of_two(width)
    if family == TINY:
        return (Tiles(32, 32, min(64, whole), min(32, whole)),)
    if arithmetic == IEEE:
        return (Tiles(32, 32, min(64, whole), 32),)
    if arithmetic == TF32:
        part = Tiles(64, 64, min(128, whole), 32)
        return (Tiles(64, 32, 256, 32), part) if family == HOPPER and whole == 256 else (part,)
    if family == SMALL:
        return (Tiles(64, 64, min(128, whole), 64),)
    if family == AMPERE:
        if whole <= 128:
            return (Tiles(128, 64, whole, 64), Tiles(64, 64, whole, 64, warps=4, stages=3))
        return (Tiles(64, 64, 256, 64),)
    # Where tiles of 128 x 64 are fewer than the processors, smaller ones occupy more of them.
    few = -(-batch // 128) * -(-rows // 64) < processors
    if whole <= 128:
        return (Tiles(64, 64 if few else 128, whole, 64, warps=4, stages=3),)
    if whole == 256:
        return (Tiles(64, 64, 256, 64, warps=4) if few else Tiles(128, 64, 256, 64),)
    # The width does not fit: each program of axis 2 computes the logits again.
    return (Tiles(128, 64, 256, 64, stages=3),)


def backward_tiles(
    width: int, arithmetic: str, family: str, rows: int, processors: int
) -> tuple[Tiles, ...]:
    """Registers hold dN, bank x width in float32. On Hopper 64 bank rows take 4 warps: with 8, both
    warpgroups would compute the same logits."""
    whole = power_of_two(width)
    if arithmetic == HALF and family == SMALL:
        return (Tiles(32, 64, min(128, whole), 64, warps=4),)
    if arithmetic == HALF and family == AMPERE and whole <= 256:
        return (Tiles(64, 64, whole, 64),)
    if arithmetic == HALF and family == HOPPER:
        if whole > 256:
            return (Tiles(64, 128, 256, 64, stages=3),)
        if whole == 128:
            return (Tiles(128, 64, whole, 64, warps=4),)
        if whole < 128:
            return (Tiles(128, 64, whole, 64, warps=4, stages=3),)
        # A program of 64 rows takes 0.7 of the time of one of 128.
        if 0.7 * waves(rows, 64, processors) < waves(rows, 128, processors):
            return (Tiles(64, 64, 256, 64, warps=4, stages=3),)
        return (Tiles(64, 128, 256, 64, stages=3),)
    return forward_tiles(width, arithmetic, family, 1, rows, processors)


def project_tiles(
    width: int, arithmetic: str, family: str, aligned: bool, rows: int, processors: int
) -> tuple[ProductTiles, ...]:
    """Bank rows, columns of the projection (the whole width if it fits: the kernel then normalises
    too), elements of D in a step. Rows that are not aligned cost registers for addresses."""
    whole = power_of_two(width)
    if family == TINY:
        return (ProductTiles(32, min(32, whole), 16),)
    if arithmetic != HALF:
        return (ProductTiles(32, 64, 32, warps=4),)
    if whole > 256:
        return (ProductTiles(128, 128, 64 if aligned else 32),)
    if not aligned:
        return (ProductTiles(64, whole, 32),)
    if family != HOPPER:
        return (ProductTiles(64, whole, 64),)
    # The relative time of a program, measured on an H100.
    choices = {
        ProductTiles(128, whole, 64, stages=4): 2.0,
        ProductTiles(64, whole, 64, stages=4): 1.2,
        ProductTiles(16, whole, 128, warps=4, stages=3): 1.0,
    }
    return (min(choices, key=lambda tiles: choices[tiles] * waves(rows, tiles.rows, processors)),)


def product_tiles(arithmetic: str, family: str, aligned: bool) -> tuple[ProductTiles, ...]:
    if family == TINY:
        return (ProductTiles(32, 32, 32),)
    if arithmetic != HALF:
        return (ProductTiles(64, 64, 16),)
    if not aligned:
        return (ProductTiles(64, 128, 32),)
    return (ProductTiles(128, 128, 64), ProductTiles(64, 128, 64))


def weight_gradient_tiles(
    width: int, family: str, sums: int, aligned: bool
) -> tuple[ProductTiles, ...]:
    """Columns of dZ, columns of the bank, and `sums`: the rows of dZ that share a scale."""
    if family == TINY:
        return (ProductTiles(32, 32, sums),)
    if not aligned:
        return (ProductTiles(64, 64, sums),)
    if family == HOPPER and width > 64:
        return (ProductTiles(128, 128, sums, stages=3),)
    return (ProductTiles(64, 128, sums, warps=4, stages=3 if family == HOPPER else 2),)


def similarity_tiles(arithmetic: str, family: str) -> tuple[Tiles, ...]:
    """`width` is not used."""
    if family == TINY:
        return (Tiles(32, 32, 16, 16),)
    if arithmetic != HALF:
        return (Tiles(32, 32, 32, 32, warps=4),)
    return (Tiles(128, 128 if family == HOPPER else 64, 64, 64),)


MOST_SPLITS = 64


def splits(rows: int, block: int, others: int, processors: int, most: int = MOST_SPLITS) -> int:
    """The number of parts of `rows`, of one block at least, that leaves the fewest processors idle
    in the last wave. Each part takes `others` programs, and all of them at most two waves."""
    best, busiest = 1, 0.0
    for parts in range(1, min(most, rows // block, -(-2 * processors // others)) + 1):
        programs = parts * others
        busy = programs / (-(-programs // processors) * processors)
        if busy > busiest + 0.02:  # more parts are more sums to combine
            best, busiest = parts, busy
    return best
