"""Runs one rung in this process; gpu_check.py starts it.

python -m gpu --name right --module gpu.right --file OUT/right.json --work DIR --seconds 90
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from common.workers import reason_of
from gpu.job import Job, NotHere


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Runs one rung of gpu_check.py.")
    parser.add_argument("--name", required=True)
    parser.add_argument("--module", required=True)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--data")
    parser.add_argument("--teacher-weights")
    options = vars(parser.parse_args(arguments))
    module = options.pop("module")
    job = Job(**options)
    try:
        importlib.import_module(module).run(job)
    except NotHere as reason:
        job.put(status="left out", reason=str(reason))
        return 0
    except Exception as error:  # noqa: BLE001  # any error is the rung's result
        traceback.print_exc()
        job.put(status="crashed", reason=reason_of(error))
        return 1
    job.put(status="WRONG" if job.record["wrong"] else "ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
