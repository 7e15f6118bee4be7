"""Accuracy of generated labels: the figures that choose a checkpoint are scikit-learn's on what the model said.

Holds: an output that names no label is wrong; ranks that share the posts know the figures of all of them; a limit counts posts
from the start; the model is asked without its gold columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from datasets import Dataset
from sklearn.metrics import f1_score

from dynkp.data.reasoning_tasks import REASONING_TASKS
from dynkp.trainer import label_evaluation
from dynkp.trainer.label_evaluation import label_metrics

GOLD = ("positive", "neutral", "negative", "neutral", "positive", "negative")
SAID = ("positive", "neutral", "positive", None, "positive", "negative")
POSTS = [{"id": str(index), "text": "t", "label": label, "images": []} for index, label in enumerate(GOLD)]


@pytest.fixture(autouse=True)
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(model: Any, processor: Any, posts: Any, **kwargs: Any) -> Iterator[Mapping[str, Any]]:
        for row in posts:
            yield {"prediction": SAID[int(row["id"])], "output_tokens": 10 + int(row["id"])}

    monkeypatch.setattr(label_evaluation, "generate_reasoning", generate)


def metrics(posts: Any, rank: int = 0, ranks: int = 1, limit: int | None = None, gather: Any = lambda values: values) -> Any:
    how: dict[str, Any] = {"batch_size": 2, "max_new_tokens": 8, "progress": False, "limit": limit}
    return label_metrics(None, None, posts, task=REASONING_TASKS["msc"], rank=rank, ranks=ranks, gather=gather, **how)


@pytest.mark.parametrize("posts", [POSTS, Dataset.from_list(POSTS)], ids=["list", "dataset"])
def test_figures(posts: Any) -> None:
    found = metrics(posts)
    said = [label or "" for label in SAID]
    labels = ["positive", "neutral", "negative"]
    assert found["accuracy"] == pytest.approx(4 / 6) and found["unread_share"] == pytest.approx(1 / 6)
    assert found["macro_f1"] == pytest.approx(f1_score(GOLD, said, labels=labels, average="macro"))
    assert found["weighted_f1"] == pytest.approx(f1_score(GOLD, said, labels=labels, average="weighted"))
    assert found["generated_posts"] == 6 and found["output_tokens"] == 12.5


def test_ranks_share_the_posts() -> None:
    shares: dict[int, list[Any]] = {}
    for rank in (0, 1):
        metrics(POSTS, rank, 2, gather=lambda values, rank=rank: shares.setdefault(rank, values))
    assert [len(share) for share in shares.values()] == [3, 3]
    together = metrics(POSTS, 0, 2, gather=lambda values: shares[0] + shares[1])
    assert together == metrics(POSTS)


@pytest.mark.parametrize("posts", [POSTS, Dataset.from_list(POSTS)], ids=["list", "dataset"])
def test_a_limit_counts_from_the_start(posts: Any) -> None:
    found = metrics(posts, limit=3)
    assert found["generated_posts"] == 3 and found["accuracy"] == pytest.approx(2 / 3)
    assert metrics([], limit=None) == {}
