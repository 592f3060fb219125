"""ckd/_json.py: only what was written is read, and nothing else takes long or much memory."""

from __future__ import annotations

import json
import os
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
    with pytest.raises(JsonError, match="checksum None"):
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
    with pytest.raises(OSError, match=r"1,099,511,627,776 bytes.*at most 4,194,304"):
        _json.read_object(path)
