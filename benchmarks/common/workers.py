"""Child processes that hold an object and call its methods, for all benchmarks.

Workers isolate memory, threads, malloc settings and CUDA contexts. One that runs out of memory,
crashes or hangs affects no other process, and the reason becomes its result. A sticky CUDA error
makes the GPU unusable for its process: here for one worker, and the next task gets a fresh one.

The parent sends (method, arguments, gives); the child answers (DONE, result) or (FAILED, reason). A
method called with `gives` gets a function `give` as its first argument, which sends (ITEM, item)
and blocks until the parent sends GO, so that processes can take turns.

torch is imported only to set threads: gpu_check.py reports a torch that cannot be imported.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

GO, ITEM, DONE, FAILED = "go", "item", "done", "failed"
KILLED, OUT_OF_MEMORY = "killed, out of memory?", "out of memory"
NO_MEMORY = (KILLED, OUT_OF_MEMORY)  # failures that are results; others are mistakes
STOPPING = 5.0  # seconds to wait for the end of a killed process
Result = dict[str, Any]


class Failed(Exception):
    """A worker's call failed; the message is the reason, in one line."""

    killed = False  # the process died of SIGKILL

    @property
    def result(self) -> str:
        """The reason for a table; SIGKILL suggests the out-of-memory killer of Linux."""
        return KILLED if self.killed else str(self)


class Worker:
    """A process that makes an object, `make(*arguments)`, on its first call and calls its methods.

    `threads`: torch's number of threads. Results and items arrive in the order of the calls.
    """

    def __init__(
        self, make: Callable[..., Any], *arguments: Any, threads: int | None = None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, child = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(child, make, arguments, threads), daemon=True
        )
        self._process.start()
        self._owed = 0  # answers not received yet
        child.close()

    def send(self, call: str, *arguments: Any, gives: bool = False) -> None:
        """Begin a call; `receive` gives its outcome, also if the process is dead."""
        self._owed += 1
        self._tell((call, arguments, gives))

    def go_on(self) -> None:
        """Let a method that is blocked in `give` continue."""
        self._tell(GO)

    def receive(self, seconds: float | None = None) -> tuple[str, Any]:
        """(ITEM, an item of the call) or (DONE, its result). Raises Failed with the reason if the
        call raised, the process died, or nothing came for `seconds` (which kills the process)."""
        try:
            if not self.pipe.poll(None if seconds is None else max(0.0, seconds)):
                self.kill()
                raise Failed(f"nothing came for {seconds:.0f} s")
            kind, content = self.pipe.recv()
        except (EOFError, OSError):
            raise self._death() from None
        self._owed -= kind != ITEM
        if kind == FAILED:
            raise Failed(content)
        return kind, content

    def ask(self, call: str, *arguments: Any, seconds: float | None = None) -> Any:
        """The result of a method, after those of pending calls. Raises Failed if any call did."""
        while self._owed > 0:
            self.receive(seconds)
        self.send(call, *arguments)
        return self.receive(seconds)[1]

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def stop(self, seconds: float = 10.0) -> None:
        """Let the process finish its call and end; kill it after `seconds`."""
        self.pipe.close()
        self._process.join(seconds)
        self.kill()

    def kill(self) -> None:
        if self._process.is_alive():
            self._process.kill()
            self._process.join(STOPPING)

    def _tell(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # a dead process is reported by `receive`
            self.pipe.send(message)

    def _death(self) -> Failed:
        self._process.join(STOPPING)
        code = self._process.exitcode
        by_signal = f"killed by signal {-code}" if code and code < 0 else ""
        failure = Failed(by_signal or f"died, exit status {code}")
        failure.killed = code == -signal.SIGKILL
        return failure


def _serve(
    pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...], threads: int | None
) -> None:
    def give(item: Any = None) -> None:
        pipe.send((ITEM, item))
        pipe.recv()

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    held: Any = None
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        while True:
            call, values, gives = pipe.recv()
            try:
                held = make(*arguments) if held is None else held
                method = getattr(held, call)
                answer = (DONE, method(give, *values) if gives else method(*values))
            except Exception as error:  # noqa: BLE001  # any error is the call's result
                traceback.print_exc()
                answer = (FAILED, reason_of(error))
            pipe.send(answer)


def reason_of(error: BaseException) -> str:
    """The error in one line; OUT_OF_MEMORY where memory ran out."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    lost = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return OUT_OF_MEMORY if lost or "allocate memory" in text else text[:200]


class _Function:
    """The object of a worker that calls one function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def call(self, give: Callable[..., None], *arguments: Any) -> Any:
        return self._function(give, *arguments)

    def items(self, give: Callable[..., None], task: Any) -> None:
        for item in self._function(task):
            give(item)


class Process(Worker):
    """A worker that runs `task(turn_over, *arguments)`, only while `proceed` waits for it; with
    `set_up` it begins before.

    The task calls `turn_over()` where its turn may end; the call blocks until the next turn.
    """

    def __init__(self, task: Callable[..., Result], *arguments: Any, threads: int) -> None:
        super().__init__(_Function, task, threads=threads)
        self._arguments = arguments
        self._ahead = False

    def set_up(self) -> None:
        """Begin now, beside other processes: run to the first turn, which `proceed` waits for."""
        self._ahead = True
        self.send("call", *self._arguments, gives=True)

    def proceed(self) -> Result | None:
        """Run until the turn ends (None) or the task does: its result, or {"failed": reason}."""
        try:
            if self._ahead:
                self._ahead = False
            elif self._owed:
                self.go_on()
            else:
                self.send("call", *self._arguments, gives=True)
            kind, content = self.receive()
        except Failed as failure:
            kind, content = FAILED, {"failed": failure.result}
        except BaseException:
            self.kill()
            raise
        if kind == ITEM:
            return None
        self.stop()  # frees its memory for the others
        return content


def finish(process: Process) -> Result:
    """The result of a process that runs alone."""
    while (result := process.proceed()) is None:
        pass
    return result


def take_turns(
    start: Mapping[str, Callable[[], Process]], together: bool = False
) -> dict[str, Result]:
    """The results of processes that take turns, so that changes in the machine's speed affect all
    alike. One that runs out of memory beside the others is tried again alone.

    together: all are set up at the same time, which needs cores and memory for all.
    """
    running = {name: begin() for name, begin in start.items()}
    if together:
        for process in running.values():
            process.set_up()
    results: dict[str, Result] = {}
    while running:
        for name, process in list(running.items()):
            result = process.proceed()
            if result is not None:
                results[name] = result
                del running[name]
    for name, result in results.items():
        if result.get("failed") in NO_MEMORY:
            results[name] = finish(start[name]())
    return {name: results[name] for name in start}


def each(
    function: Callable[[Any], Iterator[Any]], tasks: Sequence[Any], workers: int, patience: float
) -> Iterator[tuple[Any, Any]]:
    """Yield (task, item) for every item of `function(task)`, tasks in any order, in up to `workers`
    processes; (task, Failed) if a task raised, died or gave nothing for `patience` seconds."""
    waiting, idle = list(tasks), list[Worker]()
    running: dict[Connection, tuple[Worker, Any, float]] = {}  # with the next answer's deadline
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                worker, task = idle.pop() if idle else Worker(_Function, function), waiting.pop(0)
                worker.send("items", task, gives=True)
                running[worker.pipe] = worker, task, time.monotonic() + patience
            ready = wait(list(running), timeout=1.0)
            now = time.monotonic()
            for pipe in [p for p, (_, _, end) in running.items() if p in ready or now > end]:
                worker, task, _ = running.pop(pipe)
                try:
                    if pipe not in ready:
                        raise Failed(f"nothing came for {patience:.0f} s")
                    kind, item = worker.receive()
                except Failed as failure:
                    worker.kill()  # its CUDA context may be unusable
                    yield task, failure
                    continue
                if kind == DONE:
                    idle.append(worker)
                    continue
                worker.go_on()
                running[worker.pipe] = worker, task, time.monotonic() + patience
                yield task, item
    finally:
        for worker in [*idle, *(worker for worker, _, _ in running.values())]:
            worker.kill()
