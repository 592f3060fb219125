"""Compiles CUDA kernels for GPUs that need not be present, and reads the statistics of ptxas."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++17", "-O3", "-cubin", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]


class Unit(NamedTuple):
    kernel: str
    registers: int  # of a thread
    spilled: int  # bytes of spill stores and loads
    shared: int  # bytes of static shared memory


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def architectures() -> list[str]:
    """sm_80, sm_90a and the newest architecture that this nvcc supports."""
    command = [str(nvcc()), "--list-gpu-arch"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    newest = max(int(number) for number in re.findall(r"compute_(\d+)", listed))
    return ["sm_80", "sm_90a", f"sm_{newest}"]


def compile_units(sources: Iterable[Path], arch: str, options: Iterable[str] = ()) -> list[Unit]:
    """Every kernel of the sources, compiled for `arch`, such as "sm_90a".

    MAX_JOBS compilers run at a time, by default one on each core.
    """
    number = arch.removeprefix("sm_")
    flags = [*FLAGS, "-gencode", f"arch=compute_{number},code=sm_{number}", *options]

    def compile_one(source: Path) -> list[Unit]:
        with tempfile.TemporaryDirectory() as folder:
            target = str(Path(folder) / "kernels.cubin")
            command = [str(nvcc()), *flags, str(source), "-o", target]
            done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return read_units(done.stdout + done.stderr)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return [unit for units in pool.map(compile_one, sources) for unit in units]


def read_units(report: str) -> list[Unit]:
    """The kernels in the output of `ptxas -v`, and the functions that are not inlined."""
    found = []
    # The properties of each function, followed by the resources of a kernel.
    for part in report.split("Function properties for ")[1:]:
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", part)
        found.append(
            Unit(
                kernel=demangled(part.split()[0]),
                registers=_number(r"Used (\d+) registers", part),
                spilled=sum(map(int, spills)),
                shared=_number(r"(\d+) bytes smem", part),
            )
        )
        assert len(spills) == 2, part
    return found


def demangled(name: str) -> str:
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        return name
    return subprocess.run([tool, name], capture_output=True, text=True, check=True).stdout.strip()


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


# Dynamic shared memory in KiB, as the host code of csrc/cuda requests it.
SHARED = {
    "softmax_sums<64": 24, "softmax_sums<128, false": 48, "softmax_sums<128, true": 32,
    "softmax_sums<256": 64, "bank_gradient<64": 26.5, "bank_gradient<128, false": 50.5,
    "bank_gradient<128, true": 33.25, "bank_gradient<256": 66, "sum_of_products": 32.25,
    "weight_gradient": 72, "add_shifted_rows": 1, "shift_gradient": 1,
    "project<": 32, "project_exactly": 16,
}  # fmt: skip
SHARED_OF_PROCESSOR = {"sm_80": 164, "sm_90a": 228, "sm_120": 100, "sm_121": 100}
THREADS = 128


TITLE = """\
# CUDA kernels as compiled

nvcc {version}, by `python -m tests.cuda_compile`. Blocks have 128 threads; `blocks a processor` is
how many of them fit, by registers and by shared memory (dynamic, as the host code asks for it). The
numbers behind `softmax_sums` and `bank_gradient` are columns of the student's width that a block
keeps sums of, and whether arithmetic is exact."""


def main() -> None:
    """Print docs/results/kernels-cuda.md."""
    report = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True)
    release = re.search(r"release ([\d.]+)", report.stdout)
    print(TITLE.format(version=release[1] if release else "of an unknown version"))
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    for arch in architectures():
        print(f"\n## {arch}\n")
        print("| kernel | registers | spilled | shared KiB | blocks a processor |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for unit in sorted(
            {u._replace(kernel=short(u.kernel)) for u in compile_units(sources, arch)}
        ):
            shared = next((kib for k, kib in SHARED.items() if unit.kernel.startswith(k)), 0)
            allocated = -(-unit.registers // 8) * 8 * THREADS
            blocks = min(2048 // THREADS, 65536 // allocated)
            if shared and arch in SHARED_OF_PROCESSOR:
                blocks = min(blocks, int(SHARED_OF_PROCESSOR[arch] // (shared + 1)))
            print(f"| `{unit.kernel}` | {unit.registers} | {unit.spilled} | {shared} | {blocks} |")


def short(kernel: str) -> str:
    name = kernel.removeprefix("void ").split("(")[0]
    return name.replace("ckd::cuda::", "").replace("__nv_", "").replace("__half", "half")


if __name__ == "__main__":
    main()
