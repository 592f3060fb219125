"""What can go wrong for a user of the trainer; every message says what to do about it."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting that cannot work; names the flag, what was expected and what came."""


class TrainError(RuntimeError):
    """A run that cannot begin or go on."""


class CheckpointError(TrainError):
    """A checkpoint that cannot be written, read or resumed; names its file."""


class Interrupted(TrainError):
    """Ctrl-C or SIGTERM: a checkpoint is saved, and the message is the command to go on."""
