"""What can go wrong for a user of the trainer; every message says what to do about it."""

from __future__ import annotations

from ckd._errors import CkdError, ConfigError

__all__ = ["CheckpointError", "ConfigError", "Interrupted", "TrainError"]


class TrainError(CkdError, RuntimeError):
    """A run that cannot begin or go on."""


class CheckpointError(TrainError):
    """A checkpoint that cannot be written, read or resumed; names its file."""


class Interrupted(TrainError):
    """Ctrl-C or SIGTERM: a checkpoint is saved, and the message is the command to go on."""
