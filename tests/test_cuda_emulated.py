"""The ops' tests on the cuda backend, its kernels emulated on the CPU (docs/emulation.md).

Each file has a process of its own, since backends are listed when tests are collected.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import cuda_emulation

TESTS = Path(__file__).parent
# The banks of a million and of 40,000 rows take minutes.
FILES = {
    "test_contrastive_ce.py": "cuda and not million",
    "test_contrastive_ce_autograd.py": "cuda",
    "test_similarity.py": "cuda and not 40000",
    "test_gpu_backends.py": "cuda",
}

pytestmark = [
    pytest.mark.skipif(cuda_emulation.missing() is not None, reason=str(cuda_emulation.missing())),
    pytest.mark.skipif("CKD_TEST_EMULATED" in os.environ, reason="is emulating already"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the GPU"),
]


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cuda_emulation.build_module(tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize("file", FILES)
def test_on_emulated_kernels(file: str, module: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(TESTS / file), "-k", FILES[file], "-W", "ignore"],
        env={**os.environ, "CKD_TEST_EMULATED": str(module), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
