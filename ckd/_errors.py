"""The base class of the package's errors, and ConfigError, which several parts raise."""

from __future__ import annotations


class CkdError(Exception):
    """Base class of the errors that ckd defines, each of which is also a ValueError or a
    RuntimeError. The caller can correct the cause; the message says how."""


class ConfigError(CkdError, ValueError):
    """An invalid setting; the message names the flag, the expected values and the given one."""
