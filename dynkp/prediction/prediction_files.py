"""Prediction files: JSON Lines with `id`, `keyphrases` (or another answer) and `raw`; writing, reading, matching with posts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dynkp.files.json_lines import read_json_lines, write_json_lines


def read_predictions(path: str | os.PathLike[str], answer: str = "keyphrases") -> list[dict[str, Any]]:
    """Read a predictions file, as `dynkp predict` writes it.

    Args:
        path: a JSON Lines file of rows with `id`, the answer, and any other columns.
        answer: the required column: `keyphrases`, lists of strings, or a column of strings and nulls (`prediction`, `raw`).

    Returns:
        The rows, with ids as strings.

    Raises:
        ValueError: naming file and line, if a line is not a prediction.
    """
    return [_checked(row, where, answer) for where, row in read_json_lines(path)]


def _checked(row: Any, where: str, answer: str) -> dict[str, Any]:
    if not isinstance(row, dict) or "id" not in row or answer not in row:
        raise ValueError(f"{where}: a prediction must be an object with 'id' and {answer!r}, got {row!r:.80}")
    if not isinstance(row["id"], str | int) or isinstance(row["id"], bool):
        raise ValueError(f"{where}: 'id' must be a string, got {row['id']!r:.80}")
    value = row[answer]
    if answer != "keyphrases":
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{where}, id {row['id']!r}: {answer!r} must be a string or null, got {value!r:.80}")
    elif not isinstance(value, list) or not all(isinstance(phrase, str) for phrase in value):
        raise ValueError(f"{where}, id {row['id']!r}: 'keyphrases' must be a list of strings, got {value!r:.80}")
    for column in ("reasoned", "output_words", "output_tokens"):
        if isinstance(value := row.get(column), float) and not math.isfinite(value):
            raise ValueError(f"{where}, id {row['id']!r}: {column!r} must be a number, got {value!r}")
    decode = row.get("decode", 0)
    if not isinstance(decode, int) or isinstance(decode, bool):
        raise ValueError(f"{where}, id {row['id']!r}: 'decode' must be a whole number, got {decode!r:.80}")
    return {**row, "id": str(row["id"])}


def match_predictions(
    rows: Iterable[Mapping[str, Any]], gold: Sequence[Any], *, allow_missing: bool = False
) -> tuple[list[list[Mapping[str, Any]]], int]:
    """Sort a system's predictions into the posts' order, one list for each decode.

    Args:
        rows: predictions; several decodes of a post are distinguished by the column `decode`.
        gold: the posts, each with an attribute `id`.
        allow_missing: whether a post without prediction gets one without keyphrases.

    Returns:
        Per decode the rows in the posts' order, and the number of missing rows that were added.

    Raises:
        ValueError: listing the ids that are unknown, repeated or missing.
    """
    decodes: dict[int, dict[str, Mapping[str, Any]]] = {}
    problems: dict[str, list[str]] = {"repeated": [], "unknown": [], "missing": []}
    known = {post.id for post in gold}
    for row in rows:
        decode = decodes.setdefault(row.get("decode", 0), {})
        if row["id"] in decode:
            problems["repeated"].append(row["id"])
        elif row["id"] not in known:
            problems["unknown"].append(row["id"])
        decode[row["id"]] = row
    matched = []
    missing = 0
    for _, decode in sorted(decodes.items() or [(0, {})]):
        absent = [post.id for post in gold if post.id not in decode]
        missing += len(absent)
        problems["missing"] += [] if allow_missing else absent
        matched.append([decode.get(post.id) or {"id": post.id, "keyphrases": []} for post in gold])
    if any(problems.values()):
        found = "; ".join(f"{name} ids: {listed(dict.fromkeys(ids))}" for name, ids in problems.items() if ids)
        remedy = "; allow_missing=True (--allow-missing) scores missing predictions as empty" if problems["missing"] else ""
        raise ValueError(f"predictions and posts do not match: {found}{remedy}")
    return matched, missing


def listed(ids: Iterable[str]) -> str:
    """Return ids for an error message: the first ones, and their number.

    Args:
        ids: the ids.

    Example:
        >>> listed(["1", "2"])
        "'1', '2'"
    """
    ids = list(ids)
    more = f", ... ({len(ids):,} in all)" if len(ids) > _SHOWN else ""
    return ", ".join(map(repr, ids[:_SHOWN])) + more


def write_predictions(path: str | os.PathLike[str], predictions: Iterable[Mapping[str, Any]]) -> int:
    """Write predictions as JSON Lines, atomically: the file is created or replaced only when it is complete.

    Args:
        path: the file; missing folders are created.
        predictions: rows as `generate_keyphrases` yields them, possibly with further columns.

    Returns:
        The number of rows.

    Example:
        >>> import tempfile
        >>> write_predictions(f"{tempfile.mkdtemp()}/predictions.jsonl", [{"id": "1", "keyphrases": ["beagles"]}])
        1
    """
    return write_json_lines(path, predictions)


# Number of ids in an error message.
_SHOWN = 20
