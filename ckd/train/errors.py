"""Errors of the trainer; every message names the remedy."""

from __future__ import annotations

from ckd._errors import CkdError, ConfigError

__all__ = ["CheckpointError", "ConfigError", "Interrupted", "TrainError"]


class TrainError(CkdError, RuntimeError):
    """A run cannot start or continue."""


class CheckpointError(TrainError):
    """A checkpoint cannot be written, read or resumed; the message names its file."""


class Interrupted(TrainError):
    """Ctrl-C or SIGTERM: a checkpoint was saved; the message gives the command that resumes."""
