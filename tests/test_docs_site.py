"""The docs site: what must be found on it, and what must be as in the code."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ckd
from ckd.train import TrainError, train
from tests.docs_pages import DOCS, ROOT
from tests.docs_sandbox import run_command
from tests.image_files import pixels, write_images
from tests.train_runs import STUDENT, tiny_config

# Words of a question, and the page where a heading has them: the site's search ranks headings.
QUESTIONS = {
    "Which bank for 1M images?": "howto/large-banks.md",
    "Why is my loss NaN?": "faq.md",
    "How do I use my CLIP embeddings?": "howto/teacher.md",
    "What does it cost to store 10 views?": "howto/views.md",
    "How do I load the student in C++?": "faq.md",
    "Why does training use the reference backend?": "faq.md",
}
MODULES = ("ckd", "ckd.backends", "ckd.bank", "ckd.data", "ckd.eval", "ckd.losses")
MODULES += ("ckd.models", "ckd.train")
# A command that is refused, and words of its message that faq.md quotes.
REFUSED = (
    ("--resume run --lr 1", "was begun with other settings: lr was"),
    ("--data tiny.npz --method plain --out run", "already holds a run; go on with"),
    ("--data tiny.npz --bank half --out x", "it was built from other data, or from a part of it"),
    ("--data tiny.npz --bank classes --out x", "class 0 is '"),
    ("--data tiny.npz --bank other --out x", "was built from data with fingerprint"),
    ("--data wide --method plain --out x", "images must be square and of one size"),
)


def as_quoted() -> str:
    """The page of troubleshooting, on one line."""
    return " ".join((DOCS / "faq.md").read_text().split())


def test_questions_are_headings_of_their_page() -> None:
    for question, page in QUESTIONS.items():
        assert f"\n## {question}\n" in (DOCS / page).read_text()


def test_every_public_name_is_in_the_api_reference() -> None:
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    names = re.findall(r"^::: (\S+)$", text, re.M)
    assert len(names) == len(set(names))
    # mkdocstrings prefers a module to a function of its name, such as ckd.data.load.
    assert [name for name in names if (ROOT / f"{name.replace('.', '/')}.py").exists()] == []
    documented = [_resolved(name) for name in names]
    missing = [
        f"{module}.{name}"
        for module in MODULES
        for name in importlib.import_module(module).__all__
        if f"`{module}.{name}`" not in text
        and not any(_resolved(f"{module}.{name}") is one for one in documented)
    ]
    assert missing == []


def _resolved(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_page_of_commands_has_every_command_and_subcommand() -> None:
    page = _tool("commands").commands_page()
    for name in ckd.cli.COMMANDS:
        assert f"\n## ckd {name}\n" in page
    for sub in ("build", "info", "verify", "neighbours"):
        assert f"\n### ckd bank {sub}\n" in page
    assert "\x1b" not in page
    assert "--label-fraction" in page


def test_troubleshooting_quotes_the_errors_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_runs: None
) -> None:
    monkeypatch.chdir(tmp_path)
    train(tiny_config(tmp_path, method="plain", epochs=1), verbose=False)
    names = [f"class {c}" for c in range(3)]
    for path, rows, options in (
        ("half", 45, {}),
        ("classes", 90, {"class_names": names[::-1]}),
        ("other", 90, {"class_names": names, "fingerprint": "5f1c"}),
    ):
        with ckd.BankWriter(path, dim=4, **options) as writer:
            writer.write(torch.arange(rows), torch.randn(rows, 4), torch.arange(rows) % 3)
    for split in ("train", "test"):
        write_images(tmp_path / "wide" / split / "rose", pixels(4)[:, :6])
        write_images(tmp_path / "wide" / split / "tulip", pixels(4, seed=1)[:, :6])
    for flags, words in REFUSED:
        own = [] if flags.startswith("--resume") else ["--student", STUDENT, "--epochs", "1"]
        status, output = run_command(["train", *flags.split(), *own])
        assert status != 0, flags
        assert words in output
        assert words in as_quoted()


def test_troubleshooting_quotes_a_loss_that_is_not_finite(tmp_path: Path, quick_runs: None) -> None:
    config = tiny_config(tmp_path, lr=1e6, epochs=50)
    with pytest.raises(TrainError) as error:
        train(config, verbose=False)
    for words in (
        "is not finite at step ",
        "the step was not taken, the batch is listed in ",
        "Try a lower --lr, --clip-norm 1, or --amp off",
    ):
        assert words in str(error.value)
        assert words in as_quoted()


def test_docstrings_become_lists_and_code() -> None:
    pytest.importorskip("griffe")
    as_markdown = _tool("docstrings").as_markdown
    entries = "rows: int64 [N], of which\n    - x is left out.\nlabels, ids: int64 [N]."
    items = "- `rows`: int64 [N], of which - x is left out.\n- `labels`, `ids`: int64 [N]."
    assert as_markdown(f"First.\n\n{entries}", entries=True) == f"First.\n\n{items}"
    assert as_markdown(entries, entries=False) == entries
    code = "Example:\n    >>> f(\n    ...     1)\n    >>> g()"
    fenced = "Example:\n    ```python\n    f(\n        1)\n    g()\n    ```"
    assert as_markdown(code, entries=True) == fenced


def _tool(name: str) -> Any:
    """The module docs/tools/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    html = "".join(page.read_text() for page in (tmp_path / "site").rglob("*.html"))
    fetched = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)', html)
    assert fetched == []  # a reader's browser asks no other server
