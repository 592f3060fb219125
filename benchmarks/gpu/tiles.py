"""Rung 7: times every candidate (tiles) of every Triton kernel on three sizes, to order the table.

`ckd._triton.tuning.choose` is replaced by functions that launch and time all candidates. The sizes
compile in parallel and are timed one after the other. A step with each candidate has to agree with
a step with the first.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import torch

import ckd
from common.workers import Failed, Worker, reason_of
from gpu.device import Device
from gpu.job import Job, NotHere, Record
from loss.problem import Inputs, Problem, make_inputs

SIZES = {
    "large, W 256": Problem(4096, 262_144, 1024, 256),
    "large, W 128": Problem(4096, 262_144, 1024, 128),
    "small, W 256": Problem(256, 1000, 1024, 256),
}
TINY = {"tiny": Problem(9, 70, 24, 40)}
CALLS = 9
PATIENCE = 60.0
AGREE = (
    2e-3  # relative difference of a loss or gradient for another order of sums, in half precision
)
Answer = Callable[[Any, Sequence[Any], Callable[[Any], None]], Any]


def run(job: Job) -> None:
    device = Device.of(job)
    reason = device.missing("triton")
    if reason is not None:
        raise NotHere(f"backend triton cannot run: {reason}")
    sizes = TINY if job.rehearse else SIZES
    workers = {name: Worker(Timer, device, problem) for name, problem in sizes.items()}
    try:
        for worker in workers.values():
            worker.send("compile")
        for name, worker in workers.items():
            try:
                worker.receive(min(PATIENCE, job.left))
            except Failed as failure:
                job.wrong(f"{name}, compiling: {failure}")
        for name, worker in workers.items():
            try:
                rows = worker.ask("measure", seconds=min(PATIENCE, job.left))
                for row in rows:
                    job.row(size=name, **row)
                job.packed(f"{name}:", best(rows))
                for text in worker.ask("disagreements", seconds=min(PATIENCE, job.left)):
                    job.wrong(f"{name}: {text}")
            except Failed as failure:
                job.wrong(f"{name}: {failure}")
    finally:
        for worker in workers.values():
            worker.kill()


def best(rows: list[Record]) -> list[str]:
    """A text per kernel: its fastest candidate, and how much slower the first is."""
    texts = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        timed = [row for row in rows if row["kernel"] == kernel and "us" in row]
        if not timed:
            texts.append(f"{kernel}: none fits")
            continue
        fastest = min(timed, key=lambda row: row["us"])
        first = next((row["us"] for row in timed if row["place"] == 0), float("inf"))
        text = f"{kernel} {fastest['candidate']} {fastest['us']:.0f} us"
        if fastest["place"] > 0:
            text += f" (first +{first / fastest['us'] - 1:.0%})"
        texts.append(f"{text} of {len(timed)}")
    return texts


@dataclass
class Timer:
    """Compiles and times the candidates for one size, in a worker."""

    device: Device
    problem: Problem
    _inputs: Inputs | None = None

    def __post_init__(self) -> None:
        self.device.set_up()
        self._inputs = make_inputs(self.problem, self.device.name)
        self._most = 1  # most candidates of a kernel

    def compile(self) -> None:
        """Launch every candidate once. One that does not fit the GPU is no error here."""

        def answer(key: Any, candidates: Sequence[Any], launch: Callable[[Any], None]) -> Any:
            self._most = max(self._most, len(candidates))
            return self._candidates(candidates, launch)[0]

        self._step(answer)

    def measure(self) -> list[Record]:
        """A row for each candidate of each kernel, the fastest first: the median time of some
        launches, or the reason why there is none."""
        rows: list[Record] = []
        seen = set()

        def answer(key: Any, candidates: Sequence[Any], launch: Callable[[Any], None]) -> Any:
            kernel = str(key[0] if isinstance(key, tuple) and key else key)
            able = self._candidates(candidates, launch)
            for place, candidate in enumerate(candidates):
                if str(key) in seen:
                    break
                row = {"kernel": kernel, "place": place, "candidate": in_short(candidate)}
                why = self._fits(launch, candidate)
                if why is None:
                    run = functools.partial(launch, candidate)
                    row["us"] = 1e3 * statistics.median(self.device.times_ms(run, CALLS))
                else:
                    row["failed"] = why
                rows.append(row)
            seen.add(str(key))
            return able[0]

        self._step(answer)
        order = list(dict.fromkeys(row["kernel"] for row in rows))
        return sorted(rows, key=lambda row: (order.index(row["kernel"]), row.get("us", 1e30)))

    def disagreements(self) -> list[str]:
        """Messages for steps with later candidates that differ from a step with the first."""
        wrong, names = [], ("loss", "student", "weight", "bias", "scale")
        wanted = self._step(self._by_place(0))
        for place in range(1, self._most):
            for name, a, b in zip(names, self._step(self._by_place(place)), wanted):
                size = torch.linalg.vector_norm(b.double()).item()
                away = torch.linalg.vector_norm(a.double() - b.double()).item() / max(size, 1e-30)
                if not away <= AGREE:
                    wrong.append(f"candidate {place}: {name} differs by {away:.1e} from the first")
        return wrong

    def _by_place(self, place: int) -> Answer:
        def answer(key: Any, candidates: Sequence[Any], launch: Callable[[Any], None]) -> Any:
            able = self._candidates(candidates, launch)
            return able[min(place, len(able) - 1)]

        return answer

    def _candidates(self, candidates: Sequence[Any], launch: Callable[[Any], None]) -> list[Any]:
        """The candidates that can be launched."""
        able = [c for c in candidates if self._fits(launch, c) is None]
        if not able:
            raise RuntimeError(f"none of the candidates fits: {self._fits(launch, candidates[0])}")
        return able

    def _fits(self, launch: Callable[[Any], None], candidate: Any) -> str | None:
        """The reason why a candidate cannot be launched, or None."""
        try:
            launch(candidate)
        except Exception as error:  # noqa: BLE001  # Triton raises many kinds
            return reason_of(error)
        return None

    def _step(self, answer: Answer) -> list[torch.Tensor]:
        inputs = self._inputs
        assert inputs is not None
        with answered(answer), torch.autocast(self.device.name, dtype=torch.bfloat16):
            loss = ckd.contrastive_cross_entropy(
                inputs.student,
                inputs.bank,
                inputs.target,
                inputs.weight,
                inputs.bias,
                inputs.logit_scale,
                backend="triton",
            )
            gradients = torch.autograd.grad(loss, inputs.leaves)
        self.device.sync()
        return [loss.detach(), *gradients]


@contextmanager
def answered(answer: Answer) -> Iterator[None]:
    """Replace `tuning.choose`, which picks a kernel's candidate, by `answer`."""
    from ckd._triton import tuning

    original = tuning.choose
    tuning.choose = answer
    try:
        yield
    finally:
        tuning.choose = original


def in_short(candidate: Any) -> str:
    """Sizes, then warps and stages: 128x64x256x64x1 w8 s2."""
    if not is_dataclass(candidate) or isinstance(candidate, type):
        return str(candidate)
    values = asdict(candidate)
    warps, stages = values.pop("warps", "?"), values.pop("stages", "?")
    return f"{'x'.join(map(str, values.values()))} w{warps} s{stages}"
