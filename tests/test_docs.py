"""Every command and Python block of the docs site and of README.md runs, page by page."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ckd
from ckd.train import demo
from tests import docs_sandbox
from tests.docs_pages import (
    DOCS,
    EXCLUDED,
    ROOT,
    RUN,
    SHOWN,
    blocks,
    logical_lines,
    pages,
    run_pages,
)

# What runs in place of what is written, and why.
SUBSTITUTIONS: tuple[tuple[str, str, str], ...] = (
    (r"openai/clip-vit-base-patch32", "clip", "weights of the hub: a tiny model on disk"),
    (r"timm:vit_base_patch16_clip_224.openai", "hf:clip", "weights of the hub: the same"),
    (r"--image-size (224|64)\b", "--image-size 32", "time; the tiny model takes 32 pixels"),
    (r"--epochs \d+", "--epochs 1", "time"),
    (r"--warmup-epochs \S+", "--warmup-epochs 0", "a warm-up is no longer than the one epoch"),
    (r"--student resnet20", "--student resnet8", "time"),
    (r"pretrained=True", "pretrained=False", "weights of the hub"),
)
# Commands that are not run, and why.
NOT_RUN: tuple[tuple[str, str], ...] = (
    (r"pip install ", ".ci/run runs it in a fresh environment"),
    (r"python -m pytest", "these tests"),
)
# Commands that are left out where a module is not installed.
NEEDS = ((r"\.onnx\b", "onnxscript"),)
# Blocks that a comment `<!-- test: needs NAME -->` leaves out without that module or program, and
# `<!-- test: not run: REASON -->` everywhere: for what needs a GPU, the network or minutes. Keep
# both few: a block that does not run is not known to work.
MARKED = {
    "export.md": ["needs g++"],
    "howto/teacher.md": ["needs timm"],
    "teachers.md": ["needs timm"],
}
# What a snippet's reader has already, by the snippet's first line.
HAS = {
    "z = F.linear(bank.float(), weight, bias)  # [K, W]: the whole bank, projected": """
import torch, torch.nn.functional as F, ckd
student, bank, target = torch.randn(4, 8), torch.randn(20, 16), torch.arange(4)
weight, bias, logit_scale = torch.randn(8, 16), torch.zeros(8), 14.3
""",
    "loss = ckd.contrastive_cross_entropy(student, bank, target, weight, bias, logit_scale)": "",
    "# The default of ckd train: the distance to the image's own row.": """
sample_ids = ckd.EmbeddingBank.open("banks/photos").sample_ids[:4]
student = torch.randn(4, 256)
""",
}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with _chdir(folder):
        docs_sandbox.fill(folder)
    torch.set_num_threads(threads)
    return folder


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:
    """contextlib.chdir, which Python 3.10 lacks."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.mark.parametrize(
    "page", [page for page in run_pages() if blocks(page)], ids=lambda page: page.name
)
@pytest.mark.filterwarnings("ignore")
def test_blocks_run_in_order(
    page: Path,
    sandbox: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quick_runs: None,
) -> None:
    shutil.copytree(sandbox, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(demo, "SEEDS", (0, 1))  # ckd demo: time
    for name in ("TEACHER", "STUDENT"):
        short = dataclasses.replace(getattr(demo, name), epochs=1)
        monkeypatch.setattr(demo, name, short)
    namespace: dict[str, Any] = {}
    for block in blocks(page):
        if block.kind not in RUN or _lacks(block.mark):
            continue
        where = f"{page.relative_to(ROOT)}, line {block.line}"
        if block.kind == "bash":
            for line in logical_lines(block.text):
                _run_line(line, where)
        else:
            _run_python(block.text, where, namespace)


def _lacks(mark: str) -> bool:
    """Whether a block is not run: it says so, or a module or program that it needs is missing."""
    if mark.startswith("needs "):
        name = mark.removeprefix("needs ")
        return importlib.util.find_spec(name) is None and shutil.which(name) is None
    return mark.startswith("not run: ")


def _run_line(line: str, where: str) -> None:
    """Run one command, those of ckd in this process."""
    if any(re.match(pattern, line) for pattern, _ in NOT_RUN):
        return
    if any(re.search(pattern, line) and _lacks(f"needs {module}") for pattern, module in NEEDS):
        return
    line = _substituted(line)
    argv = _ckd_arguments(line)
    if argv is not None:
        status, output = docs_sandbox.run_command(argv)
    else:
        python = shlex.quote(sys.executable)
        tested = str(Path(ckd.__file__).parents[1])  # for an unpacked sdist, the installed one
        path = os.pathsep.join(filter(None, [tested, os.environ.get("PYTHONPATH")]))
        names = f'python() {{ {python} "$@"; }}; ckd() {{ python -m ckd "$@"; }}'
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{names}; {line}"],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            timeout=60,
        )
        status, output = done.returncode, done.stdout + done.stderr
    assert status == 0, f"{where}: {line}\n{output}"


def _ckd_arguments(line: str) -> list[str] | None:
    """The arguments of `ckd ...`, `python -m ckd ...` and `python -m ckd.COMMAND ...`; None for
    other commands, and for those that need a shell."""
    words = shlex.split(line, comments=True)
    bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", line)
    if re.search(r"[|<>$;&*`]", re.sub(r"(^| )#.*", "", bare)):
        return None
    if words[:1] == ["ckd"]:
        return words[1:]
    if words[:2] == ["python", "-m"] and words[2].split(".")[0] == "ckd":
        return [*words[2].split(".")[1:], *words[3:]]
    return None


def _run_python(text: str, where: str, namespace: dict[str, Any]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        exec(HAS.get(text.splitlines()[0], ""), namespace)
        code = compile(_substituted(text), f"<{where}>", "exec")
        try:
            exec(code, namespace)
        except Exception as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error


def _substituted(text: str) -> str:
    for pattern, replacement, _ in SUBSTITUTIONS:
        text = re.sub(pattern, replacement, text)
    return text


def test_every_substitution_and_exclusion_is_used() -> None:
    text = "\n".join(block.text for page in run_pages() for block in blocks(page))
    patterns = [*(row[0] for row in SUBSTITUTIONS), *(row[0] for row in NOT_RUN)]
    assert [pattern for pattern in patterns if not re.search(pattern, text)] == []
    assert [line for line in HAS if line not in text] == []
    assert [page for page in EXCLUDED if page not in pages()] == []


def test_marked_blocks_are_those_listed() -> None:
    marked = {
        page.relative_to(DOCS).as_posix() if page.is_relative_to(DOCS) else page.name: [
            block.mark for block in blocks(page) if block.mark
        ]
        for page in run_pages()
    }
    assert {page: marks for page, marks in marked.items() if marks} == MARKED


def test_every_block_has_a_kind_and_commands_are_fenced() -> None:
    for page in run_pages():
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
        loose = re.findall(r"^ {4,}(?:ckd|python|pip|git|make) .*$", text, re.M)
        assert loose == [], f"{page}: fence these commands as bash"
        for block in blocks(page):
            assert block.kind in (*RUN, *SHOWN), f"{page}, line {block.line}: {block.kind!r}"


def test_relative_links_of_the_readme_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)", (ROOT / "README.md").read_text())
    assert [target for target in targets if not (ROOT / target).exists()] == []
