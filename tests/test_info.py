"""`python -m ckd.info` and the native module it reports on."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import ckd
from ckd import info
from ckd.backends import native

ROOT = Path(__file__).parents[1]


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
    if native.missing is not None:
        pytest.skip(native.missing)
    build = native._C.build_info()
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


def test_missing_kernels_come_with_a_remedy() -> None:
    code = "import sys; sys.modules['ckd._C'] = None; from ckd import cli; cli.main(['info'])"
    command = [sys.executable, "-c", code]
    text = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "The CPU kernels are missing: " in text
    assert f"This ckd is {Path(ckd.__file__).parent}: " in text
    assert "pip install -e ." in text
    assert "auto takes 'reference'" in text


def test_a_build_that_is_gone_is_not_called_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(info, "__file__", str(tmp_path / "info.py"))
    built = {"built": True, "reason": "built with c++; no nvcc"}
    (tmp_path / "_build.json").write_text(json.dumps(built))
    assert info.native_module().startswith("missing: it was built, and the file is gone: ")


def test_working_kernels_need_no_remedy() -> None:
    if native.missing is not None:
        pytest.skip(native.missing)
    assert info.remedy() is None
    assert "missing: " not in info.report().partition("\ntorch")[0]
