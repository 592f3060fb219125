"""tests/native under sanitizers: the CPU kernels against double loops in C++, and their threads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckd.backends import cpu

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc" / "cpu"
FLAGS = ["-std=c++17", "-O1", "-g", "-ffp-contract=fast", "-fno-math-errno", f"-I{ROOT / 'csrc'}"]

compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
pytestmark = [
    pytest.mark.skipif(compiler is None, reason="no C++ compiler"),
    pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing())),
]


def compile_with(*options: object) -> None:
    line = [str(compiler), *FLAGS, *map(str, options)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def build(folder: Path, tiers: list[str], sanitizer: list[str], sources: Path = SOURCES) -> Path:
    """The test program with the kernels of `tiers`, as many compilers at a time as cores."""
    flags = json.loads((sources / "tiers.json").read_text())
    has = [f"-DCKD_HAS_{tier.upper()}" for tier in tiers if tier != "portable"]
    units = [(sources / f"tier_{tier}.cpp", flags.get(tier, [])) for tier in tiers]
    units += [(sources / name, has) for name in ("tiers.cpp", "memory.cpp")]
    units += [(ROOT / "tests" / "native" / "test_kernels.cpp", [])]

    def run(*command: object) -> None:
        # gcc links some sanitizers only if they are asked for when linking too.
        compile_with(*sanitizer, *command)

    objects = [folder / f"{source.stem}.o" for source, _ in units]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(lambda u, o: run(*u[1], "-c", u[0], "-o", o), units, objects))
    program = folder / "test_kernels"
    run(*objects, "-o", program)
    return program


def links(*sanitizer: str) -> bool:
    """Whether the compiler has the sanitizer's library."""
    command = [str(compiler), *sanitizer, "-x", "c++", "-", "-o", os.devnull]
    return subprocess.run(command, input=b"int main() {}", capture_output=True).returncode == 0


@pytest.mark.slow
def test_kernels_are_clean_under_address_and_undefined_behaviour_sanitizers(
    tmp_path: Path,
) -> None:
    sanitizer = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if not links(*sanitizer):
        pytest.skip("the compiler has no AddressSanitizer")
    if links("-fopenmp"):
        sanitizer.append("-fopenmp")
    program = build(tmp_path, list(cpu.TIERS), sanitizer)
    for tier in cpu.TIERS:
        done = subprocess.run([program, tier], capture_output=True, text=True)
        assert done.returncode == 0, f"{tier}: {done.stdout}{done.stderr}"


@pytest.mark.slow
@pytest.mark.skipif("avx512_bf16" not in cpu.TIERS, reason="no AVX-512 with bfloat16")
def test_the_walk_over_amx_tiles_on_emulated_tiles(tmp_path: Path) -> None:
    header = ROOT / "tests" / "native" / "amx_emulated.h"
    options = ["-include", str(header)]
    if links("-fsanitize=address,undefined"):
        options += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = build(tmp_path, ["portable", "avx512_bf16"], options)
    done = subprocess.run([program, "avx512_bf16"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# With std::thread in place of OpenMP, whose barriers ThreadSanitizer does not see.
RACES = ["-fsanitize=thread", "-DCKD_STD_THREADS", "-pthread"]


def run_under_thread_sanitizer(*command: object) -> None:
    # Older runtimes cannot map their shadow under much address-space randomisation.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    line = list(map(str, command))
    done = subprocess.run([*fixed, *line], capture_output=True, text=True)
    if "Operation not permitted" in done.stderr:
        done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_kernels_have_no_data_race(tmp_path: Path) -> None:
    if not links(*RACES):
        pytest.skip("the compiler has no ThreadSanitizer")
    run_under_thread_sanitizer(build(tmp_path, ["portable"], RACES), "portable", "small")


def test_threads_share_every_loop(tmp_path: Path) -> None:
    sources = [ROOT / "tests" / "native" / "test_parallel.cpp", SOURCES / "memory.cpp"]
    if links("-fopenmp"):
        compile_with("-fopenmp", *sources, "-o", tmp_path / "openmp")
        done = subprocess.run([tmp_path / "openmp"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    if links(*RACES):
        compile_with(*RACES, *sources, "-o", tmp_path / "threads")
        run_under_thread_sanitizer(tmp_path / "threads")
