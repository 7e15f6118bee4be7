"""Names that a user gives for files, folders or Hub ids: which of these they are, and what a missing one may have meant."""

from __future__ import annotations

import os
from pathlib import Path

from dynkp.data.choices import did_you_mean

_SUFFIXES = (".json", ".jsonl", ".ndjson", ".txt", ".tsv", ".csv", ".parquet", ".yaml", ".yml")


def is_path(name: str) -> bool:
    """Tell the name of a file or folder from one that may be a Hub id.

    Args:
        name: what a user gave.

    Returns:
        Whether the name begins with `.`, `/` or `~`, ends with `/` or the suffix of a data file, has more than one slash, or
        lies in a folder that exists.

    Example:
        >>> is_path("runs/student/checkpoint-10"), is_path("train.jsonl"), is_path("Qwen/Qwen2.5-VL-3B-Instruct")
        (True, True, False)
    """
    parent = os.path.dirname(name.rstrip("/"))
    has_form = name.startswith((".", "/", "~")) or name.endswith(("/", *_SUFFIXES)) or name.count("/") > 1
    return has_form or os.path.isdir(parent)


def check_path(name: str, option: str, kind: str = "file or folder", *, or_hub_id: bool = True) -> None:
    """Refuse a path that does not exist, before anybody looks for it on the Hub.

    Args:
        name: a path or a Hub id.
        option: how the error calls it.
        kind: `"file"`, `"folder"` or `"file or folder"`.
        or_hub_id: whether a name that does not look like a path may be a Hub id; otherwise it must exist.

    Raises:
        FileNotFoundError: naming what lies beside it under the most similar name.

    Example:
        >>> check_path("Qwen/Qwen2.5-VL-3B-Instruct", "model", "folder")  # may be a Hub id
        >>> check_path("./nowhere", "model", "folder")
        Traceback (most recent call last):
        FileNotFoundError: model='./nowhere': there is no such folder
    """
    exists = {"file": os.path.isfile, "folder": os.path.isdir}.get(kind, os.path.exists)
    if exists(name) or (or_hub_id and not is_path(name)):
        return
    parent = os.path.dirname(name.rstrip("/"))
    folder = Path(parent or ".")
    beside = [os.path.join(parent, entry) for entry in os.listdir(folder)] if folder.is_dir() else []
    hint = did_you_mean(name.rstrip("/"), filter(exists, beside))
    raise FileNotFoundError(f"{option}={name!r}: there is no such {kind}{'.' if hint else ''}{hint}")
