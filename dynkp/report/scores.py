"""A run's figures: one dictionary per system, and the table that compares systems.

Given   predictions of some posts and the posts themselves.
Gives   scores of convention `cmkp` with the figures that belong beside them: share of reasoning, length of the output.
Holds   predictions and posts are matched by id, never by position; a missing or unknown id is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynkp.mmkp_f1.outputs import list_statistics
from dynkp.mmkp_f1.scoring import score_keyphrases


def summarise(
    predictions: Iterable[Mapping[str, Any]], posts: Iterable[Mapping[str, Any]], train_keyphrases: Iterable[str]
) -> dict[str, Any]:
    """Score one system's predictions.

    Args:
        predictions: rows with `id` and `keyphrases`; of `reasoned`, `output_words` and `output_tokens`, what there is.
        posts: rows with `id`, `text` and `keyphrases`, each predicted exactly once.
        train_keyphrases: what makes a keyphrase "seen".

    Returns:
        `dict` with `convention`, `posts`, `subsets` (as [`score_keyphrases`] gives them), `empty_share`,
        `keyphrases_per_post`, `repeat_share` and, where predictions have them, `reasoning_share`, `output_words`,
        `output_tokens` (means per post).

    Raises:
        ValueError: listing the first ids, if predictions and posts do not match.
    """
    gold: dict[str, tuple[list[str], str]] = {}
    for post in posts:
        gold[str(post["id"])] = (list(post["keyphrases"]), post["text"] or "")
    by_id: dict[str, Mapping[str, Any]] = {}
    for row in predictions:
        if row["id"] in by_id:
            raise ValueError(f"the id {row['id']!r} is predicted twice; keep one prediction per post")
        by_id[row["id"]] = row
    if wrong := gold.keys() ^ by_id.keys():
        missing = sorted(wrong & gold.keys())[:5]
        unknown = sorted(wrong & by_id.keys())[:5]
        raise ValueError(f"predictions and posts do not match: missing {missing}, unknown {unknown} (first five of each)")
    rows = [by_id[post_id] for post_id in gold]
    lists = [list(row["keyphrases"]) for row in rows]
    summary: dict[str, Any] = {
        "convention": "cmkp",
        "posts": len(rows),
        "subsets": score_keyphrases(
            lists,
            [keyphrases for keyphrases, _ in gold.values()],
            texts=[text for _, text in gold.values()],
            train_keyphrases=train_keyphrases,
        ),
        **list_statistics(lists),
    }
    for column, name in (
        ("reasoned", "reasoning_share"),
        ("output_words", "output_words"),
        ("output_tokens", "output_tokens"),
    ):
        if all(column in row for row in rows):
            summary[name] = sum(row[column] for row in rows) / len(rows)
    return summary


def table(systems: Mapping[str, Mapping[str, Any]], subsets: Sequence[str] = ("all", "seen", "unseen")) -> str:
    """Lay several systems' summaries out as a Markdown table, in percent, with post counts in the header.

    Args:
        systems: name -> what [`summarise`] returned.
        subsets: which subsets' F1@1 to show; those that no system has are left out.

    Returns:
        The table's text.
    """
    shown = [name for name in subsets if any(name in system["subsets"] for system in systems.values())]
    first = next(iter(systems.values()))
    heads = [f"F1@1 {name} ({first['subsets'][name]['posts']:,} posts)" for name in shown]
    header = ["system", *heads, "P@1 all", "reasoning", "output words", "no keyphrase"]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for name, system in systems.items():
        scores = [_percent(system["subsets"][subset]["f1@1"]) for subset in shown]
        words = f"{system['output_words']:.1f}" if "output_words" in system else "-"
        lines.append(
            [
                name,
                *scores,
                _percent(system["subsets"]["all"]["p@1"]),
                _percent(system.get("reasoning_share")),
                words,
                _percent(system["empty_share"]),
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) if index == 0 else cell.rjust(width) for index, (cell, width) in row) + " |"
        for row in (list(enumerate(zip(line, widths, strict=True))) for line in lines)
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON; the file appears, or is replaced, only when it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
