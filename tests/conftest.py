from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import ckd
from ckd.train import loop


@pytest.fixture(params=ckd.backends.available())
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend of this installation; they may not differ in results."""
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def quick_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, which is faster for tiny models on a busy machine, and no figures."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(loop, "draw_curves", lambda *args: None)
    yield
    torch.set_num_threads(threads)
