"""Every error of the package is a `ckd.CkdError`, and keeps its built-in base classes."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

import ckd
from ckd.backends import BackendError
from ckd.bank.manifest import RowError
from ckd.data import DataError
from ckd.models import ModelError
from ckd.train import CheckpointError, ConfigError, Interrupted, TrainError


def defined_errors() -> dict[str, type[BaseException]]:
    """All exception classes of the package by their full name."""
    found: dict[str, type[BaseException]] = {}
    for info in pkgutil.walk_packages(ckd.__path__, "ckd."):
        if info.name == "ckd._C":
            continue  # not Python
        try:
            module = importlib.import_module(info.name)
        except ModuleNotFoundError as error:  # the Triton kernels, without Triton
            if str(error.name).split(".")[0] != "triton":
                raise
            continue
        for name, member in inspect.getmembers(module, inspect.isclass):
            if issubclass(member, BaseException) and member.__module__ == info.name:
                found[f"{info.name}.{name}"] = member
    return found


def test_every_error_derives_from_the_base_class() -> None:
    errors = defined_errors()
    assert len(errors) >= 10  # the walk has found them
    assert [name for name, error in errors.items() if not issubclass(error, ckd.CkdError)] == []


@pytest.mark.parametrize(
    ("error", "base"),
    [
        (BackendError, RuntimeError),
        (ckd.BankError, ValueError),
        (RowError, ckd.BankError),
        (DataError, ValueError),
        (ModelError, ValueError),
        (ConfigError, ValueError),
        (TrainError, RuntimeError),
        (CheckpointError, TrainError),
        (Interrupted, TrainError),
    ],
)
def test_errors_keep_the_bases_they_had(error: type[Exception], base: type[Exception]) -> None:
    assert issubclass(error, base)
