"""The normalised similarity in Triton kernels: forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ckd._triton import tiles
from ckd._triton.similarity import similarity_kernel
from ckd._triton.tiles import Tiles
from ckd.backends.device import Gpu
from ckd.backends.interface import Gradients, Inputs, Needs, Plan, zero_gradients
from ckd.backends.triton.call import Call, Chunk
from ckd.backends.triton.products import Product
from ckd.backends.triton.projection import ProjectionGradient, gradients
from ckd.backends.triton.students import RowGradients, student_gradient


def forward(gpu: Gpu, inputs: Inputs, plan: Plan) -> Tensor:
    call = Call(gpu, inputs, plan)
    out = call.empty(call.batch, call.bank_rows)
    if call.batch > 0:
        with call.on_device():
            u = call.students()
            for chunk in call.chunks():
                _similarities(call, u, chunk, out)
    return out


def backward(gpu: Gpu, d_logits: Tensor, inputs: Inputs, plan: Plan, needs: Needs) -> Gradients:
    call = Call(gpu, inputs, plan)
    if call.batch == 0:
        return zero_gradients(inputs, needs)
    d_logits = d_logits.float().contiguous()
    with call.on_device():
        u = call.students()
        slope = Product(call, call.batch, call.student_dim)
        projection = ProjectionGradient(call, needs)
        for chunk in call.chunks():
            part = d_logits[:, chunk.first : chunk.first + len(chunk.n)]
            if needs.student or needs.logit_scale:
                slope.add(part, chunk.n, _largest(part), call.operand)
            if needs.weight or needs.bias:
                d_n = Product(call, len(chunk.n), call.width)
                d_n.add(part.T, u, _largest(part.T), call.operand)
                projection.add(chunk, d_n.sum() * call.positive_scale)
        d_student = d_scale = None
        if needs.student or needs.logit_scale:
            rows = RowGradients(call.empty(call.batch).fill_(1), None, None)
            total = slope.sum()
            d_student, along, _ = student_gradient(call, rows, total, total, needs)
            d_scale = along.sum() if needs.logit_scale else None
        return gradients(call, needs, d_student, d_scale, projection)


def _similarities(call: Call, u: Tensor, chunk: Chunk, out: Tensor) -> None:
    """Write the columns of a chunk to out [B, K]."""
    count = len(chunk.n)

    def launch(chosen: Tiles) -> None:
        similarity_kernel[(-(-call.batch // chosen.batch), -(-count // chosen.bank))](
            u, chunk.n, call.scale, out[:, chunk.first :], call.batch, count, call.width,
            call.bank_rows, PRECISION=call.precision,
            BLOCK_BATCH=chosen.batch, BLOCK_BANK=chosen.bank, BLOCK_INNER=chosen.inner,
            num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip

    candidates = tiles.similarity_tiles(call.arithmetic, call.family)
    sizes = (call.batch, count, call.width)
    launch(call.choose("similarity", sizes, candidates, launch))


def _largest(matrix: Tensor) -> Tensor:
    """The largest magnitude of each row."""
    return torch.linalg.vector_norm(matrix, torch.inf, dim=1)
