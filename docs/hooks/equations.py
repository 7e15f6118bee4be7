r"""mkdocs hook: equations become MathML when the site is built, so that pages need neither a script nor a network.

`pymdownx.arithmatex` finds `$...$`, `$$...$$`, `\(...\)` and `\[...\]` in pages and docstrings; this hook converts them.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

EQUATION = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)


def to_mathml(match: re.Match[str]) -> str:
    """MathML of one equation that arithmatex found."""
    latex = html.unescape(match[2]).strip()
    try:
        mathml = convert(latex, display="inline" if match[1] == "span" else "block")
    except Exception as error:
        raise PluginError(f"The equation {latex!r} cannot be converted to MathML: {type(error).__name__}: {error}") from error
    if unknown := re.search(r"\\[A-Za-z]+", mathml):  # the converter passes on what it does not know
        raise PluginError(f"The equation {latex!r} uses {unknown[0]}, which latex2mathml does not know.")
    return mathml if match[1] == "span" else f'<div class="equation">{mathml}</div>'


def on_page_content(content: str, **kwargs: Any) -> str:
    """Replace the equations of a page's HTML."""
    return EQUATION.sub(to_mathml, content)
