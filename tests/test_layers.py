"""Imports point down only."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from ckd.cli import COMMANDS

PACKAGE = Path(__file__).parents[1] / "ckd"

# Each layer may import itself and the layers it names; the longest matching prefix counts.
BASE = {
    *("ckd._console", "ckd._device", "ckd._errors", "ckd._files", "ckd._fit", "ckd._hints"),
    *("ckd._json", "ckd._lock", "ckd._npy", "ckd._output", "ckd._version"),
}
LAYERS: dict[str, set[str]] = {
    "ckd._console": set(),
    "ckd._errors": set(),
    "ckd._device": {"ckd._errors"},
    "ckd._hints": {"ckd._errors"},
    "ckd._files": set(),
    "ckd._fit": set(),
    "ckd._json": {"ckd._errors", "ckd._files"},
    "ckd._lock": {"ckd._files"},
    "ckd._npy": set(),
    "ckd._output": {"ckd._errors"},
    "ckd._version": set(),
    "ckd._C": set(),
    "ckd._triton": set(),
    "ckd.backends": {"ckd._errors", "ckd._hints", "ckd._C", "ckd._triton"},
    "ckd.ops": {"ckd._errors", "ckd._hints", "ckd.backends"},
    "ckd.heads": {"ckd._hints"},
    "ckd.losses": {"ckd._errors", "ckd._hints", "ckd.heads", "ckd.ops", "ckd.backends"},
    "ckd.bank": BASE,
    "ckd.data": BASE,
    "ckd.models": BASE | {"ckd.heads"},
    "ckd.neighbours": {"ckd._console", "ckd.ops", "ckd.backends", "ckd.bank"},
    "ckd.report": BASE,
    # Programs, at the top.
    "ckd.bank.build": {"ckd"},
    "ckd.bank.__main__": {"ckd"},
    "ckd.train": {"ckd"},
    "ckd.eval": {"ckd"},
    "ckd.predict": {"ckd"},
    "ckd.export": {"ckd"},
    "ckd.compare": {"ckd"},
    "ckd.info": {"ckd"},
    "ckd.cli": {"ckd"},
    "ckd.__main__": {"ckd"},
}
# `ckd/__init__.py` exports the library, not the programs.
LAYERS["ckd"] = {"ckd._errors", "ckd._version"}
LAYERS["ckd"] |= {"ckd.backends", "ckd.bank", "ckd.losses", "ckd.models", "ckd.ops"}


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["ckd", *path.relative_to(PACKAGE).with_suffix("").parts]
        found.append((".".join(parts).removesuffix(".__init__"), path))
    return found


def imports(path: Path) -> set[str]:
    """Absolute names of all imports of ckd in the file, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in names if name == "ckd" or name.startswith("ckd.")}


def layer_of(name: str) -> str:
    return max((p for p in LAYERS if name == p or name.startswith(p + ".")), key=len)


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_module_imports_only_what_lies_below(name: str, path: Path) -> None:
    own = layer_of(name)
    if "ckd" in LAYERS[own]:
        return  # a program may use everything
    allowed = LAYERS[own] | {own}
    for imported in imports(path):
        target = layer_of(imported)
        # `from ckd import backends` names a layer, `from ckd import __version__` the package.
        assert target in allowed, f"{name} imports {imported}, which is not below it"


def test_only_commands_import_the_command_line() -> None:
    commands = {module for module, _ in COMMANDS.values()} | {"ckd.__main__"}
    for name, path in modules():
        if any(layer_of(imported) == "ckd.cli" for imported in imports(path)):
            assert name in commands or layer_of(name) == "ckd.cli", f"{name} is no command"


def test_every_package_is_installed() -> None:
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    found = {name for name, path in modules() if path.name == "__init__.py"}
    assert {*settings["tool"]["setuptools"]["packages"]} == found | {"ckd._triton"}


def test_no_circle_of_imports() -> None:
    """Imports inside functions count too; that Python imports a module's package first does not."""
    known = dict(modules())
    below: dict[str, set[str]] = {}
    for name, path in known.items():
        named = {n if n in known else n.rpartition(".")[0] for n in imports(path)}
        below[name] = {n for n in named & known.keys() if not f"{name}.".startswith(f"{n}.")}
    try:
        list(TopologicalSorter(below).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_importing_the_package_loads_no_program_and_no_extra() -> None:
    heavy = ["ckd.train", "ckd.compare", "ckd.data", "ckd.models", "tyro", "pyarrow", "matplotlib"]
    heavy += ["timm", "transformers", "PIL", "tensorboard", "torchvision", "triton.language"]
    heavy += ["ckd.cli", "ckd.info", "ckd.report", "jinja2"]
    code = "import torch, sys; before = set(sys.modules); import ckd; "
    code += f"print([m for m in {heavy} if m in sys.modules and m not in before])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_packages_are_imported_where_they_are_first_used() -> None:
    code = "import ckd; print(ckd.data.load.__name__, ckd.models.create.__name__, "
    code += "ckd.train.Config.__name__, ckd.eval.Report.__name__); ckd.dta"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "load create Config Report"
    assert "AttributeError: module 'ckd' has no attribute 'dta'" in out.stderr
