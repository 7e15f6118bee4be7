"""Evaluation of a reasoning task by generating labels: the figure by which MulCoT-RD chooses its checkpoint.

Given   a trainer's model and evaluation posts with labels.
Gives   accuracy, macro and weighted F1 of the labels that the label prompt is answered with.
Holds   prompts are made of text, pictures and aspect alone; an output that names no label counts as wrong; ranks share the
        posts and know all the same figures afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from datasets import Dataset

from dynkp.data.reasoning_tasks import ReasoningTask
from dynkp.prediction.generation import generate_reasoning
from dynkp.report.sentiment import classification_scores


def label_metrics(
    model: Any,
    processor: Any,
    posts: Iterable[Mapping[str, Any]],
    *,
    task: ReasoningTask,
    limit: int | None,
    batch_size: int,
    max_new_tokens: int,
    rank: int,
    ranks: int,
    gather: Callable[[list[Any]], list[Any]],
    progress: bool,
) -> dict[str, float]:
    """Answer the label prompt for the posts, score all of them, and return the same metrics on every rank.

    Args:
        task: with labels.
        others: as in [`~dynkp.trainer.generative_evaluation.generative_metrics`].

    Returns:
        `accuracy`, `macro_f1`, `weighted_f1` (scikit-learn's, over the task's labels), `unread_share` (outputs that name no
        label), `generated_posts`, `output_tokens`. Empty if there is no post.
    """
    gold: list[str] = []

    def mine() -> Iterator[Mapping[str, Any]]:
        if isinstance(posts, Dataset):  # reads only this rank's rows
            rows: Iterable[Any] = posts.select(range(rank, len(posts) if limit is None else min(limit, len(posts)), ranks))
        else:
            rows = islice(posts, rank, limit, ranks)
        for row in rows:
            gold.append(task.answer(row))
            yield row

    answered = list(
        generate_reasoning(
            model, processor, mine(), task=task, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=progress
        )
    )
    pairs = [(label, row["prediction"], row["output_tokens"]) for label, row in zip(gold, answered, strict=True)]
    pairs = gather(pairs)
    if not pairs:
        return {}
    right, said, tokens = zip(*pairs, strict=True)
    scores = classification_scores(said, right, task.labels)
    return {
        **{name: scores[name] for name in ("accuracy", "macro_f1", "weighted_f1")},
        "unread_share": scores["unread"] / len(pairs),
        "generated_posts": len(pairs),
        "output_tokens": sum(tokens) / len(pairs),
    }
