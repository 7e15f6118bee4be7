"""mkdocs hook: the line `<!-- commands -->` becomes the help of every sub-command, as its parser prints it."""

from __future__ import annotations

import argparse
import importlib
import os
from typing import Any
from unittest import mock

MARKER = "<!-- commands -->"


def command_reference() -> str:
    """A section for each sub-command, with its help at 100 characters a line."""
    from dynkp.cli import COMMANDS

    sections = []
    with mock.patch.dict(os.environ, COLUMNS="100"):
        for name, (module_name, summary) in COMMANDS.items():
            module = importlib.import_module(module_name)
            text = f"## dynkp {name}\n\n{summary[:1].upper()}{summary[1:]}.\n\n"
            sections.append(text + "\n\n".join(f"```text\n{part.rstrip()}\n```" for part in helps(module)))
    return "\n\n".join(sections)


def helps(module: Any) -> list[str]:
    """The help of a command and of its sub-commands; what the command itself says, where its options depend on others."""
    if hasattr(module, "reference"):
        return module.reference()
    parser = (getattr(module, "parser", None) or module._parser)()
    own = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [part.format_help() for part in (parser, *(part for action in own for part in action.choices.values()))]


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Replace the marker by the command reference."""
    return markdown.replace(MARKER, command_reference()) if MARKER in markdown else markdown
