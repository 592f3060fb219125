"""Images and labels: in memory or decoded on demand, with stable ids and stateless randomness."""

from ckd.data.augment import Augment
from ckd.data.dataset import Batch, DataError, Dataset, MemoryImages, MissingSplit
from ckd.data.labels import keep_labels
from ckd.data.load import load
from ckd.data.order import epoch_order, step_generator, training_batches
from ckd.data.photo import MAX_PIXELS
from ckd.data.stream import FileImages

__all__ = [
    "MAX_PIXELS",
    "Augment",
    "Batch",
    "DataError",
    "Dataset",
    "FileImages",
    "MemoryImages",
    "MissingSplit",
    "epoch_order",
    "keep_labels",
    "load",
    "step_generator",
    "training_batches",
]
