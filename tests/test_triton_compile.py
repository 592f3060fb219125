"""Every Triton kernel compiles for each target, fits its registers and shared memory, and uses its
matrix units. No GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.triton_compile import Launch

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="kernels are interpreted"),
    pytest.mark.skipif(sys.platform != "linux", reason="triton compiles on Linux"),
]

# The most that a compiler may spill: bytes of a thread (NVIDIA) or registers (AMD). Spills must lie
# outside of loops, where sums in 128 registers are stored and loaded once; check_launches allows
# next to none within.
MAX_SPILLED = {"sm_80": 704, "sm_86": 48, "sm_90": 512, "gfx942": 0}
MATRIX = {"sm_80": "mma.sync", "sm_86": "mma.sync", "sm_90": "wgmma.mma_async", "gfx942": "mfma"}


def instructions(launch: Launch, target: str) -> set[str]:
    """The matrix instructions for half precision that a launch may use: wgmma needs 64 rows."""
    return {MATRIX[target], "mma.sync"} if launch.rows < 64 else {MATRIX[target]}


def most_products(launch: Launch) -> float:
    """The most products that a loop may compute, relative to those it needs. If the sums of 64 rows
    take two warpgroups, each computes all logits; so would two programs with half of the columns
    each."""
    halves = launch.name == "forward" and launch.rows == 64 and launch.warps == 8
    return 1.5 if halves else 1.0


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted(MATRIX))
def test_kernels_fit_the_target(target: str) -> None:
    from tests import triton_compile as tools

    check_launches(tools.every_launch(target), target)


def test_one_launch_of_every_kernel_fits_the_target() -> None:
    from tests import triton_compile as tools

    launches = tools.every_launch("sm_80")
    one = {launch.name: launch for launch in reversed(launches)}
    check_launches({launch: launches[launch] for launch in one.values()}, "sm_80")


def test_a_step_of_a_small_bank_is_ten_launches() -> None:
    """The time of such a step is mostly launch overhead."""
    from tests import triton_compile as tools

    launches, of_torch = tools.step(256, 1000, 1024, 256)
    assert [launch.name for launch in launches] == [
        "unit_rows", "project", "forward", "combine",
        "student_gradient", "student_factors", "bank_gradient", "weight_gradient",
    ]  # fmt: skip
    assert of_torch == ["_to_copy", "sum"]  # converts the weight, adds partial sums of d_weight


def test_weighted_targets_add_two_launches() -> None:
    """Against a small bank; against a large one one, and torch sorts the entries."""
    from tests import triton_compile as tools

    launches, of_torch = tools.step(256, 1000, 1024, 256, 32)
    assert [launch.name for launch in launches] == [
        "unit_rows", "project", "forward", "add_shift", "combine",
        "student_gradient", "student_factors", "shift_matrix", "bank_gradient", "weight_gradient",
    ]  # fmt: skip
    assert of_torch == ["_to_copy", "zero_", "sum"]
    plain = [launch.name for launch in tools.step(256, 50_000, 1024, 256)[0]]
    launches, of_torch = tools.step(256, 50_000, 1024, 256, 32)
    more = Counter(launch.name for launch in launches) - Counter(plain)
    assert more == Counter(["add_shift"])
    assert "sort" in of_torch


@pytest.mark.parametrize(
    ("batch", "others", "bank_rows", "targets"),
    [
        (256, (255, 100, 40, 1), 1000, 0),
        (4096, (4095, 1500), 100_000, 0),
        (256, (255, 100, 40, 1), 1000, 33),
        (1024, (1023, 700), 50_000, 33),
    ],
)
def test_a_batch_of_another_size_compiles_nothing(
    batch: int, others: tuple[int, ...], bank_rows: int, targets: int
) -> None:
    from tests import triton_compile as tools

    compiled = set(tools.step(batch, bank_rows, 1024, 256, targets)[0])
    for other in others:
        new = set(tools.step(other, bank_rows, 1024, 256, targets)[0]) - compiled
        assert not new, (other, [(launch.name, launch.label) for launch in new])


def check_launches(launches: dict[Launch, str], target: str) -> None:
    from tests import triton_compile as tools

    assert {launch.name for launch in launches} == {
        "add_shift", "bank_gradient", "bank_norm_backward", "combine", "forward", "half_tiles",
        "keep_targets", "product", "project", "shift_matrix", "similarity",
        "split", "student_factors", "student_gradient", "unit_rows", "weight_gradient",
    }  # fmt: skip
    bad = []
    for launch, problem in launches.items():
        used = tools.resources(launch, target)
        if used.spilled > MAX_SPILLED[target]:
            bad.append(f"{launch.name} {launch.label} ({problem}) spills {used.spilled}")
        if used.shared > tools.SHARED[target]:
            bad.append(f"{launch.name} {launch.label} ({problem}) takes {used.shared} shared")
        if used.approximate_roots:
            bad.append(f"{launch.name} {launch.label} ({problem}) approximates square roots")
        if used.serialised:
            bad.append(f"{launch.name} {launch.label} ({problem}) waits after every wgmma")
        for loop in used.loops:
            if 100 * loop.spills > loop.instructions:
                bad.append(f"{launch.name} {launch.label} ({problem}) spills in a loop: {loop}")
        useful = (
            launch.useful_products if target == "sm_90" else None
        )  # elsewhere loops are unrolled
        if used.loops and useful is not None:
            products = min(loop.products for loop in used.loops)
            if products > most_products(launch) * useful:
                name = f"{launch.name} {launch.label} ({problem})"
                bad.append(
                    f"{name} multiplies {products} times a turn, of which {useful} are of use"
                )
        if launch.uses_matrix_units and not used.matrix & instructions(launch, target):
            bad.append(f"{launch.name} {launch.label} ({problem}) has no {MATRIX[target]}")
    assert not bad, "\n".join(bad)
