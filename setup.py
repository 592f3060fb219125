"""Builds `ckd._C` from csrc/ with ninja, without torch headers. All metadata is in pyproject.toml.

Both compilers are optional. Without a C++ compiler the package installs without the module, and
`python -m ckd.info` says why; without nvcc the module has no CUDA kernels. A compiler that fails on
the sources is an error.

An editable install keeps its objects in build/editable, so that the next one compiles only changes.

MAX_JOBS bounds parallel compilation, CXX names the compiler, CKD_CUDA=0 leaves the CUDA kernels out
and CKD_CUDA=1 requires them, and CKD_CUDA_ARCHS lists their architectures ("80;90").
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

OLDEST_SETUPTOOLS = 77  # as in pyproject.toml, whose licence lines older ones reject
if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"setuptools {OLDEST_SETUPTOOLS} or newer builds ckd, this is {setuptools.__version__}: "
        f'pip install "setuptools>={OLDEST_SETUPTOOLS}", or install without --no-build-isolation'
    )

ROOT = Path(__file__).parent
# csrc/emulation runs the CUDA kernels on the CPU, in tests only.
SOURCES = sorted(
    str(p.relative_to(ROOT))
    for p in (ROOT / "csrc").glob("**/*.c*")
    if p.suffix in (".cpp", ".cu") and p.parent.name != "emulation"
)
# The CPU kernels are compiled once for each instruction set; csrc/cpu/tiers.cpp picks at run time.
TIERS: dict[str, list[str]] = json.loads((ROOT / "csrc" / "cpu" / "tiers.json").read_text())
# sm_80 serves Ampere and Ada, sm_90 Hopper, and its PTX later GPUs.
CUDA_ARCHS = "80;90"
REPORT = "_build.json"  # beside the module: {"built": bool, "reason": str}


class NinjaBuild(build_ext):
    """Compiles and links with ninja, and writes a report (REPORT) beside the module."""

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        # An editable install imports from the source tree, where setuptools copies the module.
        package = ROOT / "ckd" if self.editable_mode or self.inplace else module.parent
        for folder in (module.parent, package):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / module.name).unlink(missing_ok=True)
        compiler, cuda = find_compiler(), Cuda.find()
        if compiler is None:
            if os.environ.get("CKD_CUDA") == "1":
                raise RuntimeError("CKD_CUDA=1, but no C++ compiler was found; set CXX")
            reason = "no C++ compiler was found (looked for $CXX, c++, g++, clang++)"
            print(f"warning: ckd._C is not built: {reason}", file=sys.stderr)
        else:
            reason = f"built with {compiler}; {cuda.about}"
            editable = ROOT.resolve() / "build" / "editable" / sys.implementation.cache_tag
            folder = editable if self.editable_mode else Path(self.build_temp).resolve()
            self.ninja(compiler, cuda, ext.sources, module, folder)
        report = {"built": compiler is not None, "reason": reason}
        (package / REPORT).write_text(json.dumps(report) + "\n")

    def ninja(
        self, compiler: str, cuda: Cuda, sources: list[str], module: Path, folder: Path
    ) -> None:
        import pybind11

        folder.mkdir(parents=True, exist_ok=True)
        # An isolated build of pip has pybind11 at a new path each time, which would change every
        # command; the path of this link stays.
        headers = folder / "pybind11"
        headers.unlink(missing_ok=True)
        headers.symlink_to(pybind11.get_include(), target_is_directory=True)
        includes = [headers, sysconfig.get_path("include"), ROOT / "csrc"]
        flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        # A product and a sum may become one FMA; nothing else about float arithmetic is relaxed.
        flags += ["-ffp-contract=fast", "-fno-math-errno"]
        flags += [f for f in ("-Wno-maybe-uninitialized", "-fopenmp") if accepts(compiler, [f])]
        tiers = {name: own for name, own in TIERS.items() if accepts(compiler, own)}
        flags += [f"-DCKD_HAS_{name.upper()}" for name in tiers]
        flags += [f'-DCKD_VERSION="{self.distribution.get_version()}"']
        flags += [f'-DCKD_CUDA_ABOUT="{cuda.about}"', f"-DCKD_HAS_CUDA={int(bool(cuda.nvcc))}"]
        # -isystem /usr/include would break #include_next in the C++ library's headers.
        if cuda.nvcc and cuda.headers != Path("/usr/include"):
            flags += ["-isystem", str(cuda.headers)]
        flags += [f"-I{path}" for path in includes]
        link = ["-shared", *(["-fopenmp"] if "-fopenmp" in flags else [])]
        if sys.platform == "darwin":
            link += ["-undefined", "dynamic_lookup"]

        # nvcc compiles its architectures in parallel, since its sources take longest.
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        threads = f"--threads {min(jobs, len(cuda.arch_flags))}" if cuda.nvcc else ""
        openmp, nvcc = "-fopenmp" in link, f"{quote(cuda.nvcc)} {host_flags(compiler)}"
        linker = f"$cxx {' '.join(link)}"
        if cuda.nvcc:
            # nvcc links the CUDA runtime statically: the module loads without a driver too.
            linker = f"{nvcc} -shared -cudart static"
            linker += " -Xcompiler -fopenmp" * openmp
        lines = [
            f"cxx = {' '.join(map(quote, shlex.split(compiler)))}",
            f"cflags = {' '.join(map(quote, flags))}",
            f"nvcc = {nvcc} -std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden {threads}",
            "rule compile",
            "  command = $cxx $cflags $tier -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {linker} $in -o $out",
            "rule cuda",
            f"  command = $nvcc {' '.join(cuda.arch_flags)} {quote('-I' + str(ROOT / 'csrc'))} "
            "-MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        objects = []
        for source in sources:
            stem = Path(source).stem
            if "cuda" in Path(source).parts:
                if not cuda.nvcc:
                    continue
                if source.endswith(".cu"):
                    objects.append(escape(folder / f"{source.replace('/', '_')}.o"))
                    lines.append(f"build {objects[-1]}: cuda {escape((ROOT / source).resolve())}")
                    continue
            tier = stem.removeprefix("tier_") if stem.startswith("tier_") else "portable"
            if tier != "portable" and tier not in tiers:
                continue  # the compiler, or the architecture, does not support it
            objects.append(escape(folder / f"{source.replace('/', '_')}.o"))
            lines.append(f"build {objects[-1]}: compile {escape((ROOT / source).resolve())}")
            lines.append(f"  tier = {' '.join(tiers.get(tier, []))}")
        lines.append(f"build {escape(module)}: link {' '.join(objects)}")
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        bound = ["-j", str(jobs)] if os.environ.get("MAX_JOBS") else []
        subprocess.run([*ninja_command(), "-C", str(folder), *bound], check=True)


class Cuda(NamedTuple):
    """The CUDA compiler; nvcc is None if the kernels are not built."""

    nvcc: str | None
    about: str  # for people: its release and architectures, or why there is none
    headers: Path | None = None
    arch_flags: tuple[str, ...] = ()

    @classmethod
    def find(cls) -> Cuda:
        wanted = os.environ.get("CKD_CUDA", "")
        if wanted not in ("", "0", "1"):
            raise ValueError(f"CKD_CUDA must be 0, 1 or not set, got {wanted!r}")
        if wanted == "0":
            return cls(None, "no CUDA kernels: CKD_CUDA=0")
        homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
        candidates = [shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in homes if home)]
        for nvcc in candidates:
            # The nvcc on PATH may be a link into the toolkit's folder, which has the headers.
            headers = Path(nvcc).resolve().parents[1] / "include" if nvcc else Path()
            if nvcc and Path(nvcc).exists() and (headers / "cuda_fp16.h").exists():
                archs = cls.archs(nvcc)
                return cls(nvcc, cls.described(nvcc, archs), headers, tuple(cls.flags(archs)))
        if wanted == "1":
            raise RuntimeError("CKD_CUDA=1, but no nvcc was found; put it on PATH or set CUDA_HOME")
        return cls(None, "no CUDA kernels: no nvcc was found on PATH or in CUDA_HOME")

    @staticmethod
    def archs(nvcc: str) -> list[str]:
        """The architectures of CKD_CUDA_ARCHS; by default those of CUDA_ARCHS that nvcc knows."""
        asked = os.environ.get("CKD_CUDA_ARCHS", "")
        archs = [a.strip() for a in (asked or CUDA_ARCHS).replace(",", ";").split(";") if a.strip()]
        if wrong := [a for a in archs if not re.fullmatch(r"([89]|1\d)\d[af]?", a)]:
            raise ValueError(
                'CKD_CUDA_ARCHS must list architectures from 80 on, such as "80;90", '
                f"got {wrong[0]!r}"
            )
        if asked:
            return archs
        command = [nvcc, "--list-gpu-arch"]
        known = subprocess.run(command, capture_output=True, text=True).stdout
        return [a for a in archs if f"compute_{a}" in known] or archs[:1]

    @staticmethod
    def flags(archs: list[str]) -> Iterator[str]:
        yield from (f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs)
        yield f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"

    @staticmethod
    def described(nvcc: str, archs: list[str]) -> str:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = text.partition("release ")[2].partition(",")[0] or "of an unknown release"
        return f"nvcc {release} for {' '.join(f'sm_{arch}' for arch in archs)}"


def ninja_command() -> list[str]:
    """The ninja of the build environment, else the one on PATH."""
    try:
        import ninja
    except ImportError:
        return ["ninja"]
    return [str(Path(ninja.BIN_DIR) / "ninja")]


def find_compiler() -> str | None:
    candidates = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    return next((c for c in candidates if c and shutil.which(shlex.split(c)[0])), None)


def host_flags(compiler: str) -> str:
    """nvcc's options for its host compiler: "ccache g++ -m64" is -ccbin g++ -Xcompiler -m64."""
    words = shlex.split(compiler)
    *_, program = [word for word in words if not word.startswith("-")]
    flags = words[words.index(program) + 1 :]
    return " ".join([f"-ccbin {quote(program)}", *(f"-Xcompiler {quote(flag)}" for flag in flags)])


def accepts(compiler: str, flags: list[str]) -> bool:
    """Whether the compiler compiles and links with these flags (clang on macOS has no OpenMP)."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("int main() { return 0; }\n")
        command = [*shlex.split(compiler), *flags, str(source), "-o", str(Path(folder) / "probe")]
        return subprocess.run(command, capture_output=True).returncode == 0


def quote(argument: object) -> str:
    """Quotes an argument of a rule's command for the shell, and its `$` for ninja."""
    return shlex.quote(str(argument)).replace("$", "$$")


def escape(path: object) -> str:
    """Escapes a path in a build line, where `$`, space and colon are special."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


# optional: setuptools then accepts that there is no module without a compiler.
setup(
    ext_modules=[Extension("ckd._C", SOURCES, optional=True)],
    cmdclass={"build_ext": NinjaBuild},
)
