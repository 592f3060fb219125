"""Processes of their own for what may crash or hang, so that it takes nothing else along.

A sticky CUDA error ends a whole process's use of the GPU; here it ends one worker's, and the next
task gets a fresh one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from gpu.job import reason_of

ITEM, DONE, FAILED = "item", "done", "failed"
STOPPING = 5.0  # seconds in which a worker that was killed has to end


class Failed(Exception):
    """What was asked of a worker could not be done; the message is the reason, in one line."""


class Worker:
    """A process that holds `make(*arguments)` and calls its methods."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, make, arguments), daemon=True)
        self._process.start()
        self._owed = 0  # answers to calls that were sent
        child.close()

    def send(self, call: str, *arguments: Any) -> None:
        """Begins a call; `receive` has its outcome. Raises Failed if the process is dead."""
        try:
            self.pipe.send((call, arguments))
        except (OSError, ValueError):
            raise Failed(self._death()) from None
        self._owed += 1

    def receive(self, seconds: float) -> tuple[str, Any]:
        """(ITEM, what the call yielded) or (DONE, what it returned). Raises Failed with the reason
        if the call raised, the process died, or nothing came for so long (then it is killed)."""
        if not self.pipe.poll(max(0.0, seconds)):
            self.kill()
            raise Failed(f"nothing came for {seconds:.0f} s")
        try:
            kind, content = self.pipe.recv()
        except (EOFError, OSError):
            raise Failed(self._death()) from None
        self._owed -= kind != ITEM
        if kind == FAILED:
            raise Failed(content)
        return kind, content

    def ask(self, call: str, *arguments: Any, seconds: float) -> Any:
        """What a method returns, after all that was sent before. Raises Failed, of that too."""
        while self._owed > 0:
            self.receive(seconds)
        self.send(call, *arguments)
        return self.receive(seconds)[1]

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        if self._process.is_alive():
            self._process.kill()
            self._process.join(STOPPING)

    def _death(self) -> str:
        self._process.join(STOPPING)
        code = self._process.exitcode
        return f"killed by signal {-code}" if code and code < 0 else f"died, exit status {code}"


class _Function:
    """What a worker of `each` holds."""

    def __init__(self, function: Callable[[Any], Iterator[Any]]) -> None:
        self._function = function

    def items(self, task: Any) -> Iterator[Any]:
        return self._function(task)


def each(
    function: Callable[[Any], Iterator[Any]], tasks: Sequence[Any], workers: int, patience: float
) -> Iterator[tuple[Any, Any]]:
    """(task, item) for every item that `function(task)` yields, in some order, from so many
    processes at a time; (task, Failed) where a task raised, died or gave nothing for `patience`
    seconds."""
    waiting, idle = list(tasks), list[Worker]()
    running: dict[Connection, tuple[Worker, Any, float]] = {}  # until when something has to come
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                worker, task = idle.pop() if idle else Worker(_Function, function), waiting.pop(0)
                try:
                    worker.send("items", task)
                except Failed as failure:
                    yield task, failure
                    continue
                running[worker.pipe] = worker, task, time.monotonic() + patience
            ready = wait(list(running), timeout=1.0)
            now = time.monotonic()
            for pipe in [p for p, (_, _, end) in running.items() if p in ready or now > end]:
                worker, task, _ = running.pop(pipe)
                if pipe not in ready:
                    worker.kill()
                    yield task, Failed(f"nothing came for {patience:.0f} s")
                    continue
                try:
                    kind, item = worker.receive(0)
                except Failed as failure:
                    worker.kill()  # its GPU may be lost to it
                    yield task, failure
                    continue
                if kind == DONE:
                    idle.append(worker)
                    continue
                running[worker.pipe] = worker, task, time.monotonic() + patience
                yield task, item
    finally:
        for worker in [*idle, *(worker for worker, _, _ in running.values())]:
            worker.kill()


def _serve(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    held: Any = None
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        while True:
            call, values = pipe.recv()
            try:
                held = make(*arguments) if held is None else held
                result = getattr(held, call)(*values)
                if isinstance(result, Iterator):
                    for item in result:
                        pipe.send((ITEM, item))
                    result = None
                answer = (DONE, result)
            except Exception as error:  # noqa: BLE001  # whatever it raises is its result
                traceback.print_exc()
                answer = (FAILED, reason_of(error))
            pipe.send(answer)
