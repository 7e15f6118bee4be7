"""A run's figures: one dictionary per system, and the table that compares systems.

Given   predictions of some posts and the posts themselves.
Gives   scores with the figures that belong beside them: share of reasoning, length of the output.
Holds   predictions and posts are matched by id, never by position; a missing or unknown id is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dynkp.mmkp_f1.outputs import list_statistics
from dynkp.mmkp_f1.scoring import score_keyphrases
from dynkp.prediction.prediction_files import match_predictions
from dynkp.report.evaluation import gold_posts, output_means
from dynkp.report.tables import markdown_table, percent


def summarise(
    predictions: Iterable[Mapping[str, Any]],
    posts: Iterable[Mapping[str, Any]],
    train_keyphrases: Iterable[str] | None,
    convention: str = "cmkp",
) -> dict[str, Any]:
    """Score one system's predictions.

    Args:
        predictions: rows with `id` and `keyphrases`; of `reasoned`, `output_words` and `output_tokens`, what there is.
        posts: rows with `id`, `text` and `keyphrases`, each predicted exactly once.
        train_keyphrases: what makes a keyphrase "seen"; `None` leaves "seen" and "unseen" out.
        convention: of the scores, as in [`score_keyphrases`].

    Returns:
        `dict` with `convention`, `posts`, `subsets` (as [`score_keyphrases`] gives them), `empty_share`,
        `keyphrases_per_post`, `repeat_share` and, where predictions have them, `reasoning_share`, `output_words`,
        `output_tokens` (means per post).

    Raises:
        ValueError: listing the ids, if predictions and posts do not match.
    """
    gold = gold_posts(posts)
    (rows,), _ = match_predictions(predictions, gold)
    lists = [row["keyphrases"] for row in rows]
    scores = score_keyphrases(
        lists,
        [post.keyphrases for post in gold],
        texts=[post.text for post in gold],
        train_keyphrases=train_keyphrases,
        convention=convention,
    )
    return {"convention": convention, "posts": len(rows), "subsets": scores, **list_statistics(lists), **output_means(rows)}


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
    lines = [header]
    for name, system in systems.items():
        scores = [percent(system["subsets"][subset]["f1@1"]) for subset in shown]
        words = f"{system['output_words']:.1f}" if "output_words" in system else "-"
        shares = [percent(system["subsets"]["all"]["p@1"]), percent(system.get("reasoning_share"))]
        lines.append([name, *scores, *shares, words, percent(system["empty_share"])])
    return markdown_table(lines)
