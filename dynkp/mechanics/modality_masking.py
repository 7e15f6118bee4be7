"""AimKP's masked views of a prompt: which tokens of one modality stay, and the prompt without the others.

Given   a batch of left-padded prompts, where their posts' text and pictures lie ([`PromptLayout`]), a stride per post.
Gives   keep-masks, and the prompts under them in two ways: [`masked`], attention bit 0 at masked tokens, and
        [`EncodedPrompt.view`], the masked tokens taken out and everything else left where it was.
Holds   both give the same log-probabilities and gradients, to rounding: a masked token is seen by nobody, and the
        positions of the others do not move. The pictures are encoded once for any number of views.

`masked` is the paper's definition and the plain twin. Masks: `strided` (the paper's) and `random` (the ablation of its
Table 5, as many tokens kept). The ablation's "feature compression" is [`EncodedPrompt.pooled`]: as many tokens, each the
mean of its stride, and no gaps between their positions.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dynkp.batches.prompt_layout import PromptLayout
from dynkp.batches.targets import SEQUENCE_INPUTS
from dynkp.mechanics.shared_prompt import causal_lm_of, prompt_positions

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


@dataclass(frozen=True)
class Pooling:
    """Which tokens of a modality become one.

    Attributes:
        owners (`torch.Tensor` of shape `(B, P)`): the slot that each slot is averaged into; the slots that stay are their own
            owners, and so are all outside the modality.
        grids (`list[list[tuple[int, int]]]`): per post, height and width of its pictures in tokens afterwards.
    """

    owners: torch.Tensor
    grids: list[list[tuple[int, int]]]


@dataclass(frozen=True)
class Mask:
    """What stays of B prompts, (B, P) bool, and what becomes of the rest: it is lost, or averaged into what stays."""

    keep: torch.Tensor
    pooling: Pooling | None = None


def pool(layouts: Sequence[PromptLayout], modality: str, strides: Sequence[int], width: int) -> Pooling:
    """Pool text or pictures with a stride: s tokens, or s x s cells, become one, which takes the slot that [`keep_mask`] keeps.

    What is left over at the end (of a row, of a column) belongs to the last one; a side shorter than s becomes one cell.

    Args:
        layouts, modality, strides, width: as in [`keep_mask`].

    Example: five tokens with s = 2 become two, the mean of the first two and that of the last three.
    """
    owners = torch.arange(width).repeat(len(layouts), 1)
    grids = [[(grid.height, grid.width) for grid in layout.grids] for layout in layouts]
    for row, (layout, stride) in enumerate(zip(layouts, strides, strict=True)):
        if modality == "text":
            slots, count = list(layout.text), len(layout.text) // stride
            for k, slot in enumerate(slots):
                owners[row, slot] = slots[stride * (min(k // stride, count - 1) + 1) - 1] if count else slots[-1]
            continue
        for index, grid in enumerate(layout.grids):
            rows, columns = grid.height // stride, grid.width // stride
            for cell, slot in enumerate(grid.slots):
                owner = len(grid.slots) - 1
                if rows and columns:
                    a, b = (min(k // stride, n - 1) for k, n in zip(divmod(cell, grid.width), (rows, columns), strict=True))
                    owner = (stride * (a + 1) - 1) * grid.width + stride * (b + 1) - 1
                owners[row, slot] = grid.slots[owner]
            grids[row][index] = (rows, columns) if rows and columns else (1, 1)
    return Pooling(owners, grids)


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
        embeddings (`torch.Tensor` of shape `(B, P, D)`, *optional*): of tokens that are not the vocabulary's, but means of
            some; call the model within [`embedded`].
    """

    inputs: dict[str, Any]
    positions: torch.Tensor
    feature_index: torch.Tensor
    embeddings: torch.Tensor | None = None

    def pooled(self, model: nn.Module, pooling: Pooling) -> EncodedPrompt:
        """The prompts with features and embeddings averaged into those that stay; [`view`] then takes out the others."""
        owners = pooling.owners.to(self.feature_index.device)
        is_image = self.feature_index >= 0
        inputs = dict(self.inputs)
        if is_image.any():
            of_owner = self.feature_index.gather(1, owners)[is_image]  # in the order of the features
            mean = functools.partial(_group_means, groups=of_owner)
            inputs["mm_encoder_outputs"] = {"image": _changed(inputs["mm_encoder_outputs"]["image"], mean)}
        embeddings = causal_lm_of(model).get_input_embeddings()(inputs["input_ids"])
        count, width, _ = embeddings.shape
        groups = (owners + width * torch.arange(count, device=owners.device)[:, None]).flatten()
        means = _group_means(embeddings.flatten(0, 1), groups).view_as(embeddings)
        # Placeholders of pictures are found by their tokens and filled in behind the embeddings.
        return EncodedPrompt(inputs, self.positions, self.feature_index, torch.where(is_image[..., None], embeddings, means))

    def renumbered(self, model: nn.Module, grids: Sequence[Sequence[tuple[int, int]]]) -> torch.Tensor:
        """Positions without gaps, as of prompts that were never longer; `grids` are the posts' pictures, in tokens."""
        prompt: dict[str, Any] = {key: value for key, value in self.inputs.items() if key in SEQUENCE_INPUTS}
        config = causal_lm_of(model).config
        merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", None)
        sizes = [(1, merge * height, merge * width) for post in grids for height, width in post] if merge else []
        if sizes:
            prompt["image_grid_thw"] = torch.tensor(sizes, device=self.feature_index.device)
        return prompt_positions(model, prompt)

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
        embeddings = None if self.embeddings is None else self.embeddings[views, slots]
        return EncodedPrompt(inputs, positions, feature_index, embeddings)


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


def why_tokens_cannot_be_dropped(model: nn.Module, length: int) -> str | None:
    """Why masked tokens cannot be dropped from inputs of this length; `None` if they can. Then mask instead.

    Args:
        model: causal language model, or a PEFT model around one.
        length (`int`): tokens of the longest unmasked prompt and target.
    """
    config = causal_lm_of(model).config.get_text_config()
    window = getattr(config, "sliding_window", None)
    # Mistral, Phi-3, Starcoder2: a window, and no word about which layers have it.
    everywhere = window is not None and getattr(config, "use_sliding_window", True)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if everywhere else "full_attention"]
    if "sliding_attention" in kinds and window is not None and window < length:
        return f"some layers see {window} tokens back, counted in the kept ones, and the batch has {length}"
    if unknown := set(kinds) - {"full_attention", "sliding_attention", "cross_attention"}:
        return f"its layers of type {', '.join(sorted(unknown))} keep a state that masked tokens write to"
    if "flash" in (getattr(config, "_attn_implementation", None) or ""):
        return "Flash Attention takes gaps between the positions of a single row for borders of packed sequences"
    return None


@contextlib.contextmanager
def embedded(model: nn.Module, embeddings: torch.Tensor | None) -> Iterator[None]:
    """Within the block the model's first W tokens are embedded as given, (R, W, D); the others, and all for `None`, as ever."""
    if embeddings is None:
        yield
        return

    def replace(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([embeddings.to(output.dtype), output[:, embeddings.shape[1] :]], dim=1)

    handle = causal_lm_of(model).get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def _pick(output: Any, wanted: torch.Tensor) -> BaseModelOutputWithPooling:
    """The given features of all images and tiles in a row, in the container the model expects."""
    return _changed(output, lambda features: features[wanted])


def _changed(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> BaseModelOutputWithPooling:
    """`change` of the features (N, D) of all images and tiles in a row, in the container the model expects."""

    def changed(features: Any) -> Any:
        if isinstance(features, torch.Tensor):
            return change(features.reshape(-1, features.shape[-1]))
        return [change(torch.cat(list(features)))]

    levels = getattr(output, "deepstack_features", None)  # Qwen3-VL adds features to deeper layers, too
    if levels is None:
        return BaseModelOutputWithPooling(pooler_output=changed(output.pooler_output))
    return type(output)(pooler_output=changed(output.pooler_output), deepstack_features=[changed(level) for level in levels])


def _group_means(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """The mean of each group's rows, (N, D), at the row that names the group; other rows are zero."""
    sums = torch.zeros_like(values).index_add(0, groups, values)
    counts = groups.bincount(minlength=len(values)).clamp(min=1)
    return sums / counts[:, None].to(sums)
