"""JSON files, written atomically."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON; the file appears, or is replaced, only when it is complete."""
    path = Path(path)
    text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    if path.exists() and not path.is_file():  # a pipe, or /dev/stdout, must not be replaced by a file
        path.write_text(text, encoding="utf-8")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
