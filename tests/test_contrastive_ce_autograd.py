"""The contrastive cross-entropy op inside torch: autograd, compile, memory."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import ckd
from ckd.backends import reference
from ckd.backends.interface import Inputs, Keep, Needs, Plan, Saved, Targets, Upstream
from tests import oracle
from tests.oracle import GRADIENTS, Case, make_case


def schema_arguments(
    case: Case,
    backend: str,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    keep: Keep | None = None,
) -> tuple[object, ...]:
    """The flat arguments of torch.ops.ckd.contrastive_ce."""
    inputs = Inputs(case.student, case.bank, case.weight, case.bias, case.logit_scale)
    targets = Targets(case.target, None, None, label_smoothing, -100, reduction)
    return (*inputs, *targets, *Plan(backend, False), *(keep or Keep(False, False, 0)))


def run(case: Case, backend: str, **options: object) -> torch.Tensor:
    return ckd.contrastive_cross_entropy(*case.arguments, backend=backend, **options)


def test_expanded_gradient_and_second_backward(backend: str) -> None:
    case = make_case(8, 20, 16, 12).requiring(*GRADIENTS)
    loss = run(case, backend, reduction="none")
    loss.sum().backward(retain_graph=True)  # d_loss is an expanded scalar, of stride 0
    first = case.student.grad.clone()
    loss.sum().backward()
    torch.testing.assert_close(case.student.grad, 2 * first)


@pytest.mark.parametrize("wanted", [(n,) for n in GRADIENTS] + [("weight", "bias"), ()])
def test_only_the_gradients_asked_for_are_computed(
    wanted: tuple[str, ...], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ckd.backends.ORDER[backend]
    backward, seen = module.contrastive_ce_backward, []

    def spy(*args: object) -> object:
        gradients = backward(*args)
        seen.append({n: g.numel() > 0 for n, g in gradients._asdict().items()})
        return gradients

    monkeypatch.setattr(module, "contrastive_ce_backward", spy)
    case = make_case(8, 20, 16, 12)
    full = case.requiring(*GRADIENTS)
    every = oracle.gradients(full, run(full, backend))
    case, seen[:] = case.requiring(*wanted), []
    loss = run(case, backend)
    if not wanted:
        assert not loss.requires_grad
        return
    for name, value in oracle.gradients(case, loss).items():
        torch.testing.assert_close(value, every[name])
    assert seen == [{n: n in wanted for n in GRADIENTS}]


def test_frozen_projection_backward_reads_no_bank(backend: str) -> None:
    case = make_case(8, 20, 16, 12).requiring("student", "logit_scale")
    loss = run(case, backend)
    case.bank.data.fill_(math.nan)  # a backward that reads the bank gives NaN
    assert all(g.isfinite().all() for g in oracle.gradients(case, loss).values())


def test_no_intermediate_is_larger_than_a_tile() -> None:
    """K = 50,000 rows of width 64: the logits would have 3.2 M elements, and so would the projected
    bank."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor) and t.untyped_storage() is not None:
                    largest = max(largest, t.untyped_storage().nbytes() if t is not bank else 0)
            return out

    case = make_case(64, 50_000, 64, 64)
    bank = case.bank.half()
    inputs = Inputs(case.student, bank, case.weight, case.bias, case.logit_scale)
    targets, plan = Targets(case.target, None, None, 0.1, -100, "none"), Plan("reference", False)
    own = bank.untyped_storage().nbytes()
    with Watch():
        saved = reference.contrastive_ce_forward(inputs, targets, plan, Keep(True, True, 0))
        forward_largest = largest
        reference.contrastive_ce_backward(
            Upstream(torch.ones(64), None),
            inputs,
            targets,
            plan,
            Saved(*saved[1:]),
            Needs(True, True, True, True),
        )
    tile = 4 * reference.TILE_ELEMENTS
    assert own < tile, "the bank's views count too, and must not hide a larger array"
    assert 0 < forward_largest <= tile
    assert largest <= tile


@pytest.mark.parametrize("projection", [True, False])
def test_gradcheck_in_float64(projection: bool) -> None:
    case = make_case(4, 7, 6, 5 if projection else None).cast(torch.float64)
    case.target[1] = -100
    names = [n for n in GRADIENTS if case.has(n)]
    case = case.requiring(*names)

    def loss_and_lse(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        moved = replace(case, **dict(zip(names, inputs)))
        return ckd.contrastive_cross_entropy(
            *moved.arguments, label_smoothing=0.1, reduction="none", return_lse=True
        )

    assert torch.autograd.gradcheck(loss_and_lse, [getattr(case, n) for n in names])


def test_opcheck(backend: str) -> None:
    for projection in (True, False):
        case = make_case(6, 11, 9, 5 if projection else None)
        case = case.requiring(*[n for n in GRADIENTS if case.has(n)])
        for save in (True, False):
            cache_bytes = 64 + 64 + 4 * 64 * 6 if save and projection and backend == "cpu" else 0
            # Without a saved residual, student and scale cannot have a gradient.
            fixed = replace(
                case, student=case.student.detach(), logit_scale=case.logit_scale.detach()
            )
            moved = case if save else fixed
            args = schema_arguments(moved, backend, 0.1, keep=Keep(save, save, cache_bytes))
            torch.library.opcheck(torch.ops.ckd.contrastive_ce.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool, backend: str) -> None:
    def loss_of(*arguments: torch.Tensor) -> torch.Tensor:
        loss, lse = ckd.contrastive_cross_entropy(
            *arguments, label_smoothing=0.1, return_lse=True, backend=backend
        )
        return loss + 1e-2 * lse.mean()

    compiled = torch.compile(loss_of, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (8, 9):
        case = make_case(batch, 20, 16, 12).requiring(*GRADIENTS)
        expected, result = loss_of(*case.arguments), compiled(*case.arguments)
        torch.testing.assert_close(result, expected)
        truth = oracle.gradients(case, expected)
        for name, value in oracle.gradients(case, result, retain_graph=False).items():
            torch.testing.assert_close(value, truth[name])


def test_empty_results_are_not_aliases_of_inputs(backend: str) -> None:
    case = make_case(3, 4, 5, 5)
    arguments = schema_arguments(case, backend, reduction="none")
    outputs = torch.ops.ckd.contrastive_ce(*arguments)
    pointers = {t.data_ptr() for t in case.arguments if t is not None}
    assert all(o.numel() == 0 or o.data_ptr() not in pointers for o in outputs)


def test_compiles_for_a_student_that_is_not_row_major(backend: str) -> None:
    case = make_case(6, 20, 16, 8)
    columns = case.student.T.contiguous().requires_grad_()

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        return ckd.contrastive_cross_entropy(x.T, *case.arguments[1:], backend=backend)

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    (result,) = torch.autograd.grad(compiled(columns), columns)
    (expected,) = torch.autograd.grad(loss_of(columns), columns)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_with_a_python_scale_that_changes(dynamic: bool | None, backend: str) -> None:
    torch._dynamo.reset()  # the recompilation limit also counts compilations for other backends
    case = make_case(6, 20, 16, 8)

    def loss_of(scale: float) -> torch.Tensor:
        return ckd.contrastive_cross_entropy(
            *case.arguments[:-1], logit_scale=scale, backend=backend
        )

    compiled = torch.compile(loss_of, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for scale in (5.0, 6.0, 7.5):
        torch.testing.assert_close(compiled(scale), loss_of(scale))


def test_an_ignored_row_that_holds_nan_reaches_no_gradient(backend: str) -> None:
    case = make_case(6, 20, 16, 8)
    case.target[2] = -100
    clean = case.requiring(*GRADIENTS)
    expected = oracle.gradients(clean, run(clean, backend, label_smoothing=0.1))
    case.student[2] = math.nan
    poisoned = case.requiring(*GRADIENTS)
    loss = run(poisoned, backend, label_smoothing=0.1)
    assert loss.isfinite()
    for name, value in oracle.gradients(poisoned, loss).items():
        torch.testing.assert_close(value, expected[name])
    assert (torch.autograd.grad(loss, poisoned.student)[0][2] == 0).all()
