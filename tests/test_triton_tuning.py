"""The choice of tiles: when candidates are measured, when not, and how sums are split (split-k)."""

from __future__ import annotations

import importlib.util
import itertools
import types

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The time of each candidate, to be set by the test; `measured` counts the measurements."""
    from ckd._triton import tuning

    times = {"measured": 0.0}

    def seconds(launch: object, candidate: str) -> float:
        times["measured"] += 1
        return times[candidate]

    monkeypatch.setattr(tuning, "seconds", seconds)
    monkeypatch.setattr(tuning, "_fastest", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return times


def choose(key: object, *candidates: str) -> str:
    from ckd._triton import tuning

    return tuning.choose(key, candidates, lambda candidate: None)


def test_the_fastest_is_taken_and_remembered_for_its_key(times: dict[str, float]) -> None:
    times |= {"a": 3.0, "b": 1.0, "c": 2.0}
    assert choose("key", "a", "b", "c") == "b"
    times |= {"a": 0.5}
    assert choose("key", "a", "b", "c") == "b"
    assert choose("other key", "a", "b", "c") == "a"
    assert times["measured"] == 6


def test_a_remembered_choice_is_one_of_the_candidates(times: dict[str, float]) -> None:
    """Widths in one bucket may have different candidates."""
    times |= {"a": 3.0, "b": 1.0, "c": 2.0, "d": 1.0}
    assert choose("key", "a", "b") == "b"
    assert choose("key", "c", "d") == "d"


def test_one_candidate_is_not_measured(times: dict[str, float]) -> None:
    assert choose("key", "a") == "a"
    assert times["measured"] == 0


def test_deterministic_algorithms_take_the_first(times: dict[str, float]) -> None:
    times |= {"a": 3.0, "b": 1.0}
    assert choose("key", "a", "b") == "b"
    torch.use_deterministic_algorithms(True)
    try:
        assert choose("key", "a", "b") == "a"
    finally:
        torch.use_deterministic_algorithms(False)
    assert choose("key", "a", "b") == "b"


def test_nothing_is_measured_or_remembered_while_a_graph_is_captured(
    times: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    times |= {"a": 3.0, "b": 1.0}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose("key", "a", "b") == "a"
    assert times["measured"] == 0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose("key", "a", "b") == "b"


def test_a_candidate_without_room_takes_forever() -> None:
    from ckd._triton import tuning
    from triton.runtime.errors import OutOfResources

    def launch(candidate: str) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    assert tuning.seconds(launch, "large") == float("inf")


@pytest.mark.parametrize(
    ("kib", "family"), [(227, "hopper"), (163, "ampere"), (99, "small"), (64, "small")]
)
def test_tiles_fit_the_shared_memory_of_the_device(
    kib: int, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckd.backends.triton import call

    utils = types.SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": kib << 10})
    driver = types.SimpleNamespace(active=types.SimpleNamespace(utils=utils))
    monkeypatch.setattr(call, "driver", driver)
    call.family.cache_clear()
    assert call.family(torch.device("cuda", 0)) == family
    call.family.cache_clear()


def test_sizes_within_a_factor_of_two_share_a_bucket() -> None:
    from ckd._triton.tuning import bucket

    assert bucket(1024) == bucket(2047) != bucket(2048)
    assert len({bucket(n) for n in range(1, 1 << 12)}) == 12


def test_parts_of_the_bank_fill_the_device_and_are_worth_their_start() -> None:
    from ckd._triton.tiles import splits

    for rows, block, others, processors in itertools.product(
        (1, 63, 1000, 20_480, 1_280_000), (32, 64, 128), (1, 2, 7, 32, 131, 132, 500), (1, 108, 132)
    ):
        parts = splits(rows, block, others, processors)
        assert 1 <= parts <= 64
        assert parts == 1 or rows >= parts * block
        assert parts == 1 or parts * others <= 2 * processors + others
    assert splits(1_280_000, 64, 32, 132) == 4  # 128 programs of 132 at once
    assert splits(1_280_000, 64, 132, 132) == 1
    assert splits(1_280_000, 64, 1, 132) > 60
    assert splits(1000, 64, 4, 132) == 15  # a small bank: one tile for each part
