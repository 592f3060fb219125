"""What a user is told where `ckd._C` is missing."""

from __future__ import annotations

import importlib.machinery
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import ckd
from ckd.backends import interface, native

MODULE = f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"


def package(folder: Path, *, tree: bool, module: str | None = None) -> Path:
    """A folder with a package ckd: a source tree, or an installed one."""
    (folder / "ckd").mkdir(parents=True)
    if tree:
        (folder / "setup.py").touch()
    if module is not None:
        (folder / "ckd" / module).touch()
    return folder / "ckd"


def test_a_tree_that_was_never_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    found = native.why_missing(package(tmp_path / "my tree", tree=True))
    assert found == f"never built here: pip install -e '{tmp_path / 'my tree'}'"
    found = native.why_missing(package(tmp_path / "site", tree=False))
    assert found == "never built here: pip install --force-reinstall ckd"


def test_a_tree_that_hides_an_installed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, site = tmp_path / "tree", tmp_path / "site-packages"
    hiding = package(tree, tree=True)
    installed = package(site, tree=False, module=MODULE)
    monkeypatch.setattr("sys.path", ["", str(tree), str(site)])
    monkeypatch.chdir(tree)
    text = native.why_missing(hiding)
    assert f"imported from {tree}" in text
    assert f"in place of the installed one in {installed}" in text
    assert "run Python from another folder" in text
    assert f"pip install -e {tree}" in text


def test_the_module_of_another_tree_is_not_used(tmp_path: Path) -> None:
    """As the finder of an editable install gives it to a clone that was never built."""
    kept = shutil.ignore_patterns("_C.*.so", "_build.json", "__pycache__")
    shutil.copytree(native.PACKAGE, tmp_path / "tree" / "ckd", ignore=kept)
    (tmp_path / "tree" / "setup.py").touch()
    other = package(tmp_path / "other", tree=True, module=MODULE)
    code = f"""
import importlib.util, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "ckd._C":
            return importlib.util.spec_from_file_location(name, {str(other / MODULE)!r})
sys.meta_path.insert(0, Finder)
sys.path[:0] = [{str(tmp_path / "tree")!r}]
from ckd import info
from ckd.backends import native
assert native._C is None
print(native.missing)
print(info.native_module())
"""
    command = [sys.executable, "-c", code]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for line in text.splitlines():
        assert f"missing: ckd was imported from {tmp_path / 'tree'}, where it was never" in line
        assert f"in place of the installed one in {other}: run" in line
        assert f"pip install -e {tmp_path / 'tree'}" in line
    assert len(text.splitlines()) == 2


def test_a_module_of_another_python(tmp_path: Path) -> None:
    folder = package(tmp_path, tree=True, module="_C.cpython-27-x86_64-linux-gnu.so")
    text = native.why_missing(folder)
    assert "_C.cpython-27-x86_64-linux-gnu.so is not for this Python" in text
    assert f"pip install -e {tmp_path}" in text


@pytest.mark.parametrize(
    ("built", "expected"), [(False, "no C++ compiler"), (True, "the file is gone: pip install")]
)
def test_the_report_of_the_build(tmp_path: Path, built: bool, expected: str) -> None:
    folder = package(tmp_path, tree=False)
    (folder / "_build.json").write_text(json.dumps({"built": built, "reason": "no C++ compiler"}))
    assert expected in native.why_missing(folder)


def test_auto_warns_once_and_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing", "ckd._C is missing: never built here: pip install it")
    monkeypatch.setattr(native, "_warned", False)
    interface.invalidate_plans()
    x = torch.randn(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ckd.normalized_similarity(x, x, backend="reference")  # named
        ckd.normalized_similarity(x.double(), x)  # float64: kernels would not serve it either
        assert ckd.backends.explain(x, x).chosen == "reference"
    with pytest.warns(RuntimeWarning, match="without its compiled kernels.*pip install it"):
        ckd.normalized_similarity(x, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ckd.contrastive_cross_entropy(x, x, torch.tensor([0, 1, 2]))


def test_a_build_does_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native.warn_of_reference()
