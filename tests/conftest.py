from __future__ import annotations

import pytest
import torch

import ckd


@pytest.fixture(params=ckd.backends.available())
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend of this installation; they may not differ in results."""
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
