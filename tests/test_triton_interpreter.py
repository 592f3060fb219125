"""The ops' tests on the triton backend, in Triton's interpreter on CPU tensors.

Kernels are interpreted or compiled according to an environment variable that is read when they are
imported, so the tests run in other processes. CONTRIBUTING.md says what they cannot show.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

from tests.other_process import Runs

# Longest first. Left out: the banks of 300,000 and 40,000 rows, which take minutes.
FILES = {
    "test_contrastive_ce.py": "triton and not 300_000",
    "test_gpu_backends.py": "triton",
    "test_weighted_targets.py": "triton",
    "test_contrastive_ce_autograd.py": "triton",
    "test_similarity.py": "triton and not 40000",
}

# Without --slow: every form of a shift is in test_gpu_backends.py.
QUICK = FILES | {
    "test_weighted_targets.py": "triton and "
    "(together or norm_zero or may_hold_nan or range or invalid or no_students or mean)"
}

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="is interpreting already"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run on the GPU"),
]


@pytest.fixture(scope="module")
def runs(pytestconfig: pytest.Config) -> Iterator[Runs]:
    slow = pytestconfig.getoption("--slow")
    runs = Runs(FILES if slow else QUICK, {"TRITON_INTERPRET": "1"}, slow=slow)
    yield runs
    runs.stop()


@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file: str, runs: Runs) -> None:
    runs.check(file)
