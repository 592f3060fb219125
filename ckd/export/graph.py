"""torch.export and ONNX: the network as a graph, which runs without its Python code."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from ckd._hints import require
from ckd.export.portable import (
    METADATA,
    ExportError,
    Portable,
    check_exportable,
    check_same,
    example,
    metadata,
)
from ckd.models import Student
from ckd.models.base import first_line
from ckd.models.weights import DAMAGE

_ONNX_LIMIT = 2**31 - 1  # bytes of a protobuf message
# Any size. torch 2.7 refuses a size without a bound.
_BATCH = Dim("batch", min=1, max=2**31 - 1)


def torch_export(student: Student) -> bytes:
    """A .pt2 file of `Portable` for batches of any size, with the metadata in it."""
    program = _program(student)
    module = program.module()
    check_same(student, module, "the exported program", (1, 3))
    data = io.BytesIO()
    about = json.dumps(metadata(student, normalised=True))
    with _quiet():
        torch.export.save(program, data, extra_files={METADATA: about})
    return data.getvalue()


def onnx(student: Student) -> bytes:
    """An .onnx file of `Portable` for batches of any size, with the metadata in it.

    It is run and compared with the student where onnxruntime is installed.
    """
    for module in ("onnx", "onnxscript"):
        require(module, extra="onnx", purpose="export to ONNX")
    about = metadata(student, normalised=True)
    size = sum(tensor.nbytes for tensor in student.state_dict().values())
    if size > _ONNX_LIMIT:
        raise ExportError(
            f"the student has {size:,} bytes of weights, an ONNX file at most {_ONNX_LIMIT:,}; "
            "use torch-export"
        )
    program = _program(student)
    try:
        with _quiet():
            written = torch.onnx.export(
                program,
                (example(student, 2),),
                input_names=["images"],
                output_names=[*about["outputs"]],
                dynamo=True,
                verbose=False,
            )
    except DAMAGE as error:
        raise _refused(student, "ONNX", error) from error
    assert written is not None  # without a file's name torch returns the program
    model: Any = written.model_proto
    _name_batch(model.graph)
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA, json.dumps(about)
    data = model.SerializeToString()
    if importlib.util.find_spec("onnxruntime") is not None:
        check_same(student, _onnx_session(data, [*about["outputs"]]), "the ONNX file", (1, 3))
    return data


def _program(student: Student) -> ExportedProgram:
    check_exportable(student)
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(
                Portable(student),
                (example(student, 2),),
                dynamic_shapes={"images": {0: _BATCH}},
                strict=False,
            )
    except DAMAGE as error:
        raise _refused(student, "torch.export", error) from error
    for node in program.graph.nodes:  # with the paths of source files on this machine
        node.meta.pop("stack_trace", None)
    return program


def _refused(student: Student, what: str, error: Exception) -> ExportError:
    return ExportError(f"{what} cannot express the student {student.spec}: {first_line(error)}")


def _name_batch(graph: Any) -> None:
    """Call the first dimension of images and outputs "batch", not by torch's number of it."""
    theirs = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for side in value.type.tensor_type.shape.dim:
            if side.dim_param:
                side.dim_param = re.sub(rf"\b{theirs}\b", "batch", side.dim_param)


def _onnx_session(data: bytes, outputs: list[str]) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(pixels: Tensor) -> dict[str, Any]:
        return dict(zip(outputs, session.run(outputs, {"images": pixels.numpy()})))

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings and logs of its own exporters, which no user can act on."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
