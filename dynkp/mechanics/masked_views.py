"""AimKP's views of a batch of posts: the full input, the text masked, the pictures masked, all asked for one target.

Given   a batch of left-padded prompts and, per masked view, a [`~dynkp.mechanics.modality_masking.Mask`].
Gives   `log_probs(view, targets, posts)`: log-probabilities of the targets' tokens given that view of these posts.
Holds   [`BatchedViews`] equals [`PlainViews`], the plain twin with one ordinary forward per post and view, in values and
        gradients: to rounding, for unequal lengths, with and without gradient checkpointing.

What makes the batched way cheap: the pictures are encoded once, masked tokens are not computed at all, and what stands in
front of a post's text, its pictures above all, is run once for the full and the text-masked view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dynkp.batches.targets import CONTINUED_INPUTS, Targets, targets_of
from dynkp.mechanics.modality_masking import EncodedPrompt, Mask, Pooling, embedded, encode, masked
from dynkp.mechanics.shared_prompt import PlainPrompt, Scorer, SharedPrefix, prompt_positions, score_targets

FULL = "full"


class BatchedViews:
    """All views of a batch.

    Args:
        model: causal (vision-)language model, or a PEFT model around one.
        prompt (`dict`): the processor's output for B posts, left-padded.
        masks (`dict` of [`~dynkp.mechanics.modality_masking.Mask`]): per masked view, of `"text"` and `"image"`.
        starts (`Sequence[int]`, *optional*): B first slots that the full and the text-masked view do not share; every picture
            must lie in front of them. Nothing is shared, if `None`.
        drop: whether masked tokens are left out rather than masked; where
            [`~dynkp.mechanics.modality_masking.why_tokens_cannot_be_dropped`] objects, neither drop nor share.
        score ([`Scorer`], *optional*): how hidden states become log-probabilities.
    """

    def __init__(
        self,
        model: nn.Module,
        prompt: dict[str, Any],
        masks: Mapping[str, Mask],
        starts: Sequence[int] | None = None,
        drop: bool = True,
        score: Scorer = score_targets,
    ):
        self.model, self.drop, self.score = model, drop, score
        self.encoded = encode(model, prompt)
        everything = torch.ones(prompt["input_ids"].shape, dtype=torch.bool)
        self.masks = {FULL: Mask(everything), **masks}
        self.prefix: SharedPrefix | None = None
        if starts is not None and max(starts) > 0:
            self.behind = torch.arange(everything.shape[1]) >= torch.as_tensor(starts)[:, None]
            beginning = self.encoded.before(starts)
            self.prefix = SharedPrefix(model, beginning.inputs, beginning.positions, score)

    def log_probs(self, view: str, targets: Targets, posts: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the targets' tokens.

        Args:
            view (`str`): `"full"` or a masked view.
            targets ([`Targets`]): B targets.
            posts (`Sequence[int]`): the posts wanted.

        Returns:
            `torch.Tensor` of shape `(len(posts), T)`: nats, zero at padding; T is the longest target among `posts`.
        """
        mask, targets = self.masks[view], targets_of(targets, posts)
        keep = mask.keep[list(posts)]
        encoded = self.encoded if mask.pooling is None else self.encoded.pooled(self.model, mask.pooling)
        seen = encoded.view(keep, posts, drop=self.drop or mask.pooling is not None)
        positions = _positions(self.model, seen, mask.pooling, posts)
        if self.prefix is None or view == "image":
            with embedded(self.model, seen.embeddings):
                return PlainPrompt(self.model, seen.inputs, self.score, positions).log_probs(targets)
        rest = encoded.view(keep & self.behind[list(posts)], posts)
        tokens = {key: value for key, value in rest.inputs.items() if key in CONTINUED_INPUTS}
        with embedded(self.model, rest.embeddings):
            positions = positions[..., -tokens["input_ids"].shape[1] :]  # the views end alike
            return self.prefix.log_probs(tokens, positions, targets, posts)

    def done(self, view: str) -> None:
        """Say that this view ran backward: what no other one needs is given free."""
        if view == "text" and self.prefix is not None:  # the last one to begin with it
            self.prefix.close()
            self.prefix = None


class PlainViews:
    """The plain twin of [`BatchedViews`], and the published way: a forward per post and view, masked tokens in their place.

    Args:
        model: as for the twin.
        prompts (`Sequence[dict]`): the processor's output for each of the B posts alone.
        masks (`Sequence[dict]`): for each post alone, per masked view.
        score ([`Scorer`], *optional*): as for the twin.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[dict[str, Any]],
        masks: Sequence[Mapping[str, Mask]],
        score: Scorer = score_targets,
    ):
        self.model, self.prompts, self.masks, self.score = model, prompts, masks, score

    def log_probs(self, view: str, targets: Targets, posts: Sequence[int]) -> torch.Tensor:
        """As [`BatchedViews.log_probs`]."""
        length = max((targets["lengths"][post] for post in posts), default=0)
        rows = []
        for post in posts:
            prompt, target = self.prompts[post], targets_of(targets, [post])
            mask = self.masks[post].get(view)
            if mask is not None and mask.pooling is not None:
                short = encode(self.model, prompt).pooled(self.model, mask.pooling).view(mask.keep)
                positions = _positions(self.model, short, mask.pooling, [0])
                with embedded(self.model, short.embeddings):
                    row = PlainPrompt(self.model, short.inputs, self.score, positions).log_probs(target)
            else:
                seen = prompt if mask is None else masked(prompt, mask.keep.to(prompt["attention_mask"].device))
                row = PlainPrompt(self.model, seen, self.score, prompt_positions(self.model, prompt)).log_probs(target)
            rows.append(nn.functional.pad(row, (0, length - row.shape[1])))
        return torch.cat(rows) if rows else torch.zeros(0, length)

    def done(self, view: str) -> None:
        """As [`BatchedViews.done`]; nothing is kept here."""


def _positions(model: nn.Module, seen: EncodedPrompt, pooling: Pooling | None, posts: Sequence[int]) -> torch.Tensor:
    """Masked tokens leave gaps, pooled ones do not."""
    return seen.positions if pooling is None else seen.renumbered(model, [pooling.grids[post] for post in posts])
