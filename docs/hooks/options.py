"""mkdocs hook: a line `<!-- options: module:Class -->` becomes the table of the options that the class itself declares.

The `help` of a config field is the only place where an option is described.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from typing import Any

MARKER = re.compile(r"^<!-- options: ([\w.]+):(\w+) -->$", re.MULTILINE)


def options_table(module: str, name: str) -> str:
    """Markdown table of a config dataclass's own fields, without those it inherits unchanged."""
    config = getattr(importlib.import_module(module), name)
    own = config.__annotations__
    lines = ["| option | default | |", "|---|---|---|"]
    for field in dataclasses.fields(config):
        if field.name in own:
            text = " ".join(str(field.metadata["help"]).replace("%%", "%").replace("|", "\\|").split())
            lines.append(f"| `{field.name}` | `{field.default}` | {text} |")
    return "\n".join(lines)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Replace the markers of a page by tables of options."""
    return MARKER.sub(lambda match: options_table(match[1], match[2]), markdown)
