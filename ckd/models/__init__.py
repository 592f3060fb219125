"""Students and teachers: networks that give an embedding and logits, and their files."""

from ckd.models.base import Model, ModelOutput
from ckd.models.catalog import create, known
from ckd.models.files import class_names, load, save
from ckd.models.measure import flops_per_image, parameter_count, weights_hash
from ckd.models.prepare import prepare
from ckd.models.spec import ModelError

__all__ = [
    "Model",
    "ModelError",
    "ModelOutput",
    "class_names",
    "create",
    "flops_per_image",
    "known",
    "load",
    "parameter_count",
    "prepare",
    "save",
    "weights_hash",
]
