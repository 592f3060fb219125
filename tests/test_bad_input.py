"""Every call in `tests/bad_input` fails with the documented error, in words that help."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_input import Case, bank, data, evaluation, models, op, predict, train

CASES = [
    pytest.param(case, id=f"{part.__name__.rpartition('.')[2]}: {case.name}")
    for part in (op, bank, data, models, train, evaluation, predict)
    for case in part.CASES
]


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_words(case: Case, tmp_path: Path) -> None:
    if case.needs is not None:
        pytest.importorskip(case.needs)
    with pytest.raises(case.error) as caught:
        case.call(tmp_path)
    message = str(caught.value)
    missing = [fragment for fragment in case.says if fragment not in message]
    assert not missing, f"{missing} not in: {message}"


def test_the_table_is_as_large_as_promised() -> None:
    assert len(CASES) >= 60
    assert len({param.id for param in CASES}) == len(CASES)
