"""The ops' tests on the triton backend, in Triton's interpreter on CPU tensors.

Whether kernels are interpreted is settled when they are imported, so each file has a process of its
own. CONTRIBUTING.md says what this shows and what not.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
# The banks of a million and of 40,000 rows take minutes.
FILES = {
    "test_contrastive_ce.py": "triton and not million",
    "test_contrastive_ce_autograd.py": "triton",
    "test_similarity.py": "triton and not 40000",
    "test_gpu_backends.py": "triton",
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="is interpreting already")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the GPU")
@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(TESTS / file), "-k", FILES[file], "-W", "ignore"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
