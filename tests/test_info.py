"""`python -m ckd.info` and the native module it reports on."""

from __future__ import annotations

import importlib.util
import json

import pytest

import ckd
from ckd import info


def test_report_names_versions_backends_and_reasons() -> None:
    text = info.report()
    for word in (
        ckd.__version__,
        "torch",
        "ckd._C",
        "cpu kernels",
        "cuda kernels",
        "reference",
        "triton: ",
        "auto takes",
    ):
        assert word in text


def test_native_module_reports_how_it_was_built() -> None:
    if importlib.util.find_spec("ckd._C") is None:
        pytest.skip("ckd._C is not built here")
    from ckd import _C

    build = _C.build_info()
    assert build["version"] == ckd.__version__
    assert build["cxx_standard"] >= 201703
    assert build["compiler"].split()[0] in ("gcc", "clang")


def test_missing_native_module_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(info, "__file__", str(tmp_path / "info.py"))
    assert "never built" in info.native_module()
    report = {"built": False, "reason": "no C++ compiler found"}
    (tmp_path / "_build.json").write_text(json.dumps(report))
    assert info.native_module() == "missing: no C++ compiler found"
