"""Where a post lies in its prompt: the slots of its own text, and those of its pictures with their place in the grid.

Given   posts, the renderer that wrote their prompts, and the processor's output for them, padded on the left.
Gives   per post a [`PromptLayout`]: a run of slots for the text, and one grid of slots per picture or tile.
Holds   the text's slots decode to the post's text and to nothing else: not to the instruction (whatever the text
        repeats of it), a system message, the template or an answer. A grid is the model's own grid of image tokens.

A token belongs to the text if it holds a character of it and, besides, at most blanks: byte-level vocabularies join a
word with the blank in front of it, and a full stop with the line break behind it. Blanks at the text's two ends are
nobody's words and do not count; some templates cut them off anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the renderer's module imports mechanics
    from dynkp.batches.renderers import PromptRenderer

# Stands for the text when the template is asked what it puts around it. Private use: no template contains it.
_MARKER = "\ue000"
# Processors that spend the same square of tokens on every picture or tile, and the attribute that counts them.
_SQUARES = {
    "InternVLProcessor": "image_seq_length",
    "Idefics3Processor": "image_seq_len",
    "SmolVLMProcessor": "image_seq_len",
    "Gemma3Processor": "image_seq_length",
}


@dataclass(frozen=True)
class ImageGrid:
    """The tokens of one picture, or of one tile of it.

    Attributes:
        slots (`tuple[int, ...]`): places in the padded prompt, row by row; height * width of them.
        height, width (`int`): tokens.
    """

    slots: tuple[int, ...]
    height: int
    width: int


@dataclass(frozen=True)
class PromptLayout:
    """One post's place in its padded prompt. Without text, `text` is empty; without picture, `grids` is."""

    text: range
    grids: tuple[ImageGrid, ...]

    def has(self, modality: str) -> bool:
        """Whether there is any `"text"`, or any `"image"`, to mask."""
        return bool(self.text if modality == "text" else self.grids)


def locate(
    renderer: PromptRenderer,
    rows: Sequence[Mapping[str, Any]],
    num_images: Sequence[int],
    prompt: Mapping[str, Any],
    modalities: Sequence[str] = ("text", "image"),
) -> list[PromptLayout]:
    """Find text and pictures of a batch of posts.

    Args:
        renderer ([`PromptRenderer`]): what wrote the prompts.
        rows (`Sequence[Mapping]`): B posts with the columns `id` and `text`.
        num_images (`Sequence[int]`): number of pictures of each post.
        prompt (`Mapping`): the processor's output for these posts, left-padded: `input_ids` (B, P), pixels, grids.
        modalities (`Sequence[str]`, *optional*): what to look for, of `"text"` and `"image"`; the other stays empty.

    Returns:
        `list[PromptLayout]`: one per post.

    Raises:
        ValueError: if the tokenizer tells no character offsets, a post's text cannot be found in its prompt, or the
            model's pictures have no grid of tokens in the prompt (Mllama; families not in this list).

    Example: with LLaVA-1.5, `<s>USER: <image>\\nmy dog\\n…` gives a `text` of two or three slots and one 24x24 grid.
    """
    grids: list[tuple[ImageGrid, ...]] = [()] * len(rows)
    if "image" in modalities and any(num_images):
        grids = image_grids(renderer.processor, prompt)
    ids = prompt["input_ids"].tolist()
    return [
        PromptLayout(text_slots(renderer, row, count, ids[index]) if "text" in modalities else range(0), grids[index])
        for index, (row, count) in enumerate(zip(rows, num_images, strict=True))
    ]


def text_span(renderer: PromptRenderer, row: Mapping[str, Any], num_images: int) -> tuple[str, int, int]:
    """The rendered prompt, and the first character of the post's text in it and the one behind its last.

    Both are equal for a post without text. The template is rendered once more around a marker, so that a text that
    repeats the instruction, or looks like the template, is found where it is.
    """
    post_id = row.get("id", "?")
    if row.get("prompt") is not None:
        raise ValueError(
            f"post {post_id!r} comes with a `prompt` of its own, in which nobody can tell its text from the instruction, "
            "so its text cannot be masked. Give the columns `text`, `keyphrases` and `images`, or set `mask_text=False`."
        )
    rendered = renderer.prompt(row, num_images)
    text = row.get("text") or ""
    if not text.strip():
        return rendered, 0, 0
    before, _, after = renderer.prompt({**row, "text": _MARKER}, num_images).partition(_MARKER)
    inside = rendered[len(before) : len(rendered) - len(after)]
    written = inside.strip()
    # What was written is the text but for broken control tokens, which only insert blanks.
    faithful = "".join(written.split()) == "".join(text.split())
    if not (rendered.startswith(before) and rendered.endswith(after) and written and faithful):
        raise ValueError(
            f"post {post_id!r}: the chat template does not write the text as it is, so its place in the prompt cannot "
            "be told. Set `processing_class.chat_template` to one that does, or `mask_text=False`."
        )
    start = len(before) + len(inside) - len(inside.lstrip())
    return rendered, start, start + len(written)


def text_slots(renderer: PromptRenderer, row: Mapping[str, Any], num_images: int, input_ids: Sequence[int]) -> range:
    """The slots of a post's text in its padded prompt.

    Args:
        input_ids (`Sequence[int]`): the prompt's P tokens as the model gets them, image tokens and left padding included.
    """
    rendered, start, end = text_span(renderer, row, num_images)
    if start == end:
        return range(0)
    tokenizer = renderer.tokenizer
    if not tokenizer.is_fast:
        raise ValueError(
            f"`processing_class` ({type(tokenizer).__name__}) does not tell which characters its tokens stand for, so the "
            "post's text cannot be masked. Load the fast tokenizer, or set `mask_text=False`."
        )
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    tokens, owned = encoded["input_ids"], []
    for index, (first, last) in enumerate(encoded["offset_mapping"]):
        touches = max(first, start) < min(last, end)
        if touches and not rendered[first:start].strip() and not rendered[end:last].strip():
            owned.append(index)
    if not owned:
        return range(0)
    # The processor has put the pictures' tokens in front of the text: count from the end, and look whether it is so.
    tail = len(tokens) - owned[0]
    if list(input_ids[-tail:]) != list(tokens[-tail:]):
        raise ValueError(
            f"post {row.get('id', '?')!r}: its text is tokenized differently beside its pictures, so its place in the prompt "
            "cannot be told. Write pictures before the text in the chat template, or set `mask_text=False`."
        )
    # From the first to the last: tokens of blanks between two words may have no characters of their own.
    return range(len(input_ids) - tail, len(input_ids) - tail + owned[-1] - owned[0] + 1)


def image_grids(processor: Any, prompt: Mapping[str, Any]) -> list[tuple[ImageGrid, ...]]:
    """The grids of image tokens of each prompt of a batch, in reading order.

    LLaVA: one grid a picture, patches of the vision tower. Qwen-VL: one a picture, patches after merging, any aspect.
    InternVL, Idefics3, SmolVLM: one a tile. Gemma 3: one a picture, after pooling.

    Raises:
        ValueError: for Mllama, and for processors whose grid is not known here.
    """
    name = type(processor).__name__
    if "cross_attention_mask" in prompt:
        raise ValueError(
            f"`mask_image`: the pictures of {name.removesuffix('Processor')} have no tokens in the prompt, they are read "
            "by cross-attention, so there is no grid to mask. Set `mask_image=False`, or take a model of another family."
        )
    # Gemma 3's processor gives the name `image_token_id` to the token in front of a picture.
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
                    f"`mask_image`: {name} wrote {len(slots)} image tokens into a prompt, which {height}x{width} tokens a "
                    "picture do not account for (with LLaVA: `vision_feature_select_strategy='full'` has a token without "
                    "place). Set `mask_image=False`."
                )
            grids.append(ImageGrid(tuple(cells), height, width))
            taken += len(cells)
        layouts.append(tuple(grids))
    return layouts


def _grid_sizes(processor: Any, prompt: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Height and width, in tokens, of each grid of the batch."""
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
            f"`mask_image`: how {name} lays a picture's tokens out is not known. Known: LLaVA, Qwen2-VL, Qwen2.5-VL, "
            f"Qwen3-VL, {', '.join(known.removesuffix('Processor') for known in _SQUARES)}. Set `mask_image=False`."
        )
