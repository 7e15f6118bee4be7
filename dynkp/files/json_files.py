"""JSON files: read with errors that name the file, written atomically."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dynkp.files.atomic import write_text


def parse_json(text: str | bytes, where: str) -> Any:
    """Parse JSON; the error says where the text stands.

    Args:
        text: The JSON text. Bytes are UTF-8.
        where: The beginning of the error's message, such as a file and a line number.

    Returns:
        The value.

    Raises:
        ValueError: If `text` is not valid JSON, or nested so deep or with numbers so long that Python cannot read it.

    Example:
        >>> parse_json("[1, 2]", "a.json")
        [1, 2]
        >>> parse_json("[1, 2", "a.json, line 3")
        Traceback (most recent call last):
        ...
        ValueError: a.json, line 3: not valid JSON (Expecting ',' delimiter, column 6): '[1, 2'
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f", line {error.lineno}" if error.lineno > 1 else ""
        raise ValueError(f"{where}{at}: not valid JSON ({error.msg}, column {error.colno}): {text[:80]!r}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of 5,000 digits, brackets 10,000 deep
        raise ValueError(f"{where}: not usable JSON ({error})") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        ValueError: If the file is not valid JSON; the message names it.
        OSError: If it cannot be read.
    """
    return parse_json(Path(path).read_bytes(), str(path))


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write a JSON file atomically, indented by two blanks.

    Args:
        path: The file; missing folders are created. A pipe or a device such as `/dev/stdout` is written to, not replaced.
        content: Values that JSON can hold.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.json"
        >>> write_json(file, {"posts": 2})
        >>> read_json(file)
        {'posts': 2}
    """
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
