"""Students and teachers: networks that give an embedding and logits, and their files."""

from ckd.models.base import Model, ModelOutput, check_teacher
from ckd.models.catalog import create, known
from ckd.models.class_head import class_head
from ckd.models.classes import are_named, class_order
from ckd.models.files import STUDENT_FILE, class_names, load, load_student, save
from ckd.models.measure import flops_per_image, parameter_count, weights_hash
from ckd.models.prepare import prepare
from ckd.models.preprocessing import Resize
from ckd.models.spec import POOLS, ModelError, Pool
from ckd.models.student import Prediction, Student
from ckd.models.teacher_map import TeacherMap

__all__ = [
    "POOLS",
    "STUDENT_FILE",
    "Model",
    "ModelError",
    "ModelOutput",
    "Pool",
    "Prediction",
    "Resize",
    "Student",
    "TeacherMap",
    "are_named",
    "check_teacher",
    "class_head",
    "class_names",
    "class_order",
    "create",
    "flops_per_image",
    "known",
    "load",
    "load_student",
    "parameter_count",
    "prepare",
    "save",
    "weights_hash",
]
