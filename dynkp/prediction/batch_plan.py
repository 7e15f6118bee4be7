"""Batch plans: which posts are generated for together, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def prompt_size(row: Mapping[str, Any]) -> tuple[int, int]:
    """Return a stand-in for the length of a post's prompt that needs neither its images nor a tokenizer.

    Args:
        row: the post.

    Returns:
        The number of images and the number of characters.

    Example:
        >>> prompt_size({"text": "my dog", "images": ["dog.jpg"]})
        (1, 6)
    """
    images = row.get("images")
    count = len(images) if images is not None else int(row.get("image") is not None)
    return count, len(str(row.get("prompt") or row.get("text") or ""))


def plan_batches(sizes: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Divide posts into batches with the same number of images and prompts of similar length.

    Args:
        sizes: per post what `prompt_size` returns.
        batch_size: the greatest number of posts of a batch.

    Returns:
        Batches of indices into `sizes`, longest posts first: a batch that does not fit into memory fails at once.

    Example:
        >>> plan_batches([(1, 5), (0, 9), (1, 80), (1, 7)], 2)
        [[2, 3], [0], [1]]
    """
    order = sorted(range(len(sizes)), key=lambda index: sizes[index], reverse=True)
    batches = []
    while order:
        num_images = sizes[order[0]][0]
        batch = [index for index in order[:batch_size] if sizes[index][0] == num_images]
        order = order[len(batch) :]
        batches.append(batch)
    return batches
