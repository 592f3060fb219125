"""Turns Ctrl-C and SIGTERM into a flag that the loop polls, so that every step is completed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Yield `asked()`: True once SIGINT or SIGTERM has come. A second one raises KeyboardInterrupt.

    Outside the main thread, where Python allows no handlers, `asked()` stays False.
    """
    received: list[int] = []
    owner = os.getpid()

    def handler(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a data worker, which inherits the handler when it is forked
            if number == signal.SIGTERM:
                os._exit(1)
            return  # Ctrl-C reaches the whole process group; the current batch is still needed
        if received:
            raise KeyboardInterrupt
        received.append(number)
        # os.write: a print here could interrupt another print.
        os.write(2, b"\nstopping after this step; once more to stop at once\n")

    def asked() -> bool:
        return bool(received)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    previous = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
