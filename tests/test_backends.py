"""The choice of a backend: by `auto`, by name, and the reasons that are reported."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch

import ckd
from ckd import backends
from ckd.backends import cuda, reference
from ckd.backends.device import Gpu
from ckd.backends.interface import Problem


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 4), torch.randn(5, 4)


def test_auto_takes_the_first_that_serves_and_says_why_the_others_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picky = types.SimpleNamespace(unsupported=lambda p: f"{p.batch} rows are too few")
    monkeypatch.setattr(backends, "ORDER", {"picky": picky, "reference": reference})
    explanation = backends.explain(*tensors())
    assert explanation.chosen == "reference"
    assert explanation.reasons["picky"] == "3 rows are too few"
    assert "picky: 3 rows are too few" in str(explanation)
    with pytest.raises(backends.BackendError, match="3 rows are too few"):
        ckd.normalized_similarity(*tensors(), backend="picky")


def test_no_backend_that_serves_is_an_error_with_every_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no = types.SimpleNamespace(unsupported=lambda p: "not today")
    monkeypatch.setattr(backends, "ORDER", {"a": no, "b": no})
    with pytest.raises(backends.BackendError, match="a: not today; b: not today"):
        ckd.normalized_similarity(*tensors())


def test_cache_limit_bounds_what_a_forward_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    module = backends.ORDER["reference"]

    def keep(problem: backends.Problem) -> int:
        sizes.append(problem.cache_limit)
        return 0

    monkeypatch.setattr(module, "contrastive_ce_cache_bytes", keep)
    student, bank = tensors()
    weight = torch.eye(4, requires_grad=True)
    for limit in (0, 1 << 30):
        backends.set_cache_limit(limit)
        assert backends.cache_limit() == limit
        target = torch.tensor([0, 1, 2])
        ckd.contrastive_cross_entropy(student, bank, target, weight, backend="reference")
    assert sizes == [0, 1 << 30]


def test_both_ways_of_permitting_less_than_float32_are_read() -> None:
    """Each in its own process: once the newer settings are used, torch refuses the older ones."""
    old = "torch.set_float32_matmul_precision('medium')"
    new = "torch.backends.cuda.matmul.fp32_precision = 'tf32'; "
    new += "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'"
    expected = {"pass": "ieee ieee", old: "tf32 bf16"}
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        expected[new] = "tf32 bf16"
    for setting, answer in expected.items():
        code = "import torch, ckd; from ckd.backends.precision import float32_products as f\n"
        code += setting + "\n"
        code += "print(f('cuda'), f('cpu')); x = torch.ones(2, 3); ckd.normalized_similarity(x, x)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == answer, done.stderr


def test_forward_and_backward_use_the_same_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = backends.ORDER["reference"]

    def record(name: str) -> object:
        def call(*args: object, **kwargs: object) -> object:
            calls.append(name)
            return getattr(real, name)(*args, **kwargs)

        return call

    names = ("contrastive_ce_cache_bytes", "contrastive_ce_forward", "contrastive_ce_backward")
    other = types.SimpleNamespace(unsupported=lambda p: None, **{n: record(n) for n in names})
    monkeypatch.setattr(backends, "ORDER", {"other": other, **backends.ORDER})
    student, bank = tensors()
    student.requires_grad_()
    loss = ckd.contrastive_cross_entropy(student, bank, torch.tensor([0, 1, 2]))
    monkeypatch.setattr(backends, "ORDER", {"reference": real, "other": other})
    loss.backward()
    assert calls == ["contrastive_ce_forward", "contrastive_ce_backward"]


def test_explanation_covers_every_name_of_the_api() -> None:
    assert set(backends.explain(*tensors()).reasons) >= {"cuda", "triton", "cpu", "reference"}
    assert "reference" in backends.available()


def test_cuda_asks_the_tensors_own_gpu_for_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two GPUs, where the current one is too old and the tensors' own is not."""
    capabilities = {None: (7, 5), 0: (7, 5), 1: (9, 0)}
    monkeypatch.setattr(cuda, "_missing", None)
    monkeypatch.setattr(cuda, "gpu", Gpu())
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    problem = Problem.of("contrastive_ce", *tensors(), None)._replace(device_type="cuda")
    assert cuda.unsupported(problem._replace(device_index=1)) is None
    reason = cuda.unsupported(problem._replace(device_index=0))
    assert reason == "the GPU is of compute capability 7.5; the kernels need 8.0"


def test_cuda_does_not_call_an_earlier_failure_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """An illegal address (700) comes from a kernel that ran earlier, "no kernel image" (209) from
    the launch itself."""
    module = types.SimpleNamespace(
        cuda_error=lambda error: f"error {error}",
        cuda_error_is_of_earlier_work=lambda error: error == 700,
    )
    monkeypatch.setattr(cuda, "_C", module)
    text = cuda._start_failed(torch.device("cuda:0"), 209)
    assert text.startswith(
        "a kernel of ckd could not be started on cuda:0: error 209 (cudaError 209)"
    )
    text = cuda._start_failed(torch.device("cuda:0"), 700)
    assert "a kernel of ckd" not in text
    assert "before this call, by any library" in text
