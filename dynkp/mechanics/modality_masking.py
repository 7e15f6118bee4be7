"""AimKP's masks: which tokens of one modality are kept, and the prompts without the others (Eq. 2).

Given a batch of left-padded prompts, where their posts' text and images are
([`~dynkp.batches.prompt_layout.PromptLayout`]), and a stride per post, this module makes masks of the kept tokens, and the
prompts under them in two ways: [`masked`] sets the attention bits of masked tokens to 0, and [`EncodedPrompt.view`] drops
masked tokens.

Guarantee: both give the same log-probabilities and gradients, to rounding. No token attends to a masked token, and the position
ids of the other tokens do not change. Images are encoded once for any number of views.

[`masked`] is the paper's definition and the reference that dropping is tested against. Masks are strided (the paper's) or
random (the ablation of its Table 5, with as many tokens kept). That table's "feature compression" is [`EncodedPrompt.pooled`]:
as many tokens, each the mean of its stride, without gaps between their positions.
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
    """Return the kept cells of an image's grid: (a, b) with a ≡ s-1 and b ≡ s-1 (mod s), the last cell of each stride.

    Args:
        height (`int`): rows of tokens, at least 1.
        width (`int`): columns of tokens, at least 1.
        stride (`int`): s, at least 1; 1 keeps all.

    Returns:
        `list[int]`: indices a * width + b, ascending; the last cell alone, if there is no such cell.

    Raises:
        ValueError: if `stride` is less than 1.

    Example:
        >>> kept_cells(4, 4, 2), kept_cells(4, 4, 8)
        ([5, 7, 13, 15], [15])
    """
    if stride < 1:
        raise ValueError(f"stride={stride} keeps nothing: give 1 (no masking) or more")
    kept = [a * width + b for a in range(stride - 1, height, stride) for b in range(stride - 1, width, stride)]
    return kept or [height * width - 1]


def kept_tokens(length: int, stride: int) -> list[int]:
    """Return the kept tokens of a text: k with k ≡ s-1 (mod s), the last token of each stride.

    Args:
        length (`int`): tokens of the text.
        stride (`int`): s, at least 1; 1 keeps all.

    Returns:
        `list[int]`: indices, ascending; the last token alone, if there is no such token.

    Raises:
        ValueError: if `stride` is less than 1.

    Example:
        >>> kept_tokens(7, 3), kept_tokens(7, 16), kept_tokens(0, 2)
        ([2, 5], [6], [])
    """
    if stride < 1:
        raise ValueError(f"stride={stride} keeps nothing: give 1 (no masking) or more")
    return list(range(stride - 1, length, stride)) or list(range(length))[-1:]


def keep_mask(layouts: Sequence[PromptLayout], modality: str, strides: Sequence[int], width: int) -> torch.Tensor:
    """Mark the kept tokens of prompts whose text, or whose images, are masked with strides.

    Args:
        layouts (`Sequence[PromptLayout]`): where the text and the images of B posts are in their prompts.
        modality (`str`): `"text"` or `"image"`; all other tokens are kept.
        strides (`Sequence[int]`): one s per post; 1 masks nothing.
        width (`int`): P, columns of the padded prompts.

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
    """Keep as many tokens of every text and grid as [`keep_mask`], drawn at random for each visit of a post.

    The draw is a hash of seed, post, visit, modality and grid: batch, rank and resumption do not change it.

    Args:
        layouts (`Sequence[PromptLayout]`): as in [`keep_mask`].
        modality (`str`): as in [`keep_mask`].
        strides (`Sequence[int]`): as in [`keep_mask`].
        width (`int`): as in [`keep_mask`].
        post_ids (`Sequence[str]`): the B posts' ids.
        visits (`Sequence[int]`): how often each post was visited before, such as the epoch's number.
        seed (`int`): the run's seed.

    Returns:
        `torch.Tensor` of shape `(B, P)`: bool, as from [`keep_mask`].
    """

    def draw(row: int, part: int, size: int, kept: list[int]) -> list[int]:
        key = f"{seed}\t{visits[row]}\t{modality}\t{part}\t{post_ids[row]}"
        generator = random.Random(hashlib.sha256(key.encode()).digest())
        return generator.sample(range(size), len(kept))

    return _mark(layouts, modality, strides, width, draw)


@dataclass(frozen=True)
class Pooling:
    """Which tokens of a modality are averaged into one.

    Attributes:
        owners (`torch.Tensor` of shape `(B, P)`): the column that each column is averaged into; kept columns are their own
            owners, and so are all outside the modality.
        grids (`list[list[tuple[int, int]]]`): per post, height and width of its images in tokens afterwards.
    """

    owners: torch.Tensor
    grids: list[list[tuple[int, int]]]


@dataclass(frozen=True)
class Mask:
    """Which tokens of B prompts are kept, and what happens to the others.

    Attributes:
        keep (`torch.Tensor` of shape `(B, P)`): bool.
        pooling ([`Pooling`], *optional*): how the other tokens are averaged into those that are kept; they are masked, if
            `None`.
    """

    keep: torch.Tensor
    pooling: Pooling | None = None


def pool(layouts: Sequence[PromptLayout], modality: str, strides: Sequence[int], width: int) -> Pooling:
    """Pool texts or images with strides: s tokens, or s x s cells, become one, in the column that [`keep_mask`] keeps.

    The remainder at the end of a text, row or column belongs to the last of them; a side shorter than s becomes one cell. Five
    tokens with s = 2 become two: the mean of the first two and the mean of the last three.

    Args:
        layouts (`Sequence[PromptLayout]`): as in [`keep_mask`].
        modality (`str`): as in [`keep_mask`].
        strides (`Sequence[int]`): as in [`keep_mask`].
        width (`int`): as in [`keep_mask`].

    Returns:
        [`Pooling`]: of the B prompts.
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
    """Set the attention bits of masked tokens to 0: the paper's masking, and the reference of dropping.

    Position ids must be those of the unmasked prompt, `prompt_positions(model, prompt)`, not those of what this returns.

    Args:
        prompt (`dict`): the processor's output for B prompts of P columns.
        keep (`torch.Tensor` of shape `(B, P)`): bool, False at masked tokens.

    Returns:
        `dict`: the prompt with another `attention_mask`.

    Example:
        >>> masked({"attention_mask": torch.tensor([[1, 1, 1]])}, torch.tensor([[True, False, True]]))["attention_mask"]
        tensor([[1, 0, 1]])
    """
    attention_mask = prompt["attention_mask"]
    return {**prompt, "attention_mask": attention_mask * keep.to(attention_mask)}


@dataclass(frozen=True)
class EncodedPrompt:
    """Prompts whose images went through the vision tower and the projector, in the autograd graph.

    Attributes:
        inputs (`dict`): inputs of the model, besides position ids and use of a cache.
        positions (`torch.Tensor` of shape `(B, P)` or `(3, B, P)`): position ids of the full prompts, to be passed explicitly.
            By default the model would count the kept tokens only, or take a gap for the border of a packed sequence.
        feature_index (`torch.Tensor` of shape `(B, P)`): index of the feature that an image token gets; -1 at other tokens.
        embeddings (`torch.Tensor` of shape `(B, P, D)`, *optional*): embeddings of tokens that are means of others; the model
            must be called within [`embedded`].
    """

    inputs: dict[str, Any]
    positions: torch.Tensor
    feature_index: torch.Tensor
    embeddings: torch.Tensor | None = None

    def pooled(self, model: nn.Module, pooling: Pooling) -> EncodedPrompt:
        """Average features and embeddings into those that are kept; [`view`] then drops the others.

        Args:
            model (`torch.nn.Module`): causal language model, or a PEFT model around one.
            pooling ([`Pooling`]): what is averaged into what.
        """
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
        # Image placeholders are found by their token ids and replaced behind the embedding layer.
        return EncodedPrompt(inputs, self.positions, self.feature_index, torch.where(is_image[..., None], embeddings, means))

    def renumbered(self, model: nn.Module, grids: Sequence[Sequence[tuple[int, int]]]) -> torch.Tensor:
        """Compute position ids without gaps, as of prompts that were never longer.

        Args:
            model (`torch.nn.Module`): causal language model, or a PEFT model around one.
            grids (`Sequence[Sequence[tuple[int, int]]]`): per post, height and width of its images in tokens.

        Returns:
            `torch.Tensor` of shape `(B, P)` or `(3, B, P)`.
        """
        prompt: dict[str, Any] = {key: value for key, value in self.inputs.items() if key in SEQUENCE_INPUTS}
        config = causal_lm_of(model).config
        merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", None)
        sizes = [(1, merge * height, merge * width) for post in grids for height, width in post] if merge else []
        if sizes:
            prompt["image_grid_thw"] = torch.tensor(sizes, device=self.feature_index.device)
        return prompt_positions(model, prompt)

    def before(self, starts: Sequence[int]) -> EncodedPrompt:
        """Cut off the beginnings of all prompts.

        Args:
            starts (`Sequence[int]`): per post, the first column that is not part of its beginning.

        Returns:
            [`EncodedPrompt`]: of the B beginnings, padded on the left.
        """
        attends = self.inputs["attention_mask"].bool()
        ends = torch.as_tensor(starts, device=attends.device)[:, None]
        attends = attends & (torch.arange(attends.shape[1], device=attends.device) < ends)
        return self._moved(attends, attends, torch.arange(len(attends), device=attends.device))

    def view(self, keep: torch.Tensor, indices: Sequence[int] | None = None, drop: bool = True) -> EncodedPrompt:
        """Remove masked tokens, and the image features of masked tokens, from the prompts.

        The last token of a prompt predicts the target, so it remains as a query even if it is masked, with attention bit 0.

        Args:
            keep (`torch.Tensor` of shape `(R, P)`): bool, one mask per view.
            indices (`Sequence[int]`, *optional*): the post of each of the R views; a post may have several. All posts in
                order, if `None`.
            drop (`bool`, *optional*, defaults to `True`): remove the tokens. `False` leaves them in their columns, with
                attention bit 0, as in the paper's definition.

        Returns:
            [`EncodedPrompt`]: of R prompts, padded on the left to the longest of them.
        """
        attended = self.inputs["attention_mask"].bool()
        index = torch.arange(len(attended), device=attended.device)
        if indices is not None:
            index = torch.as_tensor(indices, device=attended.device)
        attends = attended[index] & keep.to(attended.device)
        stays = attends.clone() if drop else attended[index]
        stays[:, -1] = True
        return self._moved(attends, stays, index)

    def _moved(self, attends: torch.Tensor, stays: torch.Tensor, index: torch.Tensor) -> EncodedPrompt:
        """Move the columns of `stays` of the posts in `index` to the right end, with the attention bits of `attends`."""
        width = int(stays.sum(dim=1).max())
        # Stable: the remaining columns keep their order, and padding fills the left.
        slots = stays.int().argsort(dim=1, stable=True)[:, stays.shape[1] - width :]
        filled = stays.gather(1, slots)
        views = index[:, None]

        inputs: dict[str, Any] = {}
        for key, value in self.inputs.items():
            if key in SEQUENCE_INPUTS:
                moved = value[views, slots]
                # Padding becomes token 0, which is no image token and which no token attends to.
                inputs[key] = moved * filled.view(*filled.shape, *[1] * (moved.dim() - 2)).to(moved)
            elif key != "mm_encoder_outputs":
                inputs[key] = value[index]  # Mllama's images, which are no tokens
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
    """Run the images of a batch through the vision tower and the projector, once, and compute the position ids.

    Args:
        model (`torch.nn.Module`): causal language model of transformers, or a PEFT model around one.
        prompt (`dict`): the processor's output for the prompts, left-padded.

    Returns:
        [`EncodedPrompt`]: `encode(model, prompt).view(keep_mask(layouts, "image", [4, 4], width))` are then the prompts of two
        posts with a sixteenth of their image tokens.
    """
    causal_lm = causal_lm_of(model)
    inputs = {key: value for key, value in prompt.items() if key in SEQUENCE_INPUTS}
    images = {key: value for key, value in prompt.items() if key not in SEQUENCE_INPUTS}
    feature_index = torch.full_like(inputs["input_ids"], -1)
    if "cross_attention_mask" in prompt:
        inputs |= images
    elif images:
        inputs["mm_encoder_outputs"] = {"image": causal_lm.base_model.get_image_features(**images, return_dict=True)}
        is_image = inputs["input_ids"] == causal_lm.config.image_token_id
        feature_index = is_image.flatten().cumsum(0).view_as(is_image).sub(1).masked_fill(~is_image, -1)
    return EncodedPrompt(inputs, prompt_positions(model, prompt), feature_index)


def image_token_counts(model: nn.Module, prompt: dict[str, Any]) -> list[int]:
    """Return how the rows of vision tower and projector are divided among the posts.

    Args:
        model (`torch.nn.Module`): causal language model, or a PEFT model around one.
        prompt (`dict`): the processor's output for B prompts.

    Returns:
        `list[int]`: B numbers in proportion to the posts' rows.
    """
    if "cross_attention_mask" in prompt:  # Mllama: as many tiles for every post of a batch
        return [1] * len(prompt["input_ids"])
    token = getattr(causal_lm_of(model).config, "image_token_id", -1)
    return (prompt["input_ids"] == token).sum(dim=1).tolist()


def why_tokens_cannot_be_dropped(model: nn.Module, length: int) -> str | None:
    """Return the reason why masked tokens cannot be dropped from inputs, so that they must be masked.

    Args:
        model (`torch.nn.Module`): causal language model, or a PEFT model around one.
        length (`int`): tokens of the longest unmasked prompt and target together.

    Returns:
        `str` or `None`: a clause such as "its layers of type linear_attention keep a state that masked tokens write to"; `None`
        if masked tokens can be dropped.
    """
    config = causal_lm_of(model).config.get_text_config()
    window = getattr(config, "sliding_window", None)
    # Mistral, Phi-3, Starcoder2: all layers have the window, and `layer_types` is not set.
    everywhere = window is not None and getattr(config, "use_sliding_window", True)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if everywhere else "full_attention"]
    if "sliding_attention" in kinds and window is not None and window < length:
        return f"some layers attend to {window} tokens back, counted in kept tokens, and the batch has {length}"
    if unknown := set(kinds) - {"full_attention", "sliding_attention", "cross_attention"}:
        return f"its layers of type {', '.join(sorted(unknown))} keep a state that masked tokens write to"
    if "flash" in (getattr(config, "_attn_implementation", None) or ""):
        return "Flash Attention takes gaps between the positions of a single row for borders of packed sequences"
    return None


@contextlib.contextmanager
def embedded(model: nn.Module, embeddings: torch.Tensor | None) -> Iterator[None]:
    """Within the block, the model's first W tokens have the given embeddings.

    Args:
        model (`torch.nn.Module`): causal language model, or a PEFT model around one.
        embeddings (`torch.Tensor` of shape `(R, W, D)` or `None`): of the first W tokens; other tokens are embedded as usual,
            and all tokens are if `None`.
    """
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
    """Select features of all images and tiles in a row, in the container the model expects."""
    return _changed(output, lambda features: features[wanted])


def _changed(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> BaseModelOutputWithPooling:
    """Apply `change` to the features (N, D) of all images and tiles in a row, in the container the model expects."""

    def changed(features: Any) -> Any:
        if isinstance(features, torch.Tensor):
            return change(features.reshape(-1, features.shape[-1]))
        return [change(torch.cat(list(features)))]

    levels = getattr(output, "deepstack_features", None)  # Qwen3-VL adds features to deeper layers too
    if levels is None:
        return BaseModelOutputWithPooling(pooler_output=changed(output.pooler_output))
    return type(output)(pooler_output=changed(output.pooler_output), deepstack_features=[changed(level) for level in levels])


def _group_means(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Return the mean of each group's rows, (N, D), at the row whose index is the group; other rows are zero."""
    sums = torch.zeros_like(values).index_add(0, groups, values)
    counts = groups.bincount(minlength=len(values)).clamp(min=1)
    return sums / counts[:, None].to(sums)
