"""Hooks of mkdocs: generated pages, links that leave docs/, and figures that follow the theme."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from commands import commands_page
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# page -> the file of the repository that it shows
COPIES = {
    "benchmarks.md": "benchmarks/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
# A Markdown link, or image, whose target is a path: text, path, anchor.
_LINK = re.compile(r"\[([^\[\]]*)\]\((?![a-z]+:|#|/)([^)\s#]+)(#[^)\s]*)?\)")
_FIGURE = re.compile(r'<img alt="([^"]*)" src="(?:\.\./)*figures/([\w-]+)\.svg" ?/?>')


def source_url() -> str | None:
    """Where the repository's files are shown, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    urls = project.get("urls", {})
    for name in ("Source", "Repository", "Homepage"):
        if name in urls:
            return f"{urls[name].rstrip('/')}/blob/main"
    return None


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made from the repository's files and from the commands' help."""
    for page, source in COPIES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    files.append(File.generated(config, "commands.md", content=commands_page()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    uri = page.file.src_uri
    source = COPIES.get(uri, f"docs/{uri}")

    def link(found: re.Match[str]) -> str:
        text, path, anchor = found.groups(default="")
        target = moved(path, source, uri)
        return text if target is None else f"[{text}]({target}{anchor})"

    return _LINK.sub(link, markdown)


def moved(target: str, source: str, uri: str) -> str | None:
    """The target of a link in the repository's file `source`, as the page `uri` links to it.

    None for a file that is no page while no address of the repository is known.
    """
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    pages = {file: page for page, file in COPIES.items()}
    here = posixpath.dirname(uri) or "."
    if path in pages:
        return posixpath.relpath(pages[path], here)
    if path.startswith("docs/"):
        return posixpath.relpath(path.removeprefix("docs/"), here)
    if not (ROOT / path).exists():
        return target  # `mkdocs build --strict` names it
    url = source_url()
    return None if url is None else f"{url}/{path}"


def on_page_content(html: str, **_: Any) -> str:
    """Put the figures' SVG into the page, so that it takes the theme's colours."""
    return _FIGURE.sub(lambda found: _inline(found[2], found[1]), html)


def _inline(name: str, alt: str) -> str:
    svg = (ROOT / "docs" / "figures" / f"{name}.svg").read_text()
    return svg.replace("<svg ", f'<svg role="img" aria-label="{alt}" ', 1)
