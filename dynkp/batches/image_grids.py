"""Image grids: which tokens of a prompt belong to an image, and how they are laid out in rows and columns.

A grid is the model's own grid of image tokens: one per image (LLaVA, Qwen-VL, Gemma 3) or one per tile of an image
(InternVL, Idefics3, SmolVLM).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Processors that spend the same square number of tokens on every image or tile, and the attribute that has the number.
_SQUARES = {
    "InternVLProcessor": "image_seq_length",
    "Idefics3Processor": "image_seq_len",
    "SmolVLMProcessor": "image_seq_len",
    "Gemma3Processor": "image_seq_length",
}


@dataclass(frozen=True)
class ImageGrid:
    """The tokens of one image, or of one tile of it.

    Attributes:
        slots (`tuple[int, ...]`): positions in the padded prompt, row by row; height * width of them.
        height (`int`): number of rows, in tokens.
        width (`int`): number of columns, in tokens.
    """

    slots: tuple[int, ...]
    height: int
    width: int


def image_grids(processor: Any, prompt: Mapping[str, Any]) -> list[tuple[ImageGrid, ...]]:
    """Find the grids of image tokens in each prompt of a batch.

    LLaVA has one grid per image, the patches of the vision tower. Qwen-VL has one per image, the patches after merging, of
    any aspect ratio. InternVL, Idefics3 and SmolVLM have one per tile. Gemma 3 has one per image, after pooling.

    Args:
        processor ([`~transformers.ProcessorMixin`]): the model's processor.
        prompt (`Mapping`): its output for B prompts: `input_ids` (B, P), pixels, grids.

    Returns:
        `list[tuple[ImageGrid, ...]]`: the grids of each of the B prompts, in the order of their tokens.

    Raises:
        ValueError: for Mllama, whose images have no tokens in the prompt, and for processors whose grid is unknown.
    """
    name = type(processor).__name__
    if "cross_attention_mask" in prompt:
        raise ValueError(
            f"`mask_image`: the images of {name.removesuffix('Processor')} have no tokens in the prompt, they are read by "
            "cross-attention, so there is no grid to mask. Set `mask_image=False`, or use a model of another family."
        )
    # Gemma 3's processor gives the name `image_token_id` to the token in front of an image.
    image_token = (processor.tokenizer if name == "Gemma3Processor" else processor).image_token_id
    image_slots = [[slot for slot, token in enumerate(ids) if token == image_token] for ids in prompt["input_ids"].tolist()]
    sizes = _grid_sizes(processor, prompt)
    layouts = []
    for slots in image_slots:
        grids, taken = [], 0
        while taken < len(slots):
            height, width = next(sizes, (0, 0))
            cells = slots[taken : taken + height * width]
            if not cells or len(cells) != height * width:
                raise ValueError(
                    f"`mask_image`: {name} wrote {len(slots)} image tokens into a prompt, which {height}x{width} tokens per "
                    "image do not account for (with LLaVA: `vision_feature_select_strategy='full'` has a token without a "
                    "position in the grid). Set `mask_image=False`."
                )
            grids.append(ImageGrid(tuple(cells), height, width))
            taken += len(cells)
        layouts.append(tuple(grids))
    return layouts


def _grid_sizes(processor: Any, prompt: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield height and width, in tokens, of each grid of the batch."""
    name = type(processor).__name__
    if prompt.get("image_grid_thw") is not None:
        merge = processor.image_processor.merge_size
        for frames, height, width in prompt["image_grid_thw"].tolist():
            yield from [(height // merge, width // merge)] * frames
    elif name == "LlavaProcessor" and "pixel_values" in prompt and "image_sizes" not in prompt:
        height, width = (side // processor.patch_size for side in prompt["pixel_values"].shape[-2:])
        yield from [(height, width)] * prompt["pixel_values"].shape[0]
    elif name in _SQUARES:
        tokens = getattr(processor, _SQUARES[name])
        side = math.isqrt(tokens)
        while side * side == tokens:
            yield side, side
    else:
        raise ValueError(
            f"`mask_image`: the layout of {name}'s image tokens is unknown. Known: LLaVA, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, "
            f"{', '.join(known.removesuffix('Processor') for known in _SQUARES)}. Set `mask_image=False`."
        )
