"""Every CUDA kernel compiles for each target without spilling registers. No GPU is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import cuda_compile as tools
from tests.quick import slow

KERNELS = sorted((tools.ROOT / "csrc" / "cuda").glob("*.cu"))
# Calls every function of csrc/cuda/device.cuh.
DEMONSTRATION = tools.ROOT / "tests" / "emulation" / "planted_bugs.cu"

needs_nvcc = pytest.mark.skipif(tools.nvcc() is None, reason="no nvcc")
ARCHITECTURES = tools.architectures() if tools.nvcc() else ["sm_80"]


def spilling(units: list[tools.Unit]) -> list[str]:
    return [f"{unit.kernel} spills {unit.spilled} bytes" for unit in units if unit.spilled > 0]


@needs_nvcc
@pytest.mark.skipif(not KERNELS, reason="csrc/cuda has no kernels")
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_without_spills(arch: str) -> None:
    units = tools.compile_units(KERNELS, arch)
    assert units, "no kernel was found in what nvcc printed"
    assert not spilling(units), "\n".join(spilling(units))


@needs_nvcc
@pytest.mark.parametrize("arch", [ARCHITECTURES[0], *slow(ARCHITECTURES[1:])])
def test_the_whole_device_layer_compiles(arch: str) -> None:
    units = tools.compile_units([DEMONSTRATION], arch, ["-DBUG=0"])
    assert len(units) == 2, units
    assert all("row_sums" in unit.kernel and unit.registers > 0 for unit in units), units
    assert not spilling(units), "\n".join(spilling(units))


@needs_nvcc
def test_spills_and_shared_memory_are_seen(tmp_path: Path) -> None:
    """Eighty live sums do not fit in 64 registers, a thread's share with 1024 threads."""
    source = tmp_path / "spills.cu"
    source.write_text("""
        template <class T>
        __global__ void __launch_bounds__(1024) spills(T* numbers, int count) {
          __shared__ T scale[64];
          T sums[80];
          scale[threadIdx.x % 64] = numbers[threadIdx.x];
          __syncthreads();
          #pragma unroll
          for (int i = 0; i < 80; ++i) sums[i] = numbers[i * 1024 + threadIdx.x];
          for (int k = 0; k < count; ++k) {
            #pragma unroll
            for (int i = 0; i < 80; ++i) sums[i] = sums[i] * sums[(i + 1) % 80] + scale[k % 64];
          }
          #pragma unroll
          for (int i = 0; i < 80; ++i) numbers[i * 1024 + threadIdx.x] = sums[i];
        }
        template __global__ void spills<float>(float*, int);
    """)
    (unit,) = tools.compile_units([source], "sm_80")
    assert "spills" in unit.kernel
    assert unit.spilled > 0
    assert 0 < unit.registers <= 64
    assert unit.shared == 256
