"""Small training runs from the command line: quick options, and posts in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QUICK = ["--use_cpu", "true", "--disable_tqdm", "true", "--max_new_tokens", "24", "--logging_steps", "1"]
TINY = ["--tiny_hidden_size", "32", "--tiny_vocab_size", "600", "--tiny_image_size", "32", "--per_device_train_batch_size", "8"]


def head(source: Path, lines: int, target: Path) -> Path:
    """Copy the first lines of a file."""
    with source.open(encoding="utf-8") as file:
        target.write_text("".join(next(file) for _ in range(lines)), encoding="utf-8")
    return target


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON Lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write a file of JSON Lines; return its name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
