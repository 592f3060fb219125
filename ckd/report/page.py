"""Renders a template of `templates/` to one self-contained file.

Class names, paths and the names of banks come from files, so that they are hostile: every value is
escaped by Jinja's autoescape, and control characters, also those that reorder text, are written as
escapes. The content security policy permits this package's own script and style, by their hashes,
and nothing from a network.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from typing import TYPE_CHECKING, Any

from ckd._errors import printable
from ckd.report import words

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **context: Any) -> bytes:
    """The page, in UTF-8. Equal values give equal bytes."""
    page = _environment().get_template(template).render(**context)
    # A path may hold bytes that are not UTF-8, which Python keeps as lone surrogates.
    return page.encode(errors="backslashreplace")


@functools.cache
def _environment() -> Environment:
    import jinja2  # here, since few commands write pages
    from markupsafe import Markup

    def shown(value: Any) -> Any:
        plain = isinstance(value, str) and not isinstance(value, Markup)
        return printable(value) if plain else value

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ckd.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assert environment.loader is not None
    for name, file in (("style", "style.css"), ("script", "page.js")):
        source = environment.loader.get_source(environment, file)[0]
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        environment.globals[name] = Markup(source)
        environment.globals[f"{name}_hash"] = f"'sha256-{digest}'"
    environment.filters.update(words.FILTERS)
    return environment
