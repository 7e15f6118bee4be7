"""AimKP's masked views of a prompt: which tokens of one modality stay, and the prompt without the others.

Given   a batch of left-padded prompts, where their posts' text and pictures lie ([`PromptLayout`]), a stride per post.
Gives   keep-masks, and the prompts under them in two ways: [`masked`], attention bit 0 at masked tokens, and
        [`EncodedPrompt.view`], the masked tokens taken out and everything else left where it was.
Holds   both give the same log-probabilities and gradients, to rounding: a masked token is seen by nobody, and the
        positions of the others do not move. The pictures are encoded once for any number of views.

`masked` is the paper's definition and the plain twin. Masks: `strided` (the paper's) and `random` (the ablation of its
Table 5, as many tokens kept). Pooling instead of masking is not there.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dynkp.mechanics.prompt_layout import PromptLayout
from dynkp.mechanics.shared_prompt import SEQUENCE_INPUTS, causal_lm_of, prompt_positions

MODALITIES = ("text", "image")


def kept_cells(height: int, width: int, stride: int) -> list[int]:
    """The cells of a grid that stay: a ≡ s-1 and b ≡ s-1 (mod s), the last of each stride; the last cell if none is.

    Args:
        height, width (`int`): tokens, at least 1.
        stride (`int`): s, at least 1; 1 keeps all.

    Returns:
        `list[int]`: indices a * width + b, rising.

    Example:

    ```python
    >>> kept_cells(4, 4, 2), kept_cells(4, 4, 8)
    ([5, 7, 13, 15], [15])
    ```
    """
    if stride < 1:
        raise ValueError(f"stride={stride} keeps nothing: give 1 (no masking) or more")
    kept = [a * width + b for a in range(stride - 1, height, stride) for b in range(stride - 1, width, stride)]
    return kept or [height * width - 1]


def kept_tokens(length: int, stride: int) -> list[int]:
    """The tokens of a text that stay: k ≡ s-1 (mod s); the last one if none is.

    Example: `kept_tokens(7, 3)` is `[2, 5]`, `kept_tokens(7, 16)` is `[6]`, `kept_tokens(0, 2)` is `[]`.
    """
    if stride < 1:
        raise ValueError(f"stride={stride} keeps nothing: give 1 (no masking) or more")
    return list(range(stride - 1, length, stride)) or list(range(length))[-1:]


def keep_mask(layouts: Sequence[PromptLayout], modality: str, strides: Sequence[int], width: int) -> torch.Tensor:
    """Mark what stays of prompts whose text, or whose pictures, are masked with a stride.

    Args:
        layouts (`Sequence[PromptLayout]`): B prompts.
        modality (`str`): `"text"` or `"image"`; all else stays.
        strides (`Sequence[int]`): one s per post; 1 masks nothing.
        width (`int`): P, slots of the padded prompts.

    Returns:
        `torch.Tensor` of shape `(B, P)`: bool, on the CPU; False at masked tokens, True at padding.
    """
    return _mark(layouts, modality, strides, width, lambda _row, _part, _size, kept: kept)


def random_keep_mask(
    layouts: Sequence[PromptLayout],
    modality: str,
    strides: Sequence[int],
    width: int,
    *,
    post_ids: Sequence[str],
    visits: Sequence[int],
    seed: int,
) -> torch.Tensor:
    """As [`keep_mask`], with as many tokens kept of every text and grid, drawn anew for each visit of a post.

    The draw is a hash of seed, post, visit, modality and grid: batch, rank and resumption do not change it.

    Args:
        post_ids (`Sequence[str]`): the B posts' ids.
        visits (`Sequence[int]`): how often each has been visited before, such as the epoch's number.
        seed (`int`): the run's seed.
    """

    def draw(row: int, part: int, size: int, kept: list[int]) -> list[int]:
        key = f"{seed}\t{visits[row]}\t{modality}\t{part}\t{post_ids[row]}"
        generator = random.Random(hashlib.sha256(key.encode()).digest())
        return generator.sample(range(size), len(kept))

    return _mark(layouts, modality, strides, width, draw)


def _mark(
    layouts: Sequence[PromptLayout],
    modality: str,
    strides: Sequence[int],
    width: int,
    choose: Callable[[int, int, int, list[int]], list[int]],
) -> torch.Tensor:
    if modality not in MODALITIES:
        raise ValueError(f"modality={modality!r} is unknown: use 'text' or 'image'")
    keep = torch.ones(len(layouts), width, dtype=torch.bool)
    for row, (layout, stride) in enumerate(zip(layouts, strides, strict=True)):
        if modality == "text":
            parts = [(list(layout.text), kept_tokens(len(layout.text), stride))] if layout.text else []
        else:
            parts = [(list(grid.slots), kept_cells(grid.height, grid.width, stride)) for grid in layout.grids]
        for part, (slots, kept) in enumerate(parts):
            keep[row, slots] = False
            keep[row, [slots[index] for index in choose(row, part, len(slots), kept)]] = True
    return keep


def masked(prompt: dict[str, Any], keep: torch.Tensor) -> dict[str, Any]:
    """The prompt with attention bit 0 where `keep` is False: the paper's masking, and the plain twin of dropping.

    The positions are those of the unmasked prompt: take them from `prompt_positions(model, prompt)`, never from what
    this returns.

    Args:
        prompt (`dict`): the processor's output, (B, P).
        keep (`torch.Tensor` of shape `(B, P)`): bool.
    """
    attention_mask = prompt["attention_mask"]
    return {**prompt, "attention_mask": attention_mask * keep.to(attention_mask)}


@dataclass(frozen=True)
class EncodedPrompt:
    """Prompts whose pictures went through the vision tower and the projector, in the autograd graph.

    Attributes:
        inputs (`dict`): what to call the model with, beside positions and use of a cache.
        positions (`torch.Tensor` of shape `(B, P)` or `(3, B, P)`): those of the full prompts, to be passed explicitly.
            Left to itself the model would count the kept tokens only, or take a gap for the border of a packed sequence.
        feature_index (`torch.Tensor` of shape `(B, P)`): which feature an image token gets; -1 at other tokens.
    """

    inputs: dict[str, Any]
    positions: torch.Tensor
    feature_index: torch.Tensor

    def before(self, starts: Sequence[int]) -> EncodedPrompt:
        """The beginnings of all prompts: what is in slots below `starts`, one number per post."""
        attends = self.inputs["attention_mask"].bool()
        ends = torch.as_tensor(starts, device=attends.device)[:, None]
        attends = attends & (torch.arange(attends.shape[1], device=attends.device) < ends)
        return self._moved(attends, attends, torch.arange(len(attends), device=attends.device))

    def view(self, keep: torch.Tensor, rows: Sequence[int] | None = None, drop: bool = True) -> EncodedPrompt:
        """The prompts without their masked tokens and without those tokens' image features.

        A row's last slot predicts the target, so it stays as a query even when masked, with attention bit 0.

        Args:
            keep (`torch.Tensor` of shape `(len(rows), P)`): bool, one mask per view.
            rows (`Sequence[int]`, *optional*): the post of each view; a post may be there more than once, as its full
                and its masked view. All posts in order, if `None`.
            drop: `False` leaves masked tokens in their slots, with attention bit 0, as the paper's definition has it.

        Returns:
            [`EncodedPrompt`] of `len(rows)` prompts, padded on the left to the longest of them.
        """
        attended = self.inputs["attention_mask"].bool()
        index = torch.arange(len(attended), device=attended.device)
        if rows is not None:
            index = torch.as_tensor(rows, device=attended.device)
        attends = attended[index] & keep.to(attended.device)
        stays = attends.clone() if drop else attended[index]
        stays[:, -1] = True
        return self._moved(attends, stays, index)

    def _moved(self, attends: torch.Tensor, stays: torch.Tensor, index: torch.Tensor) -> EncodedPrompt:
        """The slots that stay, of the posts in `index`, moved together to the right end; bits as in `attends`."""
        width = int(stays.sum(dim=1).max())
        # Stable: the slots that stay move to the right end in their order, padding fills the left.
        slots = stays.int().argsort(dim=1, stable=True)[:, stays.shape[1] - width :]
        filled = stays.gather(1, slots)
        views = index[:, None]

        inputs: dict[str, Any] = {}
        for key, value in self.inputs.items():
            if key in SEQUENCE_INPUTS:
                moved = value[views, slots]
                # Padding becomes token 0, which is no picture's and which nobody sees.
                inputs[key] = moved * filled.view(*filled.shape, *[1] * (moved.dim() - 2)).to(moved)
            elif key != "mm_encoder_outputs":
                inputs[key] = value[index]  # Mllama's pictures, which are no tokens
        inputs["attention_mask"] = attends.gather(1, slots).to(self.inputs["attention_mask"])
        chosen = self.feature_index[views, slots].masked_fill(~filled, -1)
        wanted = chosen[chosen >= 0]
        if wanted.numel():
            inputs["mm_encoder_outputs"] = {"image": _pick(self.inputs["mm_encoder_outputs"]["image"], wanted)}
        feature_index = torch.full_like(chosen, -1)
        feature_index[chosen >= 0] = torch.arange(wanted.numel(), device=chosen.device)
        positions = self.positions[..., views, slots] * filled.to(self.positions)
        return EncodedPrompt(inputs, positions, feature_index)


def encode(model: nn.Module, prompt: dict[str, Any]) -> EncodedPrompt:
    """Run the pictures of a batch through the vision tower and the projector, once, and fix the positions.

    Args:
        model: causal language model of transformers, or a PEFT model around one.
        prompt (`dict`): the processor's output for the prompts, left-padded.

    Example: `encode(model, prompt).view(keep_mask(layouts, "image", [4, 4], width))` are the prompts of two posts with
    a sixteenth of their image tokens.
    """
    causal_lm = causal_lm_of(model)
    inputs = {key: value for key, value in prompt.items() if key in SEQUENCE_INPUTS}
    pictures = {key: value for key, value in prompt.items() if key not in SEQUENCE_INPUTS}
    feature_index = torch.full_like(inputs["input_ids"], -1)
    if "cross_attention_mask" in prompt:
        inputs |= pictures
    elif pictures:
        inputs["mm_encoder_outputs"] = {"image": causal_lm.base_model.get_image_features(**pictures, return_dict=True)}
        is_image = inputs["input_ids"] == causal_lm.config.image_token_id
        feature_index = is_image.flatten().cumsum(0).view_as(is_image).sub(1).masked_fill(~is_image, -1)
    return EncodedPrompt(inputs, prompt_positions(model, prompt), feature_index)


def image_token_counts(model: nn.Module, prompt: dict[str, Any]) -> list[int]:
    """How the rows of vision tower and projector are divided among the posts: B numbers in that proportion."""
    if "cross_attention_mask" in prompt:  # Mllama: as many tiles for every post of a batch
        return [1] * len(prompt["input_ids"])
    token = getattr(causal_lm_of(model).config, "image_token_id", -1)
    return (prompt["input_ids"] == token).sum(dim=1).tolist()


def dropping_unsupported_reason(model: nn.Module, length: int) -> str | None:
    """Why masked tokens cannot be dropped from inputs of this length; `None` if they can. Then mask instead.

    Args:
        model: causal language model, or a PEFT model around one.
        length (`int`): tokens of the longest unmasked prompt and target.
    """
    config = causal_lm_of(model).config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in kinds and window is not None and window < length:
        return f"some layers see {window} tokens back, counted in the kept ones, and the batch has {length}"
    if unknown := set(kinds) - {"full_attention", "sliding_attention", "cross_attention"}:
        return f"its layers of type {', '.join(sorted(unknown))} keep a state that masked tokens write to"
    if "flash" in (getattr(config, "_attn_implementation", None) or ""):
        return "Flash Attention takes gaps between the positions of a single row for borders of packed sequences"
    return None


def _pick(output: Any, wanted: torch.Tensor) -> BaseModelOutputWithPooling:
    """The given features of all images and tiles in a row, in the container the model expects."""

    def pick(features: Any) -> Any:
        if isinstance(features, torch.Tensor):
            return features.reshape(-1, features.shape[-1])[wanted]
        return [torch.cat(list(features))[wanted]]

    levels = getattr(output, "deepstack_features", None)  # Qwen3-VL adds features to deeper layers, too
    if levels is None:
        return BaseModelOutputWithPooling(pooler_output=pick(output.pooler_output))
    return type(output)(pooler_output=pick(output.pooler_output), deepstack_features=[pick(level) for level in levels])
