"""Batches for AimKP: prompts and direct targets, and where each post's text and pictures lie in its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynkp.batches.collators import PairedTargetCollator
from dynkp.batches.prompt_layout import locate


class MaskingCollator(PairedTargetCollator):
    """A [`PairedTargetCollator`] whose batches can be masked.

    Args:
        *args, **kwargs: as for [`PairedTargetCollator`].
        modalities (`Sequence[str]`): what will be masked, of `"text"` and `"image"`.
        alone (`bool`, *optional*, defaults to `False`): also collate each post alone, for the plain way.

    Returns (when called with a list of rows): what [`PairedTargetCollator`] returns, and
        - `layouts`: B [`~dynkp.batches.prompt_layout.PromptLayout`]s;
        - `alone` (if asked for): B batches of one post, each with its `layouts`.

    Raises:
        ValueError: naming the post, if its text or the grid of its pictures cannot be found in its prompt.

    Example:

    ```python
    >>> batch = MaskingCollator(processor, kinds=("direct",), modalities=("text", "image"))(posts)
    >>> batch["layouts"][0].grids[0].height, batch["layouts"][0].grids[0].width
    (24, 24)
    ```
    """

    def __init__(self, *args: Any, modalities: Sequence[str] = ("text", "image"), alone: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.modalities = tuple(modalities)
        self.alone = alone

    def collate(self, rows: Sequence[Mapping[str, Any]], images: Sequence[list[Any]]) -> dict[str, Any]:
        batch = super().collate(rows, images)
        counts = [len(pictures) for pictures in images]
        batch["layouts"] = locate(self.renderer, rows, counts, batch["prompt"], self.modalities)
        if self.alone:
            batch["alone"] = []
            for row, pictures in zip(rows, images, strict=True):
                single = super().collate([row], [pictures])
                single["layouts"] = locate(self.renderer, [row], [len(pictures)], single["prompt"], self.modalities)
                batch["alone"].append(single)
        return batch
