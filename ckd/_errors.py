"""The base class of the package's errors, and the one error that several of its parts raise."""

from __future__ import annotations


class CkdError(Exception):
    """Something that the caller can put right; the message says how. Base class of the errors that
    ckd defines, each of which is a ValueError or a RuntimeError too."""


class ConfigError(CkdError, ValueError):
    """A setting that cannot work; names the flag, what was expected and what came."""
