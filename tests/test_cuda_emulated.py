"""The ops' tests on the cuda backend, with kernels emulated on the CPU (docs/emulation.md).

Tests are parametrised with the available backends when they are collected, so they run in other
processes, where the emulated backend is available.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests import cuda_emulation
from tests.other_process import Runs

# Longest first. Left out: the banks of 300,000 and 40,000 rows, which take minutes, and weighted
# targets where emulated kernels do nothing new.
FILES = {
    "test_contrastive_ce.py": "cuda and not 300_000",
    "test_contrastive_ce_autograd.py": "cuda",
    "test_gpu_backends.py": "cuda",
    "test_similarity.py": "cuda and not 40000",
    "test_weighted_targets.py": "cuda and not several_chunks and not compiled",
}

pytestmark = [
    pytest.mark.skipif(cuda_emulation.missing() is not None, reason=str(cuda_emulation.missing())),
    pytest.mark.skipif("CKD_TEST_EMULATED" in os.environ, reason="is emulating already"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the GPU"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Runs]:
    module = cuda_emulation.build_module(tmp_path_factory.mktemp("emulated"))
    slow = pytestconfig.getoption("--slow")
    runs = Runs(FILES, {"CKD_TEST_EMULATED": str(module)}, slow=slow)
    yield runs
    runs.stop()


@pytest.mark.parametrize("file", FILES)
def test_on_emulated_kernels(file: str, runs: Runs) -> None:
    runs.check(file)
