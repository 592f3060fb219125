"""A short campaign finds no fault; and with faults planted, its stages find them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ckd
from ckd.bank import shards, writer
from tests.campaign.__main__ import Campaign
from tests.campaign.child import in_child

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")

CASES = {"kills": 3, "faults": 15, "flips": 30, "structure": 30, "problems": 10}
MORE = {"kills": 40, "faults": 150, "flips": 200, "structure": 200, "problems": 150}


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    threads = torch.get_num_threads()
    yield Campaign(tmp_path_factory.mktemp("campaign").resolve(), 0, list(CASES))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("stage", CASES)
def test_a_short_run_finds_no_fault(campaign: Campaign, stage: str) -> None:
    assert not faults(campaign, stage, range(CASES[stage]))


@pytest.mark.slow
@pytest.mark.parametrize("stage", MORE)
def test_a_longer_run_finds_no_fault(campaign: Campaign, stage: str) -> None:
    assert not faults(campaign, stage, range(CASES[stage], MORE[stage]))


def test_checksums_that_are_not_compared_are_found(campaign: Campaign, monkeypatch) -> None:
    monkeypatch.setattr(shards, "_check_hashes", lambda *args, **options: None)
    assert "silent" in kinds(campaign, "flips", range(100))


def test_a_write_in_place_is_found(campaign: Campaign, monkeypatch) -> None:
    def write_in_place(path: Path, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data)

    monkeypatch.setattr(writer, "atomic_write", write_in_place)
    assert kinds(campaign, "faults", range(0, 400, 4)) & {"lost", "not finished"}


def test_an_error_that_is_dropped_is_found(campaign: Campaign, monkeypatch) -> None:
    original = writer.atomic_write

    def write_or_not(path: Path, data: bytes) -> None:
        try:
            original(path, data)
        except OSError:
            return

    monkeypatch.setattr(writer, "atomic_write", write_or_not)
    assert kinds(campaign, "faults", range(0, 400, 4)) & {"untyped", "not finished"}


def test_a_result_that_is_off_by_a_thousandth_is_found(campaign: Campaign, monkeypatch) -> None:
    original = ckd.normalized_similarity
    wrong = lambda *args, **options: 1.001 * original(*args, **options)  # noqa: E731
    monkeypatch.setattr(ckd, "normalized_similarity", wrong)
    assert "wrong" in kinds(campaign, "problems", range(20))


def test_children_that_hang_or_die_are_told_apart() -> None:
    assert in_child(lambda: os.read(os.pipe()[0], 1), seconds=0.2).death == "hang"
    assert in_child(lambda: os.kill(os.getpid(), signal.SIGKILL)).death == "signal 9"
    assert in_child(lambda: bytearray(64 << 20).count(1)).growth > 60 << 20


def faults(campaign: Campaign, stage: str, numbers: range) -> list[str]:
    found = (campaign.cases[stage](number) for number in numbers)
    return [f"{kind}: {fault}" for kind, fault in found if fault]


def kinds(campaign: Campaign, stage: str, numbers: range) -> set[str]:
    """The kinds of the faults that a stage finds, until the first."""
    for number in numbers:
        result = campaign.cases[stage](number)
        if result.fault:
            return {result.kind}
    return set()
