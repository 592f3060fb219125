"""Every wrapper of csrc/cuda/device.cuh against golden vectors, in the emulation and on a GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from tests import cuda_compile, cuda_emulation

FOLDER = cuda_emulation.ROOT / "tests" / "emulation"
PROGRAM, GOLDEN = FOLDER / "wrappers.cu", FOLDER / "wrappers.golden"


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if cuda_emulation.missing() is not None:
        pytest.skip(str(cuda_emulation.missing()))
    return cuda_emulation.build([PROGRAM], tmp_path_factory.mktemp("wrappers"), ["plain"])["plain"]


def test_the_emulation_gives_the_golden_vectors(emulated: Path) -> None:
    outcome = cuda_emulation.run(emulated)
    assert outcome.finding == "none", outcome.text
    assert outcome.text == GOLDEN.read_text()


def test_rounded_sums_are_near_the_golden_ones(emulated: Path) -> None:
    """The comparison tolerates other roundings of matrix units, and counts the equal values."""
    outcome = cuda_emulation.run(emulated, "check", GOLDEN, sums="rounded")
    assert outcome.finding == "none", outcome.text
    same, _, of = outcome.text.split("; ")[1].split()[:3]
    assert 0 < int(same) < int(of), outcome.text


def test_a_vector_that_differs_is_an_error(emulated: Path, tmp_path: Path) -> None:
    name = "= shuffle_xor\n"
    before, _, after = GOLDEN.read_text().partition(name)
    damaged = tmp_path / "damaged.golden"
    damaged.write_text(before + name + after.replace("0", "1", 1))
    outcome = cuda_emulation.run(emulated, "check", damaged)
    assert outcome.finding == "values"
    assert "WRONG: = shuffle_xor: 1 of 160 words, first [0]" in outcome.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.skipif(cuda_compile.nvcc() is None, reason="no nvcc")
def test_the_gpu_gives_the_golden_vectors(tmp_path: Path) -> None:
    number = "{}{}".format(*torch.cuda.get_device_capability())
    program = tmp_path / "wrappers"
    flags = ["-std=c++17", "-O3", f"-I{cuda_emulation.ROOT / 'csrc'}"]
    flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
    command = [str(cuda_compile.nvcc()), *flags, str(PROGRAM), "-o", str(program)]
    subprocess.run(command, check=True)
    done = subprocess.run([program, "check", GOLDEN], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
