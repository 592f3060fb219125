"""Tasks for the workers of benchmarks in tests; few imports, so that workers start quickly."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator


def some_items(task: str) -> Iterator[str]:
    yield f"{task} begins"
    if task == "raises":
        raise RuntimeError("no such kernel")
    if task == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "hangs":
        time.sleep(600)
    yield f"{task} ends"


class Counter:
    """The object of a worker."""

    def __init__(self, count: int) -> None:
        if count < 0:
            raise ValueError(f"count must be at least 0, got {count}\nand more")
        self.count = count

    def add(self, number: int) -> int:
        self.count += number
        return self.count

    def die(self, number: int) -> None:
        os.kill(os.getpid(), number)

    def hang(self) -> None:
        time.sleep(600)
