"""The scores of a training run: one dictionary per system, and the table that compares systems.

Given   predictions of some posts, and the posts.
Gives   keyphrase scores, and with them the share of outputs that reason and the length of the outputs.
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


def score_predictions(
    predictions: Iterable[Mapping[str, Any]],
    posts: Iterable[Mapping[str, Any]],
    train_keyphrases: Iterable[str] | None,
    *,
    convention: str = "cmkp",
) -> dict[str, Any]:
    """Score one system's predictions.

    Args:
        predictions: Rows with `id` and `keyphrases`, and optionally `reasoned`, `output_words` and `output_tokens`.
        posts: Rows with `id`, `text` and `keyphrases`; each post is predicted exactly once.
        train_keyphrases: The training set's keyphrases, for the subsets seen and unseen; None leaves these subsets out.
        convention: The scoring convention: `cmkp`, `aimkp`, `padded` or `unpadded`.

    Returns:
        `convention`, `posts`, `subsets` (as `score_keyphrases` returns them), `empty_share`, `keyphrases_per_post`,
        `repeat_share` and, if the predictions have the columns, `reasoning_share`, `output_words` and `output_tokens` (means
        per post).

    Raises:
        ValueError: If predictions and posts do not match; the error lists the ids.

    Example:
        >>> posts = [{"id": "1", "text": "my dog", "keyphrases": ["dog"]}]
        >>> scores = score_predictions([{"id": "1", "keyphrases": ["dogs", "cat"]}], posts, None)
        >>> scores["subsets"]["all"]["f1@1"], scores["keyphrases_per_post"]
        (1.0, 2.0)
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


def comparison_table(systems: Mapping[str, Mapping[str, Any]], subsets: Sequence[str] = ("all", "seen", "unseen")) -> str:
    """Lay out several systems' scores as a Markdown table, in percent, with the number of posts in the column heads.

    Args:
        systems: Name -> scores, as `score_predictions` returns them.
        subsets: The subsets whose F1@1 is shown; a subset that no system has is skipped.

    Returns:
        The table.

    Example:
        >>> scores = {"posts": 2, "f1@1": 0.5, "p@1": 0.5}
        >>> print(comparison_table({"mine": {"subsets": {"all": scores}, "empty_share": 0.0}}))
        | system | F1@1 all (2 posts) | P@1 all | reasoning | output words | no keyphrase |
        | ------ | -----------------: | ------: | --------: | -----------: | -----------: |
        | mine   |              50.00 |   50.00 |         - |            - |         0.00 |
    """
    shown = [name for name in subsets if any(name in system["subsets"] for system in systems.values())]
    first = next(iter(systems.values()))
    heads = [f"F1@1 {name} ({first['subsets'][name]['posts']:,} posts)" for name in shown]
    rows = [["system", *heads, "P@1 all", "reasoning", "output words", "no keyphrase"]]
    for name, system in systems.items():
        scores = [percent(system["subsets"][subset]["f1@1"]) for subset in shown]
        words = f"{system['output_words']:.1f}" if "output_words" in system else "-"
        shares = [percent(system["subsets"]["all"]["p@1"]), percent(system.get("reasoning_share"))]
        rows.append([name, *scores, *shares, words, percent(system["empty_share"])])
    return markdown_table(rows)
