"""torch.func on the ops: reverse mode is right, forward mode raises an error that names it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import ckd
from ckd.ops import _bypass
from tests import oracle
from tests.oracle import Case, make_case

Function = Callable[[Tensor], Tensor]


def functions(case: Case, backend: str) -> dict[str, tuple[Function, Function]]:
    """Scalar functions of the student, each by an op and by the oracle."""
    others = case.arguments[1:]
    without_target = (case.bank, case.weight, case.bias, case.logit_scale)
    slope = torch.randn(len(case.student), len(case.bank))

    def eager(student: Tensor) -> Case:
        return Case(student, *others)  # type: ignore[arg-type]

    def loss_and_lse(student: Tensor) -> Tensor:
        loss, lse = ckd.contrastive_cross_entropy(
            student, *others, return_lse=True, backend=backend
        )
        return loss + lse.sin().sum()

    def eager_loss_and_lse(student: Tensor) -> Tensor:
        loss, lse = oracle.loss_and_lse(eager(student))
        return loss + lse.sin().sum()

    rows = torch.randint(len(case.bank), (len(case.student), 3))
    weights = torch.rand(rows.shape).softmax(1)

    return {
        "weighted targets": (
            lambda x: ckd.contrastive_cross_entropy(
                x, case.bank, rows, *others[2:], target_weight=weights, backend=backend
            ),
            lambda x: (
                -(weights * oracle.logits(eager(x)).log_softmax(1).gather(1, rows)).sum(1).mean()
            ),
        ),
        "loss": (
            lambda x: ckd.contrastive_cross_entropy(x, *others, backend=backend),
            lambda x: oracle.loss_and_lse(eager(x))[0],
        ),
        "loss and lse": (loss_and_lse, eager_loss_and_lse),
        "similarity": (
            lambda x: (
                ckd.normalized_similarity(x, *without_target, backend=backend) * slope
            ).sum(),
            lambda x: (oracle.logits(eager(x)) * slope).sum(),
        ),
    }


REVERSE: dict[str, Callable[[Function, Tensor], Any]] = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.tensor(2.0))[0],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, x.flip(0)])),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(f))(torch.stack([x, 2 * x.flip(1)])),
    "grad and value": lambda f, x: torch.func.grad_and_value(f)(x)[0],
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap runs row after row
@pytest.mark.parametrize("transform", REVERSE)
def test_reverse_mode_is_right(transform: str, backend: str) -> None:
    case = make_case(4, 10, 8, 6)
    for name, (ours, theirs) in functions(case, backend).items():
        found, expected = (REVERSE[transform](f, case.student) for f in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_grad_of_every_input_is_that_of_backward(backend: str) -> None:
    case = make_case(4, 10, 8, 6).requiring(*oracle.GRADIENTS)

    def loss(student: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        moved = (student, case.bank, case.target, weight, bias, scale)
        return ckd.contrastive_cross_entropy(*moved, backend=backend)

    inputs = [getattr(case, name) for name in oracle.GRADIENTS]
    found = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*inputs)
    expected = torch.autograd.grad(loss(*inputs), inputs)
    for mine, theirs in zip(found, expected):
        assert torch.equal(mine, theirs)


def forward_mode(f: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dual = f(forward_ad.make_dual(x, torch.ones_like(x)))
        return forward_ad.unpack_dual(dual).tangent


FORWARD: dict[str, Callable[[Function, Tensor], Any]] = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "forward_ad": forward_mode,
    # Their error names jvp, whatever is asked for inside or outside of it.
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (x,)),
    "jvp of vmap": lambda f, x: torch.func.jvp(
        lambda y: torch.vmap(f)(torch.stack([y, y])), (x,), (x,)
    ),
    "jvp in vmap": lambda f, x: torch.vmap(lambda v: torch.func.jvp(f, (x,), (v,))[1])(x[None]),
    "jvp in grad": lambda f, x: torch.func.grad(lambda y: torch.func.jvp(f, (y,), (y,))[1])(x),
    "jacfwd twice": lambda f, x: torch.func.jacfwd(torch.func.jacfwd(f))(x),
    "jvp without grad": lambda f, x: torch.no_grad()(torch.func.jvp)(f, (x,), (x,)),
    "jvp by forward-mode strategy": lambda f, x: torch.autograd.functional.jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("transform", FORWARD)
def test_forward_mode_is_refused_by_name(transform: str, requires_grad: bool, backend: str) -> None:
    case = make_case(4, 10, 8, 6)
    x = case.student.requires_grad_(requires_grad)
    for ours, _ in functions(case, backend).values():
        ours(x)  # caches a plan, which the call under the transform must not use
        name = transform.split()[0]
        with pytest.raises(NotImplementedError, match=rf"ckd::.*{name}.*reverse mode"):
            FORWARD[transform](ours, x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", [*oracle.GRADIENTS, "bank"])
def test_forward_mode_is_refused_for_every_input(name: str, backend: str) -> None:
    case = make_case(4, 10, 8, 6)
    x = getattr(case, name)

    def loss(moved: Tensor) -> Tensor:
        return ckd.contrastive_cross_entropy(
            *replace(case, **{name: moved}).arguments, backend=backend
        )

    def similarity(moved: Tensor) -> Tensor:
        student, bank, _, *others = replace(case, **{name: moved}).arguments
        return ckd.normalized_similarity(student, bank, *others, backend=backend).sum()

    criterion = ckd.EmbeddingDistillationLoss(6, 8, backend=backend)

    def module(moved: Tensor) -> Tensor:
        new = replace(case, **{name: moved})
        parameters = {"weight": new.weight, "bias": new.bias, "log_logit_scale": new.logit_scale}
        inputs = (new.student, new.bank, new.target)
        return torch.func.functional_call(criterion, parameters, inputs)

    for function in (loss, similarity, module):
        function(x)
        for transform in ("jvp", "linearize", "forward_ad", "jvp of vmap"):
            with pytest.raises(NotImplementedError, match=r"ckd::.*jvp"):
                FORWARD[transform](function, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "jit.trace"])
def test_duals_from_outside_are_refused_when_compiled_or_traced(
    compiler: str, backend: str
) -> None:
    """torch does not look for them there: its own ops lose the tangents under inductor."""
    case = make_case(4, 10, 8, 6)
    for name in ("loss", "similarity"):
        ours, _ = functions(case, backend)[name]
        torch._dynamo.reset()
        if compiler == "jit.trace":
            compiled = torch.jit.trace(ours, (case.student,), check_trace=False)
        else:
            compiled = torch.compile(ours, backend=compiler)
        for _ in range(2):  # the first call of a compiled function runs under a dispatch mode
            with pytest.raises((NotImplementedError, RuntimeError), match=r"ckd::.*forward_ad"):
                forward_mode(compiled, case.student)
        with forward_ad.dual_level():
            assert torch.equal(compiled(case.student), ours(case.student))


@pytest.mark.parametrize("transform", ["jvp", "jacfwd"])
def test_forward_mode_is_refused_when_compiled(transform: str, backend: str) -> None:
    case = make_case(4, 10, 8, 6)
    for ours, _ in functions(case, backend).values():
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, f=ours: FORWARD[transform](f, x), backend="eager")
        with pytest.raises(NotImplementedError, match=rf"ckd::.*{transform}"):
            compiled(case.student)


def test_second_derivatives_are_refused_under_transforms(backend: str) -> None:
    case = make_case(4, 10, 8, 6)
    for ours, _ in functions(case, backend).values():
        twice = torch.func.grad(lambda x, f=ours: torch.func.grad(f)(x).sum())
        with pytest.raises(NotImplementedError, match="second derivatives"):
            twice(case.student)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_gradient_of_vmap_is_refused_with_the_remedy(backend: str) -> None:
    """vmap hides from the op that a gradient is asked for outside, so nothing is kept for it."""
    case = make_case(4, 10, 8, 6)
    loss, _ = functions(case, backend)["loss"]
    students = torch.stack([case.student, case.student.flip(0)]).requires_grad_()
    with pytest.raises(ValueError, match="take vmap of grad"):
        torch.vmap(loss)(students).sum().backward()
    with pytest.raises(ValueError, match="take vmap of grad"):
        torch.func.grad(lambda x: torch.vmap(loss)(x).sum())(students.detach())


def test_a_gradient_of_the_bank_is_refused_under_vmap_too(backend: str) -> None:
    case = make_case(4, 10, 8, 6)

    def losses(bank: Tensor) -> Tensor:
        arguments = replace(case, bank=bank).arguments
        return ckd.contrastive_cross_entropy(*arguments, backend=backend)

    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(ValueError, match="bank never receives a gradient"):
            transform(lambda x: torch.vmap(losses)(torch.stack([x, x])).sum())(case.bank)


def test_jvp_of_functionalize_is_refused(backend: str) -> None:
    case = make_case(4, 10, 8, 6)
    for ours, _ in functions(case, backend).values():
        ours(case.student)
        with pytest.raises(RuntimeError, match="Functionalize rule"):
            FORWARD["jvp"](torch.func.functionalize(ours), case.student)


def test_functionalize_sees_the_ops(backend: str) -> None:
    if not _bypass.is_enabled():
        pytest.skip("torch has no rule of an autograd.Function for it")
    case = make_case(4, 10, 8, 6)
    for ours, _ in functions(case, backend).values():
        assert torch.equal(torch.func.functionalize(ours)(case.student), ours(case.student))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces_contain_the_op_and_can_be_saved(backend: str, tmp_path: Path) -> None:
    case = make_case(4, 10, 8, 6)
    for name in ("loss", "similarity"):
        ours, _ = functions(case, backend)[name]
        traced = torch.jit.trace(ours, (case.student,), check_trace=False)
        torch.jit.save(traced, str(tmp_path / "trace.pt"))
        loaded = torch.jit.load(str(tmp_path / "trace.pt"))
        assert torch.equal(loaded(case.student), ours(case.student))
