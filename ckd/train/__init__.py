"""Train a student: `train(Config(...))`, or `python -m ckd.train`."""

from ckd.train.config import Config
from ckd.train.errors import CheckpointError, ConfigError, Interrupted, TrainError
from ckd.train.evaluation import Scores, evaluate
from ckd.train.loop import train

__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "Interrupted",
    "Scores",
    "TrainError",
    "evaluate",
    "train",
]
