"""The normalised similarity op against eager float64 autograd."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import ckd
from tests import oracle, tolerance
from tests.oracle import GRADIENTS, Case, make_case
from tests.quick import slow


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (7, 65, 33, 16), (64, 63, 12, None), *slow([(3, 40_000, 16, 64)])],
    ids=str,
)
def test_similarity_and_gradients_match_float64(shape: tuple[int, ...], backend: str) -> None:
    case = make_case(*shape)
    case = case.requiring(*GRADIENTS)
    result = ckd.normalized_similarity(
        case.student, case.bank, case.weight, case.bias, case.logit_scale, backend=backend
    )
    assert result.dtype == torch.float32
    factor = torch.randn(result.shape)

    def results(case: Case, table: torch.Tensor) -> tolerance.Results:
        total = (table * factor.to(table.dtype)).sum()
        return {"table": table.detach(), **oracle.gradients(case, total)}

    def by_oracle(dtype: torch.dtype) -> tolerance.Results:
        cast = case.cast(dtype).requiring(*GRADIENTS)
        return results(cast, oracle.logits(cast))

    tolerance.check(results(case, result), tolerance.expected(by_oracle), backend)


def test_similarity_softmax_is_the_loss(backend: str) -> None:
    case = make_case(16, 30, 24, 12)
    table = ckd.normalized_similarity(
        case.student, case.bank, case.weight, case.bias, case.logit_scale, backend=backend
    )
    loss = ckd.contrastive_cross_entropy(*case.arguments, backend=backend)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(table, case.target), loss)


def test_one_graph_serves_all_shapes(backend: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(
        ckd.normalized_similarity, fullgraph=True, dynamic=True, backend=counter
    )
    for batch, rows in ((3, 5), (4, 7), (9, 6), (10, 12)):
        case = make_case(batch, rows, 6, 4).requiring(*GRADIENTS)
        inputs = (case.student, case.bank, case.weight, case.bias, case.logit_scale)
        expected = ckd.normalized_similarity(*inputs, backend=backend)
        torch.testing.assert_close(compiled(*inputs, backend=backend), expected)
    assert counter.frame_count == 1


def test_gradcheck_opcheck_and_compile(backend: str) -> None:
    case = make_case(3, 5, 6, 4).cast(torch.float64).requiring(*GRADIENTS)
    names = ("student", "weight", "bias", "logit_scale")

    def similarity(*inputs: torch.Tensor) -> torch.Tensor:
        moved = replace(case, **dict(zip(names, inputs)))
        return ckd.normalized_similarity(
            moved.student, moved.bank, moved.weight, moved.bias, moved.logit_scale
        )

    assert torch.autograd.gradcheck(similarity, [getattr(case, n) for n in names])
    single = make_case(3, 5, 6, 4).requiring(*GRADIENTS)
    args = (single.student, single.bank, single.weight, single.bias, single.logit_scale)
    torch.library.opcheck(torch.ops.ckd.similarity.default, (*args, backend, False))
    compiled = torch.compile(ckd.normalized_similarity, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(*args, backend=backend), ckd.normalized_similarity(*args, backend=backend)
    )


def test_zero_rows_have_zero_similarity(backend: str) -> None:
    case = make_case(3, 4, 6, None)
    case.student[1] = 0
    case.bank[2] = 0
    table = ckd.normalized_similarity(case.student, case.bank, backend=backend)
    assert (table[1] == 0).all()
    assert (table[:, 2] == 0).all()
    assert (table[0, [0, 1, 3]] != 0).all()


def test_non_finite_student_row_gives_nan(backend: str) -> None:
    case = make_case(3, 4, 6, None)
    case.student[1, 0] = math.inf
    table = ckd.normalized_similarity(case.student, case.bank, backend=backend)
    assert table.isnan().any(1).tolist() == [False, True, False]
