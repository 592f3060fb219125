"""Runs test files in subprocesses whose environment selects other backends, one per core."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).parent


class Runs:
    """Runs of pytest; `files`: file in tests/ -> expression for -k."""

    def __init__(self, files: dict[str, str], environment: dict[str, str], *, slow: bool) -> None:
        self._options = ["-q", "-W", "ignore", *(["--slow"] if slow else [])]
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(jobs)
        self._runs = {file: self._pool.submit(self._run, file, k) for file, k in files.items()}

    def _run(self, file: str, expression: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pytest", str(TESTS / file), "-k", expression, *self._options],
            env=self._environment,
            capture_output=True,
            text=True,
            cwd=TESTS.parent,
        )

    def check(self, file: str) -> None:
        """Waits for the file's tests; fails with their output where one failed or none ran."""
        run: Future[subprocess.CompletedProcess[str]] = self._runs[file]
        done = run.result()
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert " passed" in done.stdout

    def stop(self) -> None:
        self._pool.shutdown(cancel_futures=True)
