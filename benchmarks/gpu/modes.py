"""Calls of the op beside the plain one: each mode has to give the plain call's results."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import ckd
from common.workers import reason_of
from gpu.cases import Case, Shape, make_case
from gpu.device import Device

# A whole number of blocks, with tuned tiles; ragged, with the first candidate's tiles.
PAPER = Shape("1,000 classes", 256, 1000, 1024, 256)
TINY = Shape("tiny", 9, 37, 24, 40)
GRAPH_REPLAYS = 3
Step = Callable[[Case], list[Tensor]]


def check_mode(mode: str, backend: str, device: Device) -> list[str]:
    """The failed checks of a mode, in words."""
    case = make_case(TINY if device.rehearse else PAPER, device.name).with_leaves()
    return MODES[mode](case, _step(backend, device), device)


def _step(backend: str, device: Device) -> Step:
    """A function that computes loss and gradients in half precision."""

    def step(case: Case) -> list[Tensor]:
        loss = _loss(case, backend, device)
        return [loss.detach(), *torch.autograd.grad(loss, list(case.leaves().values()))]

    step.backend = backend  # type: ignore[attr-defined]
    return step


def _loss(case: Case, backend: str, device: Device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    with torch.autocast(device.name, dtype=dtype):
        loss: Tensor = ckd.contrastive_cross_entropy(
            *case.arguments,  # type: ignore[call-overload]
            backend=backend,
        )
    return loss


def _differences(found: list[Tensor], wanted: list[Tensor], most: float = 0.0) -> list[str]:
    """Messages for results that differ. `most`: the allowed relative difference; 0: equal bits."""
    names = ("loss", "student", "weight", "bias", "logit_scale")
    wrong = []
    for name, a, b in zip(names, found, wanted):
        size = torch.linalg.vector_norm(b.double()).item()
        difference = torch.linalg.vector_norm(a.double() - b.double()).item() / max(size, 1e-30)
        if not (torch.equal(a, b) if most == 0 else difference <= most):
            wrong.append(f"{name} differs by {difference:.1e}")
    return wrong


def stream(case: Case, step: Step, device: Device) -> list[str]:
    """On a side stream, while the current stream is busy."""
    wanted = step(case)
    if device.rehearse:
        return _differences(step(case), wanted)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    device.sleep(5)  # launches on the wrong stream come too late
    with torch.cuda.stream(side):
        found = step(case)
        copies = [x.clone() for x in found]
    side.synchronize()
    wrong = _differences(copies, wanted)
    device.sync()
    return wrong


def threads(case: Case, step: Step, device: Device) -> list[str]:
    """Two threads at once, each on its own stream; and the backward on autograd's own thread, for a
    student that is no leaf."""
    wanted = step(case)
    found: dict[int, list[Tensor]] = {}
    wrong: list[str] = []

    def work(number: int) -> None:
        side = contextlib.nullcontext() if device.rehearse else torch.cuda.stream(_stream())
        try:
            with side:
                found[number] = [x.clone() for x in step(case)]
            device.sync()
        except Exception as error:  # noqa: BLE001  # a thread loses its error
            wrong.append(f"a thread raised {reason_of(error)}")

    both = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in both:
        thread.start()
        if device.rehearse:  # Triton's interpreter is for one thread
            thread.join()
    for thread in both:
        thread.join()
    for results in found.values():
        wrong += _differences(results, wanted)
    backend = step.backend  # type: ignore[attr-defined]
    student = case.student.detach().clone().requires_grad_()
    loss = _loss(replace(case, student=student * 1), backend, device)
    loss.backward()
    assert student.grad is not None
    return wrong + _differences([loss.detach(), student.grad], wanted[:2])


def _stream() -> Any:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.default_stream())
    return side


def compiled(case: Case, step: Step, device: Device) -> list[str]:
    """torch.compile with fullgraph: the op within a larger graph, with two batch sizes."""
    backend = step.backend  # type: ignore[attr-defined]

    def plain(*arguments: Tensor) -> Tensor:
        loss: Tensor = ckd.contrastive_cross_entropy(*arguments, backend=backend)
        return 2 * loss

    how = "aot_eager" if device.rehearse else "inductor"
    quick = torch.compile(plain, fullgraph=True, backend=how)
    wrong = []
    for batch in (len(case.student), len(case.student) - 1):
        student = case.student.detach()[:batch].requires_grad_()
        part = replace(case, student=student, target=case.target[:batch])
        results: list[list[Tensor]] = []
        for function in (quick, plain):
            with torch.autocast(device.name, dtype=torch.bfloat16):
                loss = function(*part.arguments)  # type: ignore[arg-type]
            grads = torch.autograd.grad(loss, list(part.leaves().values()))
            results.append([loss.detach(), *grads])
        wrong += [f"batch {batch}: {text}" for text in _differences(results[0], results[1], 1e-5)]
    return wrong


def autocast(case: Case, step: Step, device: Device) -> list[str]:
    """Autocast to either half dtype: float32 loss, gradients in the inputs' dtypes, same values."""
    wanted, wrong = step(case), []
    backend = step.backend  # type: ignore[attr-defined]
    for dtype in (torch.float16, torch.bfloat16):
        loss = _loss(case, backend, device, dtype)
        grads = torch.autograd.grad(loss, list(case.leaves().values()))
        if loss.dtype != torch.float32:
            wrong.append(f"loss is {loss.dtype}")
        for (name, x), grad in zip(case.leaves().items(), grads):
            if grad.dtype != x.dtype:
                wrong.append(f"gradient of {name} is {grad.dtype}")
        wrong += _differences([loss.detach(), *grads], wanted)
    return wrong


def scaler(case: Case, step: Step, device: Device) -> list[str]:
    """GradScaler: a loss scaled by 2^16, unscaled gradients, then an optimizer step."""
    wanted = step(case)
    backend = step.backend  # type: ignore[attr-defined]
    leaves = list(case.leaves().values())
    scaler = torch.amp.GradScaler(device.name, init_scale=2.0**16)
    optimizer = torch.optim.SGD(leaves, lr=0.0)
    loss = _loss(case, backend, device, torch.float16)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grads = [x.grad for x in leaves if x.grad is not None]
    wrong = _differences([loss.detach(), *grads], wanted, most=1e-4)
    scaler.step(optimizer)
    scaler.update()
    if scaler.get_scale() != 2.0**16:
        wrong.append("the scaler found an infinite gradient")
    return wrong


def twice(case: Case, step: Step, device: Device) -> list[str]:
    """A second backward of one autograd graph."""
    loss = _loss(case, step.backend, device)  # type: ignore[attr-defined]
    leaves = list(case.leaves().values())
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    return _differences([loss, *second], [loss, *first])


def graph(case: Case, step: Step, device: Device) -> list[str]:
    """A CUDA graph of a whole step, replayed with new inputs in the same memory."""
    if device.rehearse:
        return _differences(step(case), step(case))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(case)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = step(case)
    wrong = []
    for seed in range(GRAPH_REPLAYS):
        other = make_case(case.shape, device.name, seed)
        with torch.no_grad():
            case.bank.copy_(other.bank)
            case.target.copy_(other.target)
            for name, x in case.leaves().items():
                x.copy_(getattr(other, name))
        for x in found:
            x.fill_(torch.nan)
        captured.replay()
        device.sync()
        copies = [x.clone() for x in found]
        wrong += [f"replay {seed}: {text}" for text in _differences(copies, step(case))]
    return wrong


MODES: dict[str, Callable[[Case, Step, Device], list[str]]] = {
    "graph": graph,
    "compiled": compiled,
    "stream": stream,
    "threads": threads,
    "autocast": autocast,
    "scaler": scaler,
    "twice": twice,
}
