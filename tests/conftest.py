from __future__ import annotations

import os

# OpenMP reads this when torch is loaded: waiting threads sleep. On a busy machine, spinning threads
# would take the time in which others could run.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from tests import installed

installed.prefer()  # before ckd is imported

import pytest
import torch

import ckd
from ckd.backends import cpu, cuda, triton
from ckd.ops import _bypass
from ckd.train import loop
from tests import margins

OWN_MARGINS = pytest.StashKey[bool]()

if triton.missing() is None and triton.interpreted():
    from tests import triton_interpreter

    triton_interpreter.repair()


if "CKD_TEST_TIERS" in os.environ:  # as on a processor that runs only these tiers
    cpu.TIERS = {tier: cpu.TIERS[tier] for tier in os.environ["CKD_TEST_TIERS"].split(",")}
    cpu._tier = next(iter(cpu.TIERS))

if "CKD_TEST_EMULATED" in os.environ:
    from tests import cuda_emulation

    cuda_emulation.use(Path(os.environ["CKD_TEST_EMULATED"]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption(
        "--margins", action="store_true", help="show the largest error / limit of each quantity"
    )
    parser.addoption(
        "--no-bypass", action="store_true", help="call every op through torch's dispatcher"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--margins") and margins.FILE not in os.environ:
        folder = tempfile.mkdtemp(prefix="ckd-margins-")
        os.environ[margins.FILE] = str(Path(folder, "margins.jsonl"))
        config.stash[OWN_MARGINS] = True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests marked slow, unless --slow is given."""
    if seed := os.environ.get("CKD_TEST_ORDER"):  # random order of files, and of tests in a file
        shuffle(items, random.Random(seed))
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


def shuffle(items: list[pytest.Item], generator: random.Random) -> None:
    """Shuffle files, and tests within a file: these stay together, for module-scoped fixtures."""
    files = list({item.path for item in items})
    generator.shuffle(items)
    files.sort()
    generator.shuffle(files)
    items.sort(key=lambda item: files.index(item.path))


def pytest_sessionfinish() -> None:
    margins.save()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if OWN_MARGINS in config.stash:
        terminalreporter.section("largest error / limit")
        for line in margins.table(Path(os.environ[margins.FILE])):
            terminalreporter.write_line(line)


@pytest.fixture(params=ckd.backends.available())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend of this installation: all must give the same results. New tensors are on its
    device by default."""
    name = request.param
    device = {"triton": triton.gpu.type, "cuda": cuda.gpu.type}.get(name, "cpu")
    if device == "cpu":
        yield name
        return
    torch.set_default_device("cuda")
    yield name
    torch.set_default_device("cpu")


@pytest.fixture(autouse=True, scope="session")
def _bypass_as_asked(request: pytest.FixtureRequest) -> Iterator[None]:
    with _bypass.disabled() if request.config.getoption("--no-bypass") else nullcontext():
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    """Restore the cache limit after each test. Setting it also invalidates all cached plans, which
    may depend on backends that the test replaced."""
    limit = ckd.backends.cache_limit()
    yield
    ckd.backends.set_cache_limit(limit)


@pytest.fixture
def quick_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Training runs take one thread, which is faster for tiny models on a busy machine, and draw no
    figures."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(loop, "draw_curves", lambda *args: None)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress is shown, at once, as on a terminal."""
    monkeypatch.setattr("ckd._console.DELAY_S", 0.0)
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True)
