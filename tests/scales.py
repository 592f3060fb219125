"""The contrastive cross-entropy at every scale, against eager float64 autograd."""

from __future__ import annotations

from dataclasses import replace

import torch

import ckd
from tests import oracle
from tests.oracle import GRADIENTS, Case, make_case
from tests.tolerance import within

# Around the ranges of 32-bit integers and of float32's digits, up to the largest.
SCALES = [1e-6, 1.0, 1e4, 2.0**30, 2.0**31, 2.5e9, 1e10, 1e15, 1e20, 1e30]
OTHER_SCALES = [1e-6, 2.0**31, 1e15]  # those of slow tests


def make_cases(shape: tuple[int, ...], copies: int) -> tuple[Case, Case]:
    """A case (bank [K, D], student width) whose bank has each row `copies` times, and the same with
    each row once: copies share the softmax, which adds log(copies) to loss and lse. At a large
    scale a rounding error decides between rows of close cosines: there are none."""
    case = make_case(60, *shape)
    table = oracle.logits(case.cast(torch.float64)) / case.logit_scale
    first, second = table.topk(2, 1).values.T
    apart = (first - second > 3e-3).nonzero().squeeze(1)[:20]
    once = replace(case, student=case.student[apart], target=case.target[apart])
    copy = torch.arange(20) % copies
    bank, target = once.bank.repeat(copies, 1), once.target + copy * len(once.bank)
    return replace(once, bank=bank, target=target), once


def check_at_scale(
    scale: float,
    case: Case,
    exact: Case,
    backend: str,
    *,
    extra: float = 0.0,
    limit: float = 6e-6,
    tested: str = "",
    **options: object,
) -> None:
    """Compare loss, lse and their gradients with those of `exact`, whose losses are `extra` less.
    Fixed limits: the model of roundings has no limit for a softmax whose exponents it rounds to
    multiples of 1000. The largest error measured is 2.9e-6 (emulated cuda, logit_scale at 1e-6);
    other machines round exponentials otherwise."""
    case = replace(case, logit_scale=torch.tensor(scale)).requiring(*GRADIENTS)
    exact = replace(exact, logit_scale=torch.tensor(scale)).cast(torch.float64)
    exact = exact.requiring(*GRADIENTS)
    results = ckd.contrastive_cross_entropy(
        *case.arguments, return_lse=True, backend=backend, **options
    )
    with torch.autocast(case.student.device.type, enabled=False):
        loss, _ = oracle.loss_and_lse(exact, **options)
        # The gradient of logsumexp is exp(l - lse), which loses even float64's digits here.
        own = oracle.logits(exact).gather(1, exact.target.unsqueeze(1)).squeeze(1)
        truths = loss, own + oracle.loss_and_lse(exact, reduction="none")[0]
        rows = torch.linspace(0.5, 1.5, len(case.student))
        more = extra * (len(rows) if options.get("reduction") == "sum" else 1)
        for about, result, truth, add in zip(("loss", "lse"), results, truths, (more, extra)):
            size = max(torch.linalg.vector_norm(truth + add).item(), 1.0)
            error = torch.linalg.vector_norm(result.double() - truth - add).item()
            within(error, limit * size, f"{about}, any scale", tested or backend)
            by = rows if result.dim() > 0 else torch.ones(())
            true_gradients = oracle.gradients(exact, (truth * by).sum())
            for name, value in oracle.gradients(case, (result * by).sum()).items():
                size = torch.linalg.vector_norm(true_gradients[name]).item()
                # Beside the gradients of single rows, which may cancel.
                size += 0.1 * (1.0 if name == "logit_scale" else scale)
                error = torch.linalg.vector_norm(value.double() - true_gradients[name]).item()
                within(error, limit * size, f"{name}, any scale", tested or backend)
