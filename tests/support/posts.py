"""Small hostile-enough posts for tests: unequal lengths, with and without picture, with and without rationale."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (56, 42)) -> Image.Image:
    """Noise, so that two pictures never give equal features."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def rows(family: str, count: int = 4, images: bool = True) -> list[dict[str, Any]]:
    """Post rows that fit the family: text models get no pictures, Mllama no mixture (see tests/support/tiny_models.py)."""
    from tests.support.tiny_models import TEXT_FAMILIES

    posts = [
        {"text": "goal", "keyphrases": ["mufc"], "rationale": "They scored.", "pictures": 1},
        {
            "text": "a very long day at the sea with the dog and far too many words for one post",
            "keyphrases": ["summer holidays", "dog"],
            "rationale": "The text speaks of the sea and of a dog, so people who tag such posts would think of holidays.",
            "pictures": 0,
        },
        {"text": "new phone, great camera", "keyphrases": ["tech", "review", "phones"], "rationale": None, "pictures": 2},
        {"text": "", "keyphrases": ["sunset"], "rationale": "A picture alone, of an evening.", "pictures": 1},
    ]
    result = []
    for index in range(count):
        post = dict(posts[index % len(posts)], id=f"post-{index}")
        pictures = post.pop("pictures")
        if not images or family in TEXT_FAMILIES:
            pictures = 0
        elif family == "mllama":
            pictures = 1
        if not pictures and not post["text"]:
            post["text"] = "what an evening"
        post["images"] = [picture(10 * index + k, (56 + 14 * k, 42)) for k in range(pictures)]
        result.append(post)
    return result
