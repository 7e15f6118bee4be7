"""Evaluation of a reasoning task by generating labels: the metrics by which MulCoT-RD selects its checkpoint.

Prompts are made of text, images and aspect alone. An output without a label counts as wrong. Ranks share the posts and have
equal metrics afterwards.
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
    """Generate answers to the label prompt for posts and score all of them.

    Args:
        model (`torch.nn.Module`): the unwrapped model.
        processor ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]): its processor or tokenizer.
        posts (`Iterable`): evaluation posts with labels, the same on every rank.
        task ([`~dynkp.data.reasoning_tasks.ReasoningTask`]): a task with labels.
        limit (`int` or `None`): number of posts from the start that are generated for; all, if `None`.
        batch_size (`int`): posts per batch.
        max_new_tokens (`int`): greatest length of an output in tokens.
        rank (`int`): index of this process.
        ranks (`int`): number of processes.
        gather (`Callable`): joins the lists of all ranks; called on every rank.
        progress (`bool`): show a progress bar.

    Returns:
        `dict[str, float]`: equal on every rank: `accuracy`, `macro_f1`, `weighted_f1` (scikit-learn's, over the task's labels),
        `unread_share` (outputs without a label), `generated_posts`, `output_tokens`. Empty if there is no post.
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
    right, predicted, tokens = zip(*pairs, strict=True)
    scores = classification_scores(predicted, right, task.labels)
    return {
        **{name: scores[name] for name in ("accuracy", "macro_f1", "weighted_f1")},
        "unread_share": scores["unread"] / len(pairs),
        "generated_posts": len(pairs),
        "output_tokens": sum(tokens) / len(pairs),
    }
