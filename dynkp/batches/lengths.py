"""Lengths of prompts and targets in tokens, measured before training without running the images through the processor.

The lengths equal those of the collator's batches: the number of placeholders of an image depends on its size alone, so each
distinct size is put through the processor once, as an image of one colour.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from PIL import Image

from dynkp.batches.collators import PairedTargetCollator


class PostLength(NamedTuple):
    """Length of one post in tokens.

    Attributes:
        id: the post's id.
        prompt: tokens of its prompt, image placeholders included.
        target: tokens of its longest target, end of turn included; 0 if it has none.
    """

    id: str
    prompt: int
    target: int


def post_lengths(collator: PairedTargetCollator, posts: Iterable[Mapping[str, Any]]) -> Iterator[PostLength]:
    """Measure posts as `collator` would collate them, without its limit `max_length`.

    Args:
        collator ([`~dynkp.batches.collators.PairedTargetCollator`]): gives the processor, the task and the target kinds.
        posts (`Iterable[Mapping]`): posts with an `id`; images are decoded, one post at a time, for their size.

    Yields:
        [`PostLength`]: one per post, in the posts' order.
    """
    renderer = collator.renderer
    placeholders: dict[tuple[tuple[int, int], ...], int] = {}

    def tokens(text: str) -> int:
        return len(renderer.tokenizer(text, add_special_tokens=renderer.add_special_tokens)["input_ids"])

    def placeholders_of(sizes: tuple[tuple[int, int], ...]) -> int:
        if sizes not in placeholders:
            post = {"id": "empty", "text": "", "keyphrases": []}
            images = [Image.new("RGB", size) for size in sizes]
            expanded = collator.collate_prompts([post], [images])["input_ids"].shape[1]
            placeholders[sizes] = expanded - tokens(renderer.prompt(post, len(sizes)))
        return placeholders[sizes]

    for row in posts:
        images = renderer.images(row)
        prompt = tokens(renderer.prompt(row, len(images)))
        if images:
            prompt += placeholders_of(tuple(image.size for image in images))
        targets = [renderer.target(row, len(images), kind) for kind in collator.kinds]
        lengths = [0 if target is None else len(renderer.tokenize_target(target).input_ids) for target in targets]
        yield PostLength(str(row["id"]), prompt, max(lengths))
