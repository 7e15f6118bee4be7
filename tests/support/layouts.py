"""Posts collated for AimKP, with their layouts."""

from __future__ import annotations

from typing import Any

from dynkp.batches.collators import PairedTargetCollator
from dynkp.batches.prompt_layout import locate


def located(processor: Any, posts: list[dict[str, Any]], modalities: tuple[str, ...] = ("text", "image")):
    """The layouts of the posts, their prompts, and the collator."""
    collator = PairedTargetCollator(processor, task="aimkp", kinds=("direct",))
    images = [collator.renderer.images(post) for post in posts]
    prompt = collator.collate_prompts(posts, images)
    return locate(collator.renderer, posts, [len(own) for own in images], prompt, modalities), prompt, collator
