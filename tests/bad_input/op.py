"""Bad arguments of the ops, the loss module and the choice of a backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ckd
from ckd.backends import BackendError
from tests.bad_input import Case

B, K, D, W = 4, 7, 6, 5


def arguments(**changed: Any) -> dict[str, Any]:
    """A valid call, with some arguments replaced."""
    valid = {
        "student": torch.randn(B, W),
        "bank": torch.randn(K, D).half(),
        "target": torch.tensor([0, 1, 2, 6]),
        "weight": torch.randn(W, D),
        "bias": torch.randn(W),
    }
    return valid | changed


def loss(**changed: Any) -> Callable[[Path], Any]:
    return lambda _: ckd.contrastive_cross_entropy(**arguments(**changed))


def similarity(**changed: Any) -> Callable[[Path], Any]:
    def call(_: Path) -> Any:
        given = arguments(**changed)
        del given["target"]
        return ckd.normalized_similarity(**given)

    return call


def top_k(k: Any = 3, **changed: Any) -> Callable[[Path], Any]:
    def call(_: Path) -> Any:
        given = arguments(**changed)
        del given["target"]
        return ckd.top_k(k=k, **given)

    return call


def module(*args: Any, **kwargs: Any) -> Callable[[Path], Any]:
    return lambda _: ckd.EmbeddingDistillationLoss(*args, **kwargs)


def second_derivative(_: Path) -> Any:
    given = arguments()
    student = given.pop("student").requires_grad_()
    (d,) = torch.autograd.grad(
        ckd.contrastive_cross_entropy(student, **given), student, create_graph=True
    )
    d.sum().backward()


CASES = [
    Case("student is no tensor", loss(student=[[1.0]]), TypeError, ("student", "list")),
    Case("student rank", loss(student=torch.randn(W)), ValueError, ("student", "[B, W]", "[5]")),
    Case(
        "student dtype",
        loss(student=torch.ones(B, W, dtype=torch.int64)),
        ValueError,
        ("student", "float32", "int64", "student.to("),
    ),
    Case("bank rank", loss(bank=torch.randn(K, D, 1)), ValueError, ("bank", "[K, D]", "[7, 6, 1]")),
    Case(
        "bank dtype",
        loss(bank=torch.randn(K, D, dtype=torch.float64)),
        ValueError,
        ("bank", "float16, bfloat16 or float32", "float64", "bank.to("),
    ),
    Case(
        "bank device",
        loss(bank=torch.randn(K, D, device="meta")),
        ValueError,
        ("bank", "on cpu", "on meta", 'bank.to("cpu"'),
    ),
    Case(
        "bank wants a gradient",
        loss(bank=torch.randn(K, D, requires_grad=True)),
        ValueError,
        ("bank", "gradient", "bank.detach()"),
    ),
    Case("bank empty", loss(bank=torch.randn(0, D)), ValueError, ("bank", "at least one row")),
    Case(
        "target of probabilities",
        loss(target=torch.rand(B, K)),
        ValueError,
        ("target", "[4, 7]", "float32", "probabilities.topk(M)"),
    ),
    Case(
        "target rank",
        loss(target=torch.zeros(B, 1, 1).long()),
        ValueError,
        ("target", "[B] or [B, M]", "[4, 1, 1]"),
    ),
    Case("targets, none", loss(target=torch.zeros(B, 0).long()), ValueError, ("target", "[4, 0]")),
    Case(
        "targets, one out of range",
        loss(target=torch.tensor([[0, 1], [2, 9], [3, 4], [5, 6]])),
        IndexError,
        ("target[1] = 9", "7 rows"),
    ),
    Case(
        "ignore_index that marks wrong weights",
        loss(ignore_index=-(1 << 63)),
        ValueError,
        ("ignore_index", "above"),
    ),
    Case(
        "target_weight shape",
        loss(target=torch.zeros(B, 2).long(), target_weight=torch.ones(B, 3)),
        ValueError,
        ("target_weight", "[4, 2]", "[4, 3]"),
    ),
    Case(
        "target_weight of one target",
        loss(target_weight=torch.ones(B, 2)),
        ValueError,
        ("target_weight", "[4]", "[4, 2]"),
    ),
    Case(
        "target_weight dtype",
        loss(target=torch.zeros(B, 2).long(), target_weight=torch.ones(B, 2).long()),
        ValueError,
        ("target_weight", "float32", "int64"),
    ),
    Case("target_weight type", loss(target_weight=[1.0]), TypeError, ("target_weight", "list")),
    Case(
        "target_weight with a gradient",
        loss(target_weight=torch.ones(B, requires_grad=True)),
        ValueError,
        ("target_weight", "detach()"),
    ),
    Case(
        "target_weight negative",
        loss(target_weight=torch.tensor([1.0, -1.0, 1.0, 1.0])),
        ValueError,
        ("target_weight[1]", "at least 0"),
    ),
    Case(
        "target_weight that is not finite",
        loss(target=torch.zeros(B, 2).long(), target_weight=torch.full((B, 2), math.nan)),
        ValueError,
        ("target_weight[0]", "finite"),
    ),
    Case(
        "target length",
        loss(target=torch.zeros(B + 1).long()),
        ValueError,
        ("target", "[4]", "[5]"),
    ),
    Case(
        "target dtype",
        loss(target=torch.zeros(B, dtype=torch.int32)),
        ValueError,
        ("target", "int64", "int32", "target.to("),
    ),
    Case(
        "target device",
        loss(target=torch.zeros(B, dtype=torch.int64, device="meta")),
        ValueError,
        ("target", "cpu", "meta"),
    ),
    Case(
        "target too large",
        loss(target=torch.tensor([0, 1, 7, 2])),
        IndexError,
        ("target[2] = 7", "7 rows", "ignore_index"),
    ),
    Case(
        "target negative",
        loss(target=torch.tensor([0, -1, 0, 2])),
        IndexError,
        ("target[1] = -1", "0 <= target < 7"),
    ),
    Case("weight rank", loss(weight=torch.randn(D)), ValueError, ("weight", "[W, D]", "[6]")),
    Case(
        "weight width",
        loss(weight=torch.randn(W, D + 1)),
        ValueError,
        ("weight", "[5, 6]", "[5, 7]"),
    ),
    Case(
        "student width",
        loss(student=torch.randn(B, W + 1)),
        ValueError,
        ("student must", "weight [5, 6]", "[B, 5]", "[4, 6]"),
    ),
    Case(
        "weight transposed",
        loss(weight=torch.randn(D, W)),
        ValueError,
        ("weight", "[5, 6]", "[6, 5]"),
    ),
    Case(
        "weight dtype",
        loss(weight=torch.ones(W, D, dtype=torch.int8)),
        ValueError,
        ("weight", "int8", "float32"),
    ),
    Case("bias shape", loss(bias=torch.randn(D)), ValueError, ("bias", "[5]", "[6]")),
    Case("bias dtype", loss(bias=torch.zeros(W).long()), ValueError, ("bias", "int64")),
    Case("bias without weight", loss(weight=None), ValueError, ("bias", "weight")),
    Case(
        "widths differ without a projection",
        loss(weight=None, bias=None),
        ValueError,
        ("bank", "student", "[7, 6]", "[4, 5]", "weight"),
    ),
    Case("scale zero", loss(logit_scale=0.0), ValueError, ("logit_scale", "> 0", "0.0")),
    Case("scale negative", loss(logit_scale=-2), ValueError, ("logit_scale", "> 0", "-2")),
    Case("scale nan", loss(logit_scale=math.nan), ValueError, ("logit_scale", "finite", "nan")),
    Case(
        "scale tensor inf",
        loss(logit_scale=torch.tensor(math.inf)),
        ValueError,
        ("logit_scale", "finite", "inf"),
    ),
    Case(
        "scale tensor zero", loss(logit_scale=torch.zeros(())), ValueError, ("logit_scale", "> 0")
    ),
    Case(
        "scale tensor rank",
        loss(logit_scale=torch.ones(1)),
        ValueError,
        ("logit_scale", "0-dim", "[1]", "squeeze"),
    ),
    Case("scale type", loss(logit_scale="14"), TypeError, ("logit_scale", "str")),
    Case("smoothing", loss(label_smoothing=1.5), ValueError, ("label_smoothing", "[0, 1]", "1.5")),
    Case(
        "reduction",
        loss(reduction="avg"),
        ValueError,
        ("reduction", "'avg'", "mean", "sum", "none"),
    ),
    Case(
        "backend unknown",
        loss(backend="refrence"),
        ValueError,
        ("backend", "'refrence'", "nearest first: reference"),
    ),
    Case("backend elsewhere", loss(backend="cuda"), BackendError, ("'cuda'", "not on cuda")),
    Case("second derivative", second_derivative, RuntimeError, ("contrastive_ce_backward",)),
    Case("similarity bank dtype", similarity(bank=torch.ones(K, D).int()), ValueError, ("bank",)),
    Case("similarity scale", similarity(logit_scale=-1.0), ValueError, ("logit_scale", "> 0")),
    Case(
        "similarity scale tensor",
        similarity(logit_scale=torch.tensor(-1.0)),
        ValueError,
        ("logit_scale", "> 0"),
    ),
    Case("loss module dims", module(0, 8), ValueError, ("student_dim", "0")),
    Case(
        "loss module without projection",
        module(4, 8, projection=False),
        ValueError,
        ("projection=False", "4", "8"),
    ),
    Case(
        "loss module scale above the maximum",
        module(4, 8, logit_scale=200.0),
        ValueError,
        ("logit_scale", "max_logit_scale = 100.0", "200.0"),
    ),
    Case("loss module reduction", module(4, 8, reduction="avg"), ValueError, ("'avg'", "mean")),
    Case("ignore_index type", loss(ignore_index=None), TypeError, ("ignore_index", "NoneType")),
    Case("reduction None", loss(reduction=None), ValueError, ("reduction", "None", "mean")),
    Case(
        "weight too wide",
        loss(weight=torch.randn(W, D, dtype=torch.float64)),
        ValueError,
        ("weight", "float64", "torch.float32)"),
    ),
    Case(
        "negative cache limit",
        lambda _: ckd.backends.set_cache_limit(-1),
        ValueError,
        ("limit", "bytes", "-1"),
    ),
    Case(
        "explain another op",
        lambda _: ckd.backends.explain(torch.ones(2, 2), torch.ones(2, 2), op="contrastive"),
        ValueError,
        ("op", "'contrastive'", "contrastive_ce"),
    ),
    Case(
        "explain a vector",
        lambda _: ckd.backends.explain(torch.ones(2), torch.ones(2, 2)),
        ValueError,
        ("student", "two dimensions", "[2]"),
    ),
    Case("top_k beyond the bank", top_k(8), ValueError, ("k must be", "1 to the 7 rows", "got 8")),
    Case("top_k of no row", top_k(0), ValueError, ("k must be", "got 0")),
    Case("top_k of a truth", top_k(True), ValueError, ("k must be", "got True")),
    Case("top_k of a part", top_k(2.0), TypeError, ("k must be an int", "float")),
    Case("top_k of a list", top_k(student=[[1.0]]), TypeError, ("student", "list")),
    Case(
        "top_k without a projection",
        top_k(weight=None, bias=None),
        ValueError,
        ("same width", "pass weight"),
    ),
]
