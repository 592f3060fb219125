"""What setup.py builds and when, and the metadata. `.ci/run` installs whole distributions."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

setuptools = pytest.importorskip("setuptools", minversion="77")  # as pyproject.toml says

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py, without its call of `setup()`."""
    for name in ("CKD_CUDA", "CKD_CUDA_ARCHS", "CKD_OPENMP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **settings: None)
    spec = importlib.util.spec_from_file_location("ckd_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(file: Path, output: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    file.chmod(0o755)


class Machine:
    """nvcc, GPUs and a torch that are there only for setup.py."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, setup: ModuleType) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        (folder / "include").mkdir()
        (folder / "include" / "cuda_fp16.h").touch()
        archs = "\n".join(f"compute_{arch}" for arch in (75, 80, 86, 89, 90, 100))
        program(folder / "bin" / "nvcc", f"Cuda compilation tools, release 13.0, V13\n{archs}")
        self.has_gpus()
        monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}/bin{os.pathsep}/usr/bin")
        self.has_torch(None)

    def has_gpus(self, *capabilities: str) -> None:
        program(self.folder / "bin" / "nvidia-smi", "\n".join(capabilities))

    def has_torch(self, cuda: str | None) -> None:
        """`cuda`: as in torch/version.py, or None without a torch."""
        site = self.folder / "site-packages"
        if cuda is not None:
            (site / "torch").mkdir(parents=True, exist_ok=True)
            text = f"debug = False\ncuda: Optional[str] = {cuda}\nhip: Optional[str] = '6.4'\n"
            (site / "torch" / "version.py").write_text(text)
        self._monkeypatch.setattr("sys.path", [])
        self._monkeypatch.setattr("site.ENABLE_USER_SITE", False)
        self._monkeypatch.setattr("sysconfig.get_path", lambda name: str(site))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setup: ModuleType) -> Machine:
    return Machine(tmp_path, monkeypatch, setup)


@pytest.mark.parametrize(
    ("gpus", "torch", "about"),
    [
        ((), None, "no CUDA kernels: no NVIDIA GPU was found; CKD_CUDA=1 builds them"),
        ((), "'13.0'", "no CUDA kernels: no NVIDIA GPU was found; CKD_CUDA=1 builds them"),
        (("9.0",), "None", "no CUDA kernels: the installed torch has no CUDA; CKD_CUDA=1"),
        (("7.5",), None, "no CUDA kernels: the GPU is of sm_75, the kernels need sm_80"),
        (("9.0",), None, "nvcc 13.0 for sm_90"),
        (("9.0", "8.6", "9.0"), "'13.0'", "nvcc 13.0 for sm_86 sm_90"),
        (("7.5", "8.9"), None, "nvcc 13.0 for sm_89"),
        (("12.0",), None, "nvcc 13.0 for sm_80 sm_90"),  # newer than nvcc: the PTX serves it
        (("[N/A]",), None, "no CUDA kernels: no NVIDIA GPU was found"),
    ],
)
def test_cuda_kernels_are_built_where_they_can_be_of_use(
    machine: Machine, setup: ModuleType, gpus: tuple[str, ...], torch: str | None, about: str
) -> None:
    machine.has_gpus(*gpus)
    machine.has_torch(torch)
    assert setup.Cuda.find().about.startswith(about)


@pytest.mark.parametrize(
    ("settings", "about"),
    [
        ({"CKD_CUDA": "1"}, "nvcc 13.0 for sm_80 sm_90"),
        ({"CKD_CUDA_ARCHS": "90a"}, "nvcc 13.0 for sm_90a"),
        ({"CKD_CUDA": "0", "CKD_CUDA_ARCHS": "90"}, "no CUDA kernels: CKD_CUDA=0"),
    ],
)
def test_cuda_kernels_are_built_as_asked(
    machine: Machine,
    setup: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str],
    about: str,
) -> None:
    machine.has_torch("None")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert setup.Cuda.find().about == about


def test_without_nvidia_smi_there_are_no_gpus(
    tmp_path: Path, setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup.gpu_archs() == []
    (tmp_path / "nvidia-smi").mkdir()
    assert setup.gpu_archs() == []


@pytest.mark.parametrize("name", ["CKD_CUDA", "CKD_CUDA_ARCHS"])
def test_wrong_settings_are_errors(
    machine: Machine, setup: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "yes")
    with pytest.raises(ValueError, match=f"{name} must .*'yes'"):
        setup.Cuda.find()


def test_openmp_comes_from_torch_if_asked(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = setup.Cuda(None, "")
    assert "-fopenmp" in setup.linker(none, openmp=True)
    monkeypatch.setenv("CKD_OPENMP", "torch")
    assert "-fopenmp" not in setup.linker(none, openmp=True)
    assert "fopenmp" not in setup.linker(setup.Cuda("nvcc", ""), openmp=True)
    monkeypatch.setenv("CKD_OPENMP", "gomp")
    with pytest.raises(ValueError, match="CKD_OPENMP"):
        setup.linker(none, openmp=True)


SOURCE = "#include <pybind11/detail/common.h>\nint answer() { return 42; }\n"


def test_a_second_build_compiles_nothing(
    setup: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Also if pybind11 lies elsewhere and its files are new, as in each isolated build of pip."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = setup.find_compiler()
    if compiler is None or not shutil.which(setup.ninja_command()[0]):
        pytest.skip("no C++ compiler, or no ninja")
    source = tmp_path / "answer.cpp"
    source.write_text(SOURCE)
    builder = setup.NinjaBuild(setuptools.Distribution({"name": "ckd", "version": "1"}))
    headers = pybind11.get_include()

    def build(module: str, *, copy: str) -> str:
        """ninja's output for the headers at another path, with other times."""
        shutil.copytree(headers, tmp_path / copy, copy_function=shutil.copyfile)
        monkeypatch.setattr(pybind11, "get_include", lambda: str(tmp_path / copy))
        none = setup.Cuda(None, "none")
        sources, folder = [str(source)], tmp_path / "objects"
        builder.ninja(compiler, none, sources, tmp_path / module, folder)
        return capfd.readouterr().out

    assert "[2/2]" in build("first.so", copy="a")
    assert "no work to do" in build("second.so", copy="b")
    assert (tmp_path / "first.so").read_bytes() == (tmp_path / "second.so").read_bytes()
    with (Path(headers) / "pybind11" / "detail" / "common.h").open() as file:
        changed = file.read() + "\n// changed\n"
    shutil.rmtree(tmp_path / "b")
    shutil.copytree(headers, tmp_path / "c")
    headers = str(tmp_path / "c")
    (tmp_path / "c" / "pybind11" / "detail" / "common.h").write_text(changed)
    (tmp_path / "c" / "pybind11" / "numpy.h").unlink()
    assert "[2/2]" in build("third.so", copy="d")
    assert not (tmp_path / "objects" / "pybind11" / "pybind11" / "numpy.h").exists()


def test_the_readme_of_the_metadata_has_absolute_links(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    (tmp_path / "ckd").mkdir()
    (tmp_path / "ckd" / "_version.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "pyproject.toml").write_text('[project.urls]\nSource = "https://a.b/c"\n')
    (tmp_path / "README.md").write_text(
        '[design](docs/design.md#x) [web](https://x.y/z) [top](#top) ![plot](docs/a.png "t")\n'
        '<img src="docs/b.svg"> <a href="mailto:a@b.c">x</a>\n'
    )
    assert setup.readme() == (
        "[design](https://a.b/c/blob/v1.2.3/docs/design.md#x) [web](https://x.y/z) [top](#top) "
        '![plot](https://a.b/c/raw/v1.2.3/docs/a.png "t")\n'
        '<img src="https://a.b/c/raw/v1.2.3/docs/b.svg"> <a href="mailto:a@b.c">x</a>\n'
    )


def test_links_of_the_readme_lead_somewhere(setup: ModuleType) -> None:
    text = (ROOT / "README.md").read_text()
    files = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", text)
    assert files
    assert [name for name in files if not (ROOT / name).exists()] == []
    assert not re.search(r"\]\((?!https?:|#)", setup.readme())


def test_everything_names_the_same_repository() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    source = project["urls"]["Source"]
    assert [url for url in project["urls"].values() if not url.startswith(source)] == []
    assert f"repository-code: {source}\n" in (ROOT / "CITATION.cff").read_text()
    extras = project["optional-dependencies"]
    assert extras["all"] == [f"ckd[{','.join(e for e in extras if e not in OTHER_EXTRAS)}]"]


OTHER_EXTRAS = ("all", "test", "dev", "docs", "notebooks")  # for developers


def test_the_sdist_holds_what_its_tests_need() -> None:
    """All that is tracked: MANIFEST.in or setuptools name it, or it is for the repository alone."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no repository")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    tops = {line.split("/")[0] for line in listed.stdout.splitlines()}
    manifest = (ROOT / "MANIFEST.in").read_text()
    given = set(re.findall(r"^graft (\S+)$", manifest, re.MULTILINE))
    given |= set(manifest.partition("\ninclude ")[2].partition("\n")[0].split())
    given |= {"ckd", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"}
    kept_out = {".ci", ".github", ".gitignore", ".pre-commit-config.yaml"}
    assert tops - given <= kept_out
