"""Every Triton kernel compiles for the GPUs that are not here: no spills, matrix units used."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests import triton_compile as tools

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="kernels are interpreted"),
    pytest.mark.skipif(sys.platform != "linux", reason="triton compiles on Linux"),
]

# What a compiler may keep in memory for want of registers: bytes a thread (NVIDIA), or registers.
MAX_SPILLED = {"sm_80": 48, "sm_86": 48, "sm_90": 48, "gfx942": 0}
MATRIX = {"sm_80": "mma.sync", "sm_86": "mma.sync", "sm_90": "wgmma.mma_async", "gfx942": "mfma"}


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


def check_launches(launches: dict[tools.Launch, str], target: str) -> None:
    from tests import triton_compile as tools

    assert {launch.name for launch in launches} == {
        "bank_gradient", "bank_norm_backward", "combine", "forward", "join", "product", "project",
        "similarity", "student_factors", "student_gradient", "targets", "unit_rows",
    }  # fmt: skip
    bad = []
    for launch, problem in launches.items():
        used = tools.resources(launch, target)
        if used.spilled > MAX_SPILLED[target]:
            bad.append(f"{launch.name} {launch.label} ({problem}) spills {used.spilled}")
        if used.shared > tools.SHARED[target]:
            bad.append(f"{launch.name} {launch.label} ({problem}) takes {used.shared} shared")
        if launch.uses_matrix_units and MATRIX[target] not in used.matrix:
            bad.append(f"{launch.name} {launch.label} ({problem}) has no {MATRIX[target]}")
    assert not bad, "\n".join(bad)
