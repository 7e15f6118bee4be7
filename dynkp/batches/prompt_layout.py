"""Prompt layout: which tokens of a prompt belong to the post's text, and which to its images.

Guarantees: the slots of the text decode to the post's text and to nothing else, neither to the instruction (even if the text
repeats it) nor to a system message, the template or an answer.

A token belongs to the text if it contains a character of the text and otherwise only whitespace: byte-level vocabularies join a
word with the space in front of it, and a full stop with the line break behind it. Whitespace at both ends of the text does
not count as text; some templates remove it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynkp.batches.image_grids import ImageGrid, image_grids
from dynkp.batches.renderers import ChatRenderer

# Stands for the text when the template is rendered to see what it writes around the text. Private use: no template has it.
_MARKER = "\ue000"


@dataclass(frozen=True)
class PromptLayout:
    """Where the text and the images of one post are in its padded prompt.

    Attributes:
        text (`range`): slots of the text, positions in the padded prompt; empty for a post without text.
        grids (`tuple[ImageGrid, ...]`): grids of image tokens; empty for a post without image.
    """

    text: range
    grids: tuple[ImageGrid, ...]

    def has(self, modality: str) -> bool:
        """Whether there is something to mask.

        Args:
            modality (`str`): `"text"` or `"image"`.

        Example:
            >>> PromptLayout(text=range(4, 6), grids=()).has("image")
            False
        """
        return bool(self.text if modality == "text" else self.grids)


def locate(
    renderer: ChatRenderer,
    rows: Sequence[Mapping[str, Any]],
    num_images: Sequence[int],
    prompt: Mapping[str, Any],
    modalities: Sequence[str] = ("text", "image"),
) -> list[PromptLayout]:
    r"""Find the text and the images of a batch of posts in their prompts.

    Args:
        renderer ([`~dynkp.batches.renderers.ChatRenderer`]): the renderer that wrote the prompts.
        rows (`Sequence[Mapping]`): B posts with the columns `id` and `text`.
        num_images (`Sequence[int]`): number of images of each post.
        prompt (`Mapping`): the processor's output for these posts, padded on the left: `input_ids` (B, P), pixels, grids.
        modalities (`Sequence[str]`, *optional*, defaults to `("text", "image")`): what to look for; the other is left empty.

    Returns:
        `list[PromptLayout]`: one per post.

    Raises:
        ValueError: if the tokenizer does not return character offsets, a post's text cannot be found in its prompt, or the
            model's images have no known grid of tokens in the prompt (see [`~dynkp.batches.image_grids.image_grids`]).

    Example: in LLaVA-1.5's prompt `USER: <image>\nmy dog\n...`, `text` has two or three slots, and there is one 24x24 grid.
    """
    grids: list[tuple[ImageGrid, ...]] = [()] * len(rows)
    if "image" in modalities and any(num_images):
        grids = image_grids(renderer.processor, prompt)
    ids = prompt["input_ids"].tolist()
    return [
        PromptLayout(text_slots(renderer, row, count, ids[index]) if "text" in modalities else range(0), grids[index])
        for index, (row, count) in enumerate(zip(rows, num_images, strict=True))
    ]


def text_span(renderer: ChatRenderer, row: Mapping[str, Any], num_images: int) -> tuple[str, int, int]:
    """Find the post's text in its rendered prompt.

    The template is rendered a second time with a marker in place of the text, so a text that repeats the instruction, or
    looks like the template, is found where it is.

    Args:
        renderer ([`~dynkp.batches.renderers.ChatRenderer`]): the renderer.
        row (`Mapping`): the post.
        num_images (`int`): number of images that the model gets.

    Returns:
        `tuple[str, int, int]`: the rendered prompt, the position of the first character of the text in it, and the position
        behind its last character; both are 0 for a post without text.

    Raises:
        ValueError: naming the post, if it comes with a `prompt` of its own or the template changes the text.
    """
    post_id = row.get("id", "?")
    if row.get("prompt") is not None:
        raise ValueError(
            f"post {post_id!r} comes with a `prompt` of its own, in which text and instruction cannot be separated, so its "
            "text cannot be masked. Give the columns `text`, `keyphrases` and `images`, or set `mask_text=False`."
        )
    rendered = renderer.prompt(row, num_images)
    text = row.get("text") or ""
    if not text.strip():
        return rendered, 0, 0
    before, _, after = renderer.prompt({**row, "text": _MARKER}, num_images).partition(_MARKER)
    inside = rendered[len(before) : len(rendered) - len(after)]
    written = inside.strip()
    # What was written is the text, except for broken control tokens, into which only spaces were inserted.
    faithful = "".join(written.split()) == "".join(text.split())
    if not (rendered.startswith(before) and rendered.endswith(after) and written and faithful):
        raise ValueError(
            f"post {post_id!r}: the chat template does not write the text as it is, so its position in the prompt is unknown. "
            "Set `processing_class.chat_template` to one that does, or `mask_text=False`."
        )
    start = len(before) + len(inside) - len(inside.lstrip())
    return rendered, start, start + len(written)


def text_slots(renderer: ChatRenderer, row: Mapping[str, Any], num_images: int, input_ids: Sequence[int]) -> range:
    """Find the slots of a post's text in its padded prompt.

    Args:
        renderer ([`~dynkp.batches.renderers.ChatRenderer`]): the renderer that wrote the prompt.
        row (`Mapping`): the post.
        num_images (`int`): number of images that the model gets.
        input_ids (`Sequence[int]`): the prompt's P tokens as the model gets them, image tokens and left padding included.

    Returns:
        `range`: positions in the padded prompt; empty for a post without text.

    Raises:
        ValueError: naming the post, if its text cannot be found; or if the tokenizer does not return character offsets.
    """
    rendered, start, end = text_span(renderer, row, num_images)
    if start == end:
        return range(0)
    tokenizer = renderer.tokenizer
    if not tokenizer.is_fast:
        raise ValueError(
            f"`processing_class` ({type(tokenizer).__name__}) does not return the characters of its tokens, so the post's text "
            "cannot be masked. Load the fast tokenizer, or set `mask_text=False`."
        )
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    tokens, owned = encoded["input_ids"], []
    for index, (first, last) in enumerate(encoded["offset_mapping"]):
        touches = max(first, start) < min(last, end)
        if touches and not rendered[first:start].strip() and not rendered[end:last].strip():
            owned.append(index)
    if not owned:
        return range(0)
    # The processor has put the image tokens in front of the text: count from the end, and check that this is so.
    tail = len(tokens) - owned[0]
    if list(input_ids[-tail:]) != list(tokens[-tail:]):
        raise ValueError(
            f"post {row.get('id', '?')!r}: its text is tokenized differently beside its images, so its position in the prompt "
            "is unknown. Write images before the text in the chat template, or set `mask_text=False`."
        )
    # From the first to the last: tokens of whitespace between two words may have no characters of their own.
    return range(len(input_ids) - tail, len(input_ids) - tail + owned[-1] - owned[0] + 1)
