"""Streams train like lists, and posts that only fill up a batch are marked.

Holds: a stream is read in its own order, over its end into a second pass; posts that a rank has from the first batch again are
marked, on every rank its own; a stream and a complete batch have none.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import IterableDataset

from dynkp.trainer.post_streams import PostStreams, repeated_posts
from tests.support.posts import rows
from tests.support.trainers import (
    losses,
    read_choices,
    trainer_of,
)


def post_stream(count: int):
    for post in rows("llava", count):
        yield {
            "id": post["id"],
            "text": post["text"] or "dusk",
            "keyphrases": post["keyphrases"],
            "rationale": post["rationale"],
        }


def test_a_stream_trains_like_a_list(tmp_path: Path) -> None:
    """In the stream's own order, over its end into a second pass."""
    stream = IterableDataset.from_generator(post_stream, gen_kwargs={"count": 5})
    trainer = trainer_of("llava", tmp_path, stream, gamma="avg", max_steps=4, log_choices=True)
    trainer.train()
    assert [row["id"] for row in read_choices(tmp_path)] == [f"post-{i}" for i in (0, 1, 2, 3, 4, 0, 1)]
    assert all(math.isfinite(loss) for loss in losses(trainer))


@pytest.mark.parametrize(
    ("process", "remainder", "end", "expected"),
    [
        (0, 5, True, [False, False, False]),  # the last batches have 6 posts, the last of them a second time
        (1, 5, True, [False, False, True]),
        (0, 2, True, [False, False, True]),
        (1, 2, True, [True, True, True]),
        (1, 2, False, None),  # in the middle of an epoch
        (1, -1, True, None),  # a stream, whose length is not known
        (1, 0, True, None),
    ],
)
def test_repeated_posts_are_behind_the_others(process: int, remainder: int, end: bool, expected: list[bool] | None) -> None:
    """Two ranks with three posts each: the ranks' batches are one after the other."""
    progress = SimpleNamespace(end_of_dataloader=end, remainder=remainder)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(gradient_state=progress, process_index=process))
    batch = {"id": ["a", "b", "c"], "has_rationale": torch.ones(3).bool()}
    PostStreams.mark_repeated_posts(trainer, batch)  # type: ignore[arg-type]
    assert ("repeated" in batch) == (expected is not None)
    assert repeated_posts(batch).tolist() == (expected or [False] * 3)


def test_a_dataset_that_is_no_stream_is_not_skipped_in_the_collator(tmp_path: Path) -> None:
    trainer = trainer_of("llama", tmp_path)
    collator = trainer.data_collator
    trainer.get_train_dataloader()
    trainer.skip_stream(3)
    assert trainer._skipping_collator is None and trainer.data_collator is collator


def test_a_stream_is_skipped_in_the_collator(tmp_path: Path) -> None:
    """Unless the option says that a resumed run reads it from its beginning."""
    stream = IterableDataset.from_generator(post_stream, gen_kwargs={"count": 5})
    for ignore, skipped in ((False, 6), (True, 0)):
        trainer = trainer_of("llava", tmp_path, stream, ignore_data_skip=ignore, gradient_accumulation_steps=2)
        collator = trainer.data_collator
        trainer.get_train_dataloader()
        trainer.skip_stream(3)
        assert trainer.data_collator is collator and trainer._skipping_collator._batches == skipped
