"""What test_gpu_check.py gives to workers; it imports little, so that they start at once."""

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
