"""Evaluation by generating: the figures a run is judged by, measured while it trains.

Given   a trainer's model and evaluation posts.
Gives   F1, MAP, subsets, share of reasoning and length of the outputs, as `dynkp predict` and `dynkp evaluate` give them
        for the same weights and posts.
Holds   prompts are made of text and pictures alone, and no limit depends on a gold answer; ranks share the posts and
        know all the same figures afterwards; posts are scored as they come and not kept, so memory does not grow with
        their number.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from datasets import Dataset

from dynkp.data.tasks import KeyphraseTask
from dynkp.mmkp_f1.scoring import KeyphraseScorer
from dynkp.prediction.generation import generate_keyphrases

# Logged of every subset; of all posts, the measures of the composite too.
SUBSET_MEASURES = ("f1@1",)
COMPOSITE = ("f1@1", "f1@3", "map@5")
# Predictions scored together: scoring one by one would cost more.
_SCORED_AT_A_TIME = 256


def generative_metrics(
    model: Any,
    processor: Any,
    posts: Iterable[Mapping[str, Any]],
    *,
    task: KeyphraseTask,
    train_keyphrases: Iterable[str] | None,
    limit: int | None,
    batch_size: int,
    max_new_tokens: int,
    convention: str,
    rank: int,
    ranks: int,
    gather: Callable[[list[Any]], list[Any]],
    progress: bool,
    generate: Callable[..., Iterator[Any]] = generate_keyphrases,
) -> dict[str, float]:
    """Generate for the posts, score all of them, and return the same metrics on every rank.

    Args:
        model: the unwrapped model.
        processor: its processor or tokenizer.
        posts: evaluation posts, the same on every rank; a stream will do.
        task: template and separator.
        train_keyphrases: for the subsets seen and unseen; left out if `None`.
        limit: number of posts from the start that are generated for; all if `None`.
        batch_size: posts per call of `generate`.
        max_new_tokens: longest output, for every post alike.
        convention: of the scores.
        rank, ranks: this process and how many there are.
        gather: collective that joins the ranks' lists.
        progress: whether to show a progress bar.
        generate: what predicts.

    Returns:
        `f1@1`, `f1@3`, `map@5` and `composite` (their sum) over all posts, `SUBSET_f1@1`, `generated_posts`,
        `generated_reasoning_share`, `output_words`, `output_tokens`, `empty_share`. Empty if there is no post.
    """
    gold: deque[tuple[list[str], str]] = deque()  # of posts generated for and not yet scored

    def mine() -> Iterator[Mapping[str, Any]]:
        if isinstance(posts, Dataset):  # reads only this rank's rows
            rows: Iterable[Any] = posts.select(range(rank, len(posts) if limit is None else min(limit, len(posts)), ranks))
        else:
            rows = islice(posts, rank, limit, ranks)
        for row in rows:
            gold.append((gold_keyphrases(row, task), row.get("text") or ""))
            yield row

    predictions = generate(
        model, processor, mine(), task=task, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=progress
    )
    subsets = ["all", "present", "absent"] + (["seen", "unseen"] if train_keyphrases is not None else [])
    own, whole = (KeyphraseScorer(convention=convention, subsets=subsets, train_keyphrases=train_keyphrases) for _ in range(2))
    sums: Counter[str] = Counter()
    while rows := list(islice(predictions, _SCORED_AT_A_TIME)):
        references, texts = zip(*(gold.popleft() for _ in rows), strict=True)
        own.add_batch([row["keyphrases"] for row in rows], references, texts)
        sums["posts"] += len(rows)
        sums["empty"] += sum(not row["keyphrases"] for row in rows)
        for column in ("reasoned", "output_words", "output_tokens"):
            sums[column] += sum(row[column] for row in rows)
    gathered = gather([(own.totals(), sums)])
    sums = Counter()
    for totals, counts in gathered:
        whole.add_totals(totals)
        sums.update(counts)
    if not (count := sums["posts"]):
        return {}
    scores = whole.compute()
    metrics = {name: scores["all"][name] for name in COMPOSITE}
    metrics["composite"] = sum(metrics.values())
    for subset in subsets[1:]:
        # A subset without posts has no score; a zero would be one.
        metrics |= {f"{subset}_{name}": scores[subset][name] for name in SUBSET_MEASURES if scores[subset]["posts"]}
    return metrics | {
        "generated_posts": count,
        "generated_reasoning_share": sums["reasoned"] / count,
        "output_words": sums["output_words"] / count,
        "output_tokens": sums["output_tokens"] / count,
        "empty_share": sums["empty"] / count,
    }


def gold_keyphrases(row: Mapping[str, Any], task: KeyphraseTask) -> list[str]:
    """A post's keyphrases; those in its direct completion, if it is a row in TRL's prompt-completion form."""
    if row.get("keyphrases"):
        return list(row["keyphrases"])
    completion = row["completion"]
    return task.parse(completion if isinstance(completion, str) else completion[0]["content"]).keyphrases


def keyphrases_of(posts: Any) -> set[str] | None:
    """All keyphrases of a training set; `None` for a stream and for rows without that column."""
    if not isinstance(posts, Dataset) or "keyphrases" not in posts.column_names:
        return None
    return {phrase for phrases in posts["keyphrases"] for phrase in phrases or ()}
