"""ckd/_json.py: only what was written is read, and nothing else takes long or much memory."""

from __future__ import annotations

import json
import os
import tracemalloc
from typing import TypedDict

import pytest

from ckd import _json
from ckd._json import JsonError


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": "\\\\u0000"}',  # a backslash and u0000
        b'{"a": "\\ud83d\\ude00"}',
        b'{"a": "\\udcff"}',  # the byte ff in a path
        b'{"a": "[[[[\\"{{{{"}',
        b'{"a": NaN, "b": 1e999}',
        b'{"a": ' * 64 + b"1" + b"}" * 64,
    ],
)
def test_what_json_writes_is_read(data):
    assert repr(_json.parse_object(data)) == repr(json.loads(data))  # NaN is not equal to NaN


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"null", b"[]", b"NaN", b'"x"', b"1", b"{", b'{"a": 1} 2', b"\xff"),
        b"[" * 1_000_000,
        b'{"a": ' * 65 + b"1" + b"}" * 65,
        b'{"a": "' + b"[" * 99 + b'", "b": ' + b"[" * 64 + b"]" * 64 + b"}",
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": "\\u0000"}',
        b'{"\\u0000": 1}',
        b'{"a": ["\\ud83d"]}',
        b'{"a": "\\ude00"}',
        b'{"a": "\\udc00"}',
        b'"' + b'\\"' * 500_000,  # an unclosed string of quotes: half an hour for a naive pattern
        b'{"a": "' + b"x" * 500_000,
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
)
def test_anything_else_is_a_json_error(data):
    with pytest.raises(JsonError):
        _json.parse_object(data)


def test_a_change_of_any_byte_of_a_sealed_object_is_found():
    values = {"name": "é\n", "list": [1, 2.5, None, True], "nested": {"a": {}}}
    data = _json.sealed(values)
    assert _json.unsealed(_json.parse_object(data), data) == values
    assert data == _json.sealed(dict(reversed(values.items())))
    for at in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            with pytest.raises(JsonError):
                _json.unsealed(_json.parse_object(bytes(damaged)), bytes(damaged))


def test_an_object_without_checksum_is_refused():
    data = b'{\n  "a": 1\n}\n'
    with pytest.raises(JsonError, match="it has no checksum"):
        _json.unsealed(_json.parse_object(data), data)


class Shape(TypedDict):
    count: int
    names: list[str]


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"count": 1}, "names"),
        ({"count": 1, "names": [], "other": 1}, "other"),
        ({"count": "1", "names": []}, "count"),
        ({"count": 1, "names": ["a", None]}, "names"),
        ([], "dict"),
    ],
)
def test_fields_of_other_types_are_named(values, what):
    with pytest.raises(JsonError, match=what):
        _json.check_types(values, Shape)


def test_large_files_are_not_read(tmp_path):
    path = tmp_path / "a.json"
    path.touch()
    os.truncate(path, 1 << 40)  # no disk space is taken
    with pytest.raises(OSError, match=r"1,099,511,627,776 bytes.*at most 1,048,576"):
        _json.read_object(path)


def test_a_long_string_takes_a_few_times_its_length():
    data = _json.sealed({"a": "x" * 1_000_000})
    tracemalloc.start()
    _json.unsealed(_json.parse_object(data), data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * len(data)


def test_a_message_does_not_repeat_the_file():
    with pytest.raises(JsonError) as caught:
        _json.unsealed({"checksum": "x" * 1_000_000}, b"")
    assert len(str(caught.value)) < 200
