"""Builds `ckd._C` from csrc/ with ninja, without torch headers. All metadata is in pyproject.toml.

Both compilers are optional. Without a C++ compiler the package installs without the module, and
`python -m ckd.info` says why; without nvcc the module has no CUDA kernels. A compiler that fails on
the sources is an error.

Objects stay in build/kernels, so that the next install, editable or not, compiles only changes.

CUDA kernels are compiled for the NVIDIA GPUs of this machine. CKD_CUDA=1 requires them on a machine
without a GPU too, CKD_CUDA=0 leaves them out, and CKD_CUDA_ARCHS lists their architectures
("80;90"). MAX_JOBS bounds parallel compilation, CXX names the compiler. CKD_OPENMP=torch, for
wheels, links no OpenMP runtime: the module takes the one that torch has loaded.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import site
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
# Without a GPU: sm_80 serves Ampere and Ada, sm_90 Hopper, and its PTX later GPUs.
CUDA_ARCHS = ["80", "90"]
OLDEST_ARCH = 80
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
            reason = "no C++ compiler was found (looked for $CXX, c++, g++, clang++): install one, "
            reason += "and ckd again"
            print(f"warning: ckd._C is not built: {reason}", file=sys.stderr)
        else:
            reason = f"built with {compiler}; {cuda.about}"
            target = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            folder = ROOT.resolve() / "build" / "kernels" / target
            self.ninja(compiler, cuda, ext.sources, module, folder)
        report = {"built": compiler is not None, "reason": reason}
        (package / REPORT).write_text(json.dumps(report) + "\n")

    def ninja(
        self, compiler: str, cuda: Cuda, sources: list[str], module: Path, folder: Path
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        copy_headers(folder / "pybind11")
        flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        # A product and a sum may become one FMA; nothing else about float arithmetic is relaxed.
        flags += ["-ffp-contract=fast", "-fno-math-errno"]
        flags += [f for f in ("-Wno-maybe-uninitialized", "-fopenmp") if accepts(compiler, [f])]
        includes = [folder / "pybind11", sysconfig.get_path("include"), ROOT / "csrc"]
        flags += [f"-I{path}" for path in includes]
        tiers = {name: own for name, own in TIERS.items() if accepts(compiler, own)}

        # nvcc compiles its architectures in parallel, since its sources take longest.
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        threads = f"--threads {min(jobs, len(cuda.arch_flags))}" if cuda.nvcc else ""
        nvcc = f"{quote(cuda.nvcc)} {host_flags(compiler)}"
        lines = [
            f"cxx = {' '.join(map(quote, shlex.split(compiler)))}",
            f"cflags = {' '.join(map(quote, flags))}",
            f"nvcc = {nvcc} -std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden {threads}",
            "rule compile",
            "  command = $cxx $cflags $own -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {linker(cuda, openmp='-fopenmp' in flags)} $in -o $out",
            "rule cuda",
            f"  command = $nvcc {' '.join(cuda.arch_flags)} {quote('-I' + str(ROOT / 'csrc'))} "
            "-MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        objects = []
        for source in sources:
            if "cuda" in Path(source).parts and not cuda.nvcc:
                continue
            tier = Path(source).stem.partition("tier_")[2] or "portable"
            if tier != "portable" and tier not in tiers:
                continue  # the compiler, or the architecture, does not support it
            rule = "cuda" if source.endswith(".cu") else "compile"
            objects.append(escape(folder / f"{source.replace('/', '_')}.o"))
            lines.append(f"build {objects[-1]}: {rule} {escape((ROOT / source).resolve())}")
            own = [*tiers.get(tier, []), *self.definitions(source, cuda, list(tiers))]
            lines.append(f"  own = {' '.join(map(quote, own))}")
        # Linked here, where ninja finds it again, and copied: setuptools' folder is a new one
        # each time.
        linked = folder / "_C.so"
        lines.append(f"build {escape(linked)}: link {' '.join(objects)}")
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        bound = ["-j", str(jobs)] if os.environ.get("MAX_JOBS") else []
        subprocess.run([*ninja_command(), "-C", str(folder), *bound], check=True)
        shutil.copy(linked, module)

    def definitions(self, source: str, cuda: Cuda, tiers: list[str]) -> list[str]:
        """The flags of one source. Settings are passed to the sources that read them alone: another
        setting compiles no more than these."""
        flags = []
        if source == "csrc/bindings.cpp":
            flags += [f'-DCKD_VERSION="{self.distribution.get_version()}"']
            flags += [f'-DCKD_CUDA_ABOUT="{cuda.about}"', f"-DCKD_HAS_CUDA={int(bool(cuda.nvcc))}"]
        if source == "csrc/cpu/tiers.cpp":
            flags += [f"-DCKD_HAS_{name.upper()}" for name in tiers]
        # -isystem /usr/include would break #include_next in the C++ library's headers.
        if source.endswith(".cpp") and cuda.headers and cuda.headers != Path("/usr/include"):
            reads_cuda = source == "csrc/bindings.cpp" or "cuda" in Path(source).parts
            flags += ["-isystem", str(cuda.headers)] if reads_cuda else []
        return flags


class Cuda(NamedTuple):
    """The CUDA compiler; nvcc is None if the kernels are not built."""

    nvcc: str | None
    about: str  # for people: its release and architectures, or why there is none
    headers: Path | None = None
    arch_flags: tuple[str, ...] = ()

    @classmethod
    def find(cls) -> Cuda:
        wanted, asked = os.environ.get("CKD_CUDA", ""), os.environ.get("CKD_CUDA_ARCHS", "")
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
                gpus = gpu_archs()
                useless = None if wanted or asked else of_no_use(gpus)
                if useless:
                    return cls(None, f"no CUDA kernels: {useless}; CKD_CUDA=1 builds them")
                archs = cls.archs(nvcc, asked, gpus)
                return cls(nvcc, cls.described(nvcc, archs), headers, tuple(cls.flags(archs)))
        if wanted == "1":
            raise RuntimeError("CKD_CUDA=1, but no nvcc was found; put it on PATH or set CUDA_HOME")
        return cls(None, "no CUDA kernels: no nvcc was found on PATH or in CUDA_HOME")

    @staticmethod
    def archs(nvcc: str, asked: str, gpus: list[str]) -> list[str]:
        """The architectures of CKD_CUDA_ARCHS, else those of the GPUs if nvcc knows them all, else
        those of CUDA_ARCHS that it knows."""
        if asked:
            archs = [a.strip() for a in asked.replace(",", ";").split(";") if a.strip()]
            if wrong := [a for a in archs if not re.fullmatch(r"([89]|1\d)\d[af]?", a)]:
                raise ValueError(
                    'CKD_CUDA_ARCHS must list architectures from 80 on, such as "80;90", '
                    f"got {wrong[0]!r}"
                )
            return archs
        command = [nvcc, "--list-gpu-arch"]
        text = subprocess.run(command, capture_output=True, text=True).stdout
        known = set(re.findall(r"compute_(\w+)", text))
        served = [a for a in gpus if int(a) >= OLDEST_ARCH]
        if served and known.issuperset(served):
            return served
        return [a for a in CUDA_ARCHS if a in known] or CUDA_ARCHS[:1]

    @staticmethod
    def flags(archs: list[str]) -> Iterator[str]:
        yield from (f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs)
        yield f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"

    @staticmethod
    def described(nvcc: str, archs: list[str]) -> str:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = text.partition("release ")[2].partition(",")[0] or "of an unknown release"
        return f"nvcc {release} for {' '.join(f'sm_{arch}' for arch in archs)}"


def gpu_archs() -> list[str]:
    """The architectures of this machine's NVIDIA GPUs, such as ["80", "90"]."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = re.findall(r"^(\d+)\.(\d)\s*$", done.stdout, re.MULTILINE)
    return sorted({major + minor for major, minor in found}, key=int)


def of_no_use(gpus: list[str]) -> str | None:
    """Why CUDA kernels cannot be of use on this machine, or None."""
    if not gpus:
        return "no NVIDIA GPU was found"
    if int(gpus[-1]) < OLDEST_ARCH:
        return f"the GPU is of sm_{gpus[-1]}, the kernels need sm_{OLDEST_ARCH}"
    if torch_has_cuda() is False:
        return "the installed torch has no CUDA"
    return None


def torch_has_cuda() -> bool | None:
    """Whether the torch of the environment that is installed into has CUDA, None without one.

    An isolated build cannot import it, but pip runs it with the interpreter of that environment,
    whose folders sysconfig names.
    """
    folders = [*sys.path, sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    folders += [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    for folder in folders:
        file = Path(folder, "torch", "version.py")
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            return re.search(r"^cuda\b[^=]*= *['\"]", text, re.MULTILINE) is not None
    return None


def copy_headers(folder: Path) -> None:
    """Copy pybind11's headers. An isolated build of pip has them at a new path and with new times
    each time, for which ninja would compile again; those of the copy change with their content."""
    import pybind11

    source = Path(pybind11.get_include())
    if folder.is_symlink():  # as ckd 0.1 left it
        folder.unlink()
    wanted = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        if path.relative_to(folder) not in wanted:
            path.unlink()
    for name in wanted:
        content, copy = (source / name).read_bytes(), folder / name
        if not copy.is_file() or copy.read_bytes() != content:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(content)


def linker(cuda: Cuda, *, openmp: bool) -> str:
    """The command that links the module, up to its files."""
    runtime = os.environ.get("CKD_OPENMP", "")
    if runtime not in ("", "torch"):
        raise ValueError(f'CKD_OPENMP must be "torch" or not set, got {runtime!r}')
    if runtime == "torch":
        # torch's wheels bring libgomp under names of their own, and a second one has a second pool
        # of threads. `import torch` makes its symbols global; without it, -z now makes the import
        # of the module fail, not its first call.
        openmp = False
    if cuda.nvcc:
        # nvcc links the CUDA runtime statically: the module loads without a driver too.
        options = ["-shared", "-cudart static", *(["-Xcompiler -fopenmp"] if openmp else [])]
        return f"$nvcc {' '.join(options)}" + " -Xlinker -z,now" * (runtime == "torch")
    options = ["-shared", *(["-fopenmp"] if openmp else [])]
    options += ["-Wl,-z,now"] if runtime == "torch" and sys.platform != "darwin" else []
    options += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    return f"$cxx {' '.join(options)}"


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


def readme() -> str:
    """README.md with absolute links, since it is shown on package indices too."""
    source = re.search(r'^Source = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    version = re.search(r'"(.+)"', (ROOT / "ckd" / "_version.py").read_text())
    assert source
    assert version
    # ](path), ](path "title"), src="path", srcset="path", href="path"; not URLs, anchors, mail.
    target = re.compile(r'(\]\(|\b(?:src|srcset|href)=")(?![a-z]+:|#|//)([^)"\s]+)')

    def absolute(match: re.Match[str]) -> str:
        kind = "raw" if Path(match[2]).suffix in (".svg", ".png", ".jpg", ".webp") else "blob"
        return f"{match[1]}{source[1]}/{kind}/v{version[1]}/{match[2]}"

    return target.sub(absolute, (ROOT / "README.md").read_text(encoding="utf-8"))


# optional: setuptools then accepts that there is no module without a compiler.
setup(
    ext_modules=[Extension("ckd._C", SOURCES, optional=True)],
    cmdclass={"build_ext": NinjaBuild},
    long_description=readme(),
    long_description_content_type="text/markdown",
)
