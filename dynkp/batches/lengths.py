"""Lengths of prompts and targets in tokens, before the first step, without running a picture through the processor.

Given   a collator and posts.
Gives   per post the tokens of its prompt, image placeholders included, and of its longest target.
Holds   equal to what the collator makes of the post: a picture's number of placeholders depends on its size alone, so
        each distinct size is put through the processor once, as a blank picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from PIL import Image

from dynkp.batches.collators import PairedTargetCollator


class PostLength(NamedTuple):
    """Tokens of one post: `prompt` with its image placeholders, `target` the longer one of its targets."""

    id: str
    prompt: int
    target: int


def post_lengths(collator: PairedTargetCollator, posts: Iterable[Mapping[str, Any]]) -> Iterator[PostLength]:
    """Measure posts as `collator` would make them.

    Args:
        collator: its processor, task and target kinds count; its `max_length` does not.
        posts: rows with `id`; pictures are decoded, one post at a time, for their size.

    Returns:
        An iterator of [`PostLength`], in the posts' order.
    """
    renderer = collator.renderer
    placeholders: dict[tuple[tuple[int, int], ...], int] = {}

    def tokens(text: str) -> int:
        return len(renderer.tokenizer(text, add_special_tokens=False)["input_ids"])

    def placeholders_of(sizes: tuple[tuple[int, int], ...]) -> int:
        if sizes not in placeholders:
            blank = {"id": "blank", "text": "", "keyphrases": []}
            pictures = [Image.new("RGB", size) for size in sizes]
            expanded = collator.collate_prompts([blank], [pictures])["input_ids"].shape[1]
            placeholders[sizes] = expanded - tokens(renderer.prompt(blank, len(sizes)))
        return placeholders[sizes]

    for row in posts:
        pictures = renderer.images(row)
        prompt = tokens(renderer.prompt(row, len(pictures)))
        if pictures:
            prompt += placeholders_of(tuple(picture.size for picture in pictures))
        targets = [getattr(renderer, f"{kind}_target")(row, len(pictures)) for kind in collator.kinds]
        yield PostLength(str(row["id"]), prompt, max(tokens(target) if target is not None else 0 for target in targets))
