"""Builds CUDA kernels for the CPU (docs/emulation.md) and runs the programs that test them."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
EMULATION = sorted((ROOT / "csrc" / "emulation").glob("*.cpp"))
FLAGS = ["-std=c++17", "-O2", "-g", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
FLAGS += ["-fno-strict-aliasing"]  # kernels read two halves as one 32-bit integer, as nvcc allows
SCHEDULES = ("ordered", "eager", "random")
# Exit statuses of sanitizers' reports, distinct from that of wrong values.
ADDRESS_REPORT, RACE_REPORT = 65, 66


@dataclass(frozen=True)
class Kind:
    """A way to build: flags of the kernels, of the emulation and of the linker."""

    kernel: tuple[str, ...] = ()
    emulation: tuple[str, ...] = ()
    link: tuple[str, ...] = ()


ADDRESS = ("-fsanitize=address", "-fno-omit-frame-pointer")
KINDS = {
    "plain": Kind(),
    "address": Kind(ADDRESS, ADDRESS, ADDRESS),
    # The emulation is not instrumented: the scheduler's accesses are no races of a kernel
    # (csrc/emulation/sanitizers.h).
    "thread": Kind(("-fsanitize=thread",), ("-DCKD_EMULATION_TSAN",), ("-fsanitize=thread",)),
}


def compiler() -> str | None:
    return shutil.which("g++")


def cuda_headers() -> Path | None:
    """The folder of the CUDA toolkit's headers; no other part of the toolkit is needed."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    homes += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    for home in [*homes, "/usr/local/cuda"]:
        folder = Path(home or "") / "include"
        if home and all((folder / h).is_file() for h in ("cuda_fp16.h", "driver_types.h")):
            return folder
    return None


def missing() -> str | None:
    """Why nothing can be emulated here, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the emulation is written for x86-64 Linux"
    if compiler() is None:
        return "no g++"
    if cuda_headers() is None:
        return "no CUDA headers (looked beside nvcc, in CUDA_HOME and in /usr/local/cuda)"
    return None


def links(kind: str) -> bool:
    """Whether the compiler has the sanitizer's library."""
    command = [str(compiler()), *KINDS[kind].link, "-x", "c++", "-", "-o", os.devnull]
    return subprocess.run(command, input=b"int main() {}", capture_output=True).returncode == 0


def build(
    kernels: Iterable[Path], folder: Path, kinds: Iterable[str], options: Iterable[str] = ()
) -> dict[str, Path]:
    """A program of each kind: `kernels` (.cu or .cpp, one with main), linked with the emulation.

    MAX_JOBS compilers run at a time, by default one on each core. `-shared` among the options
    makes a library.
    """
    kinds, options = list(kinds), list(options)
    units: list[tuple[str, Path, tuple[str, ...]]] = []
    for kind in kinds:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        units += [(kind, source, KINDS[kind].kernel) for source in kernels]
        units += [(kind, source, KINDS[kind].emulation) for source in EMULATION]
    common = [*FLAGS, "-DCKD_EMULATION", f"-I{ROOT / 'csrc'}", "-isystem", str(cuda_headers())]

    def compile_unit(unit: tuple[str, Path, tuple[str, ...]]) -> Path:
        kind, source, flags = unit
        target = folder / kind / f"{source.parent.name}_{source.stem}.o"
        _run(*common, *flags, *options, "-x", "c++", "-c", source, "-o", target)
        return target

    def link(kind: str) -> Path:
        target = folder / kind / "program"
        own = [o for (k, _, _), o in zip(units, objects) if k == kind]
        _run(*KINDS[kind].link, *options, *own, "-pthread", "-o", target)
        return target

    with ThreadPoolExecutor(jobs()) as pool:
        objects = list(pool.map(compile_unit, units))
        return dict(zip(kinds, pool.map(link, kinds)))


def build_module(folder: Path) -> Path:
    """Compile the CUDA kernels of ckd._C for the CPU, as a Python module."""
    import pybind11

    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "csrc/cuda/bindings.cpp"]
    sources.append(ROOT / "tests" / "emulation" / "module.cpp")
    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    options = ["-shared", "-fvisibility=hidden", *(f"-I{path}" for path in includes)]
    module = folder / "ckd_emulated.so"
    shutil.copy(build(sources, folder, ["plain"], options)["plain"], module)
    return module


def use(module: Path) -> None:
    """Let the cuda backend serve CPU tensors with the emulated kernels, until the process ends."""
    from ckd.backends import cuda
    from ckd.backends.device import Simulated

    spec = importlib.util.spec_from_file_location("ckd_emulated", module)
    assert spec is not None
    assert spec.loader is not None
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    cuda.use(kernels, Simulated())


def jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def _run(*arguments: object) -> None:
    command = [str(compiler()), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Outcome:
    finding: str  # "none", "values", "emulation", "address", "race" or "crash"
    text: str


def run(
    program: Path,
    *arguments: object,
    schedule: str = "eager",
    seed: int = 0,
    sums: str = "truncated",
) -> Outcome:
    """Run a program that exits with 0 for right values and 1 for wrong ones."""
    environment = dict(
        os.environ,
        CKD_EMULATION_SCHEDULE=schedule,
        CKD_EMULATION_SEED=str(seed),
        CKD_EMULATION_SUMS=sums,
        ASAN_OPTIONS=f"detect_leaks=0:exitcode={ADDRESS_REPORT}",
        TSAN_OPTIONS=f"halt_on_error=1:atexit_sleep_ms=0:exitcode={RACE_REPORT}",
    )
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if "unexpected memory mapping" in done.stderr and shutil.which("setarch"):
        # Older sanitizer runtimes cannot map their shadow memory under strong address-space
        # randomisation.
        command = ["setarch", "-R", *command]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    text = done.stdout + done.stderr
    if "ckd emulation:" in text:
        return Outcome("emulation", text)
    findings = {0: "none", 1: "values", ADDRESS_REPORT: "address", RACE_REPORT: "race"}
    return Outcome(findings.get(done.returncode, "crash"), text)
