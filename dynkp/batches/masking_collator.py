"""Collators of AimKP: batches with the positions of each post's text and images in its prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dynkp.batches.collators import PairedTargetCollator
from dynkp.batches.prompt_layout import locate
from dynkp.batches.typed_batches import MaskedViewBatch, SinglePostsBatch


class MaskingCollator(PairedTargetCollator):
    """A [`~dynkp.batches.collators.PairedTargetCollator`] whose batches can be masked.

    Args:
        *args: as for [`~dynkp.batches.collators.PairedTargetCollator`].
        modalities (`Sequence[str]`, *optional*, defaults to `("text", "image")`): what will be masked.
        **kwargs: as for [`~dynkp.batches.collators.PairedTargetCollator`].

    Returns (when called with a list of rows):
        [`~dynkp.batches.typed_batches.MaskedViewBatch`]: what `PairedTargetCollator` returns, and `layouts`, B
        [`~dynkp.batches.prompt_layout.PromptLayout`]s.

    Raises:
        ValueError: naming the post, if its text or the grid of its images cannot be found in its prompt.

    Example:
        >>> from PIL import Image
        >>> from dynkp.synthetic.tiny_model import build_tiny_vlm
        >>> model, processor = build_tiny_vlm(["goal", "mufc", "Which keyphrases would the author tag this post with?"])
        >>> post = {"id": "1", "text": "goal", "keyphrases": ["mufc"], "images": [Image.new("RGB", (32, 32))]}
        >>> batch = MaskingCollator(processor, kinds=("direct",), modalities=("text", "image"))([post])
        >>> batch["layouts"][0].grids[0].height, batch["layouts"][0].grids[0].width, batch["layouts"][0].text
        (4, 4, range(17, 18))
    """

    def __init__(self, *args: Any, modalities: Sequence[str] = ("text", "image"), **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.modalities = tuple(modalities)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> MaskedViewBatch:
        """Collate rows of posts, decoding their images."""
        return self.collate(rows, [self.renderer.images(row) for row in rows])

    def collate(self, rows: Sequence[Mapping[str, Any]], images: Sequence[list[Any]]) -> MaskedViewBatch:
        """Collate rows of posts whose images are decoded already; as `PairedTargetCollator.collate`."""
        batch = super().collate(rows, images)
        counts = [len(post_images) for post_images in images]
        return {**batch, "layouts": locate(self.renderer, rows, counts, batch["prompt"], self.modalities)}


class SinglePostsCollator:
    """Adds to each batch the same posts collated one by one, for the plain computation of masked views.

    Args:
        collator (`Callable`): collates posts as [`MaskingCollator`] does.

    Returns (when called with a list of rows):
        [`~dynkp.batches.typed_batches.SinglePostsBatch`]: what `collator` returns, and `single_posts`, B batches of one
        post each.
    """

    def __init__(self, collator: Callable[[Sequence[Mapping[str, Any]]], MaskedViewBatch]):
        self.collator = collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> SinglePostsBatch:
        """Collate rows of posts together and one by one."""
        return {**self.collator(rows), "single_posts": [self.collator([row]) for row in rows]}
