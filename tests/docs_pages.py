"""The pages of the docs site and README.md, and their fenced blocks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

# Pages whose blocks are not run, and why.
EXCLUDED = {
    "benchmarks.md": "made from benchmarks/README.md; the benchmarks have tests of their own",
    "changelog.md": "made from CHANGELOG.md; it tells of the past",
    "commands.md": "made from the help of the commands when the site is built",
    "contributing.md": "made from CONTRIBUTING.md; .ci/run runs its commands",
    "emulation.md": "g++ and ThreadSanitizer, minutes; tests/test_emulation.py makes these builds",
    "results/accuracy.md": "benchmarks of hours",
    "results/cifar10.md": "benchmarks of hours",
    "results/kernels-cuda.md": "generated",
    "results/kernels-triton-3.6.md": "generated",
    "results/kernels-triton.md": "generated",
    "results/labels.md": "benchmarks of hours",
    "results/loss.md": "benchmarks of hours",
    "results/training.md": "benchmarks of hours",
}
RUN = ("bash", "python")  # the kinds of blocks that are run
SHOWN = ("text", "json", "cpp", "cmake")  # the kinds that show output or code of others

_NAV = re.compile(r"^ +- [^:\n]+: (\S+\.md)$", re.M)
_FENCE = re.compile(r"^```([\w-]*)\n(.*?)^```$", re.M | re.S)
_MARK = re.compile(r"<!-- test: (.+?) -->\s*$")


class Block(NamedTuple):
    """A fenced block. mark: what a comment `<!-- test: MARK -->` before it says, or ""."""

    kind: str
    text: str
    line: int
    mark: str


def pages() -> list[str]:
    """The pages in the site's navigation, in order."""
    return _NAV.findall((ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2])


def run_pages() -> list[Path]:
    """The files whose blocks are run: those of the site that are not excluded, and README.md."""
    return [*(DOCS / page for page in pages() if page not in EXCLUDED), ROOT / "README.md"]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    found = []
    for fence in _FENCE.finditer(text):
        mark = _MARK.search(text[: fence.start()])
        line = text.count("\n", 0, fence.start(2)) + 1
        found.append(Block(fence[1], fence[2], line, mark[1] if mark else ""))
    return found


def logical_lines(text: str) -> list[str]:
    """The commands of a bash block: continued lines are joined; comments and blanks left out."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
