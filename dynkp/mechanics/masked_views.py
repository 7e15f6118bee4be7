"""AimKP's views of a batch of posts: the full inputs, the inputs with text masked, and those with images masked.

Given a batch of left-padded prompts and a stride per post and modality, [`BatchedViews`] and [`PlainViews`] compute the losses
of one target per post given any of its views, and each post's gradient of them.

Guarantee: [`BatchedViews`] equals [`PlainViews`], the reference with one ordinary forward and backward pass per post and view,
in losses, cosines and gradients: to rounding, for unequal lengths, with and without gradient checkpointing.

[`BatchedViews`] is cheap because images are encoded once, masked tokens are not computed at all, and what is in front of a
post's text, its images above all, is computed once for the full and the text-masked view.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dynkp.batches.prompt_layout import PromptLayout
from dynkp.batches.targets import CONTINUED_INPUTS, Targets, targets_of
from dynkp.batches.typed_batches import MaskedViewBatch, SinglePostsBatch
from dynkp.mechanics.gradient_similarity import PlainPostGradients, PostGradients, VariantGradients
from dynkp.mechanics.modality_masking import (
    EncodedPrompt,
    Mask,
    Pooling,
    embedded,
    encode,
    image_token_counts,
    keep_mask,
    masked,
    pool,
    random_keep_mask,
    why_tokens_cannot_be_dropped,
)
from dynkp.mechanics.shared_prompt import (
    PlainPrompt,
    Scorer,
    SharedPrefix,
    loss_of_log_probs,
    prompt_positions,
    score_targets,
)
from dynkp.objectives.token_loss import TargetLoss

FULL = "full"
MASK_PATTERNS = ("strided", "random", "pooled")


@dataclass(frozen=True)
class Masking:
    """How masked variants are made from strides (Eq. 2, and the ablations of Table 5).

    Attributes:
        pattern (`str`): what is kept of a masked modality: `"strided"` (the paper's: the last token of each stride),
            `"random"` (as many tokens, drawn for each visit) or `"pooled"` (as many, each the mean of its stride).
        visit (`int`): how often the posts were visited before, such as the epoch's number; used by `"random"`.
        seed (`int`): the run's seed; used by `"random"`.
    """

    pattern: str = "strided"
    visit: int = 0
    seed: int = 0

    def masks(
        self, layouts: Sequence[PromptLayout], strides: Mapping[str, Sequence[int]], width: int, post_ids: Sequence[str]
    ) -> dict[str, Mask]:
        """Mask the prompts of a batch, one modality at a time.

        Args:
            layouts (`Sequence[PromptLayout]`): B layouts: where the text and the images of each post are in its prompt.
            strides (`Mapping[str, Sequence[int]]`): per masked modality, `"text"` or `"image"`, B strides.
            width (`int`): P, the columns of the padded prompts.
            post_ids (`Sequence[str]`): the B posts' ids.

        Returns:
            `dict[str, Mask]`: per masked modality, which tokens are kept.
        """
        masks = {}
        for modality, of_posts in strides.items():
            if self.pattern == "random":
                visits = [self.visit] * len(layouts)
                keep = random_keep_mask(layouts, modality, of_posts, width, post_ids=post_ids, visits=visits, seed=self.seed)
                masks[modality] = Mask(keep)
            else:
                pooling = pool(layouts, modality, of_posts, width) if self.pattern == "pooled" else None
                masks[modality] = Mask(keep_mask(layouts, modality, of_posts, width), pooling)
        return masks


class MaskedViews:
    """The views of a batch, and the gradients of their losses: the interface of both implementations.

    Iterating over it gives the names of the views: `"full"`, then the masked modalities.

    Args:
        gradients ([`~dynkp.mechanics.gradient_similarity.VariantGradients`]): records each post's gradient per view.
        indices (`Mapping[str, Sequence[int]]`): per view the posts that have it; all of them for `"full"`, which is the first.
    """

    def __init__(self, gradients: VariantGradients, indices: Mapping[str, Sequence[int]]):
        self.gradients, self.indices = gradients, dict(indices)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the views."""
        return iter(self.indices)

    def log_probs(self, view: str, targets: Targets, indices: Sequence[int]) -> torch.Tensor:
        """Compute the log-probabilities of the targets' tokens.

        Args:
            view (`str`): `"full"` or a masked modality.
            targets ([`~dynkp.batches.targets.Targets`]): B targets.
            indices (`Sequence[int]`): the posts whose targets are computed; the others cost nothing.

        Returns:
            `torch.Tensor` of shape `(len(indices), T)`: nats, zero at padding; T is the length of the longest target among
            `indices`.
        """
        raise NotImplementedError

    def loss(self, view: str, targets: Targets, indices: Sequence[int] | None = None) -> TargetLoss:
        """Compute the losses of the targets given a view.

        Args:
            view (`str`): `"full"` or a masked modality.
            targets ([`~dynkp.batches.targets.Targets`]): B targets.
            indices (`Sequence[int]`, *optional*): the posts whose targets are computed; by default those that have the view.

        Returns:
            [`~dynkp.objectives.token_loss.TargetLoss`]: parts of shape (len(indices),).
        """
        indices = self.indices[view] if indices is None else indices
        return loss_of_log_probs(self.log_probs(view, targets, indices), targets, indices)

    def backward(self, view: str, targets: Targets, over_tokens: bool) -> None:
        """Run a view forward and backward and record each post's gradient, g_0 or g_m.

        The views must be run once each, in their order.

        Args:
            view (`str`): `"full"` or a masked modality.
            targets ([`~dynkp.batches.targets.Targets`]): B targets.
            over_tokens (`bool`): take the sum over a target's tokens as its loss, as in
                [`~dynkp.objectives.token_loss.TargetLoss.normalized`]; otherwise the mean.
        """

        def losses(indices: Sequence[int]) -> torch.Tensor:
            return self.loss(view, targets, indices).normalized(over_tokens).total

        *_, last = self.indices  # the others share a part of their graph with a view to come
        self.gradients.add(view, losses, self.indices[view], retain_graph=view != last)
        self._release(view)

    def cosines(self) -> torch.Tensor:
        """Compute c_m = cos(g_0, g_m), Eq. 3, of the views that were run.

        Returns:
            `torch.Tensor` of shape `(B, M)`: one column per masked modality; NaN where a post does not have the variant.
        """
        columns = []
        for view in list(self.indices)[1:]:
            cosines = self.gradients.cosines(view)
            has_view = torch.zeros(len(cosines), dtype=torch.bool)
            has_view[list(self.indices[view])] = True
            columns.append(cosines.masked_fill(~has_view.to(cosines.device), torch.nan))
        return torch.stack(columns, dim=1)

    def losses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses of the views that were run, with the recorded gradients.

        Their backward pass delivers weighted sums of the posts' gradients, without another pass through the model; see
        [`~dynkp.mechanics.gradient_similarity.VariantGradients.losses`].

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: ℓ_0 of the full inputs, (B,), and ℓ_m of the masked variants, (B, M); 0 where
            a post does not have the variant.
        """
        full, *variants = self.gradients.losses(list(self.indices))
        return full, torch.stack(variants, dim=1)

    def _release(self, view: str) -> None:
        """Free what no other view needs, once a view has run backward."""


class BatchedViews(MaskedViews):
    """All views of a batch, each computed for all posts at once.

    Args:
        model (`torch.nn.Module`): causal (vision-)language model (or a PEFT model around one) for which
            [`~dynkp.mechanics.gradient_similarity.why_gradients_cannot_be_batched`] returns `None`.
        batch ([`~dynkp.batches.typed_batches.MaskedViewBatch`]): a batch of B posts.
        strides (`Mapping[str, Sequence[int]]`): per masked modality, `"text"` or `"image"`, B strides.
        masking ([`Masking`], *optional*): how strides become masks.
        longest_target (`int`): tokens of the longest target the views will be computed for.
        shares_prefix (`bool`, *optional*, defaults to `True`): compute what is in front of the texts once for the full and the
            text-masked view.
        score ([`~dynkp.mechanics.shared_prompt.Scorer`], *optional*): computes log-probabilities from model inputs.

    Attributes:
        why_masked (`str` or `None`): why masked tokens are masked rather than dropped, which costs more; `None` if they are
            dropped. Nothing is shared between views then.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: MaskedViewBatch,
        strides: Mapping[str, Sequence[int]],
        masking: Masking = Masking(),
        *,
        longest_target: int,
        shares_prefix: bool = True,
        score: Scorer = score_targets,
    ):
        prompt, layouts = batch["prompt"], batch["layouts"]
        count, width = prompt["input_ids"].shape
        gradients = PostGradients(model, count, image_token_counts(model, prompt))
        super().__init__(gradients, _indices_of_views(layouts, strides))
        self.model, self.score = model, score
        self.why_masked = why_tokens_cannot_be_dropped(model, width + longest_target)
        every_token = torch.ones(count, width, dtype=torch.bool)
        self.masks = {FULL: Mask(every_token), **masking.masks(layouts, strides, width, batch["id"])}
        self.prefix: SharedPrefix | None = None
        with gradients.rows(range(count)):
            self.encoded = encode(model, prompt)
            if shares_prefix and "text" in strides and not self.why_masked:
                # Where each post's text starts; a post without text shares all but the last token.
                starts = [layout.text.start if layout.text else width - 1 for layout in layouts]
                if max(starts) > 0:
                    self.behind = torch.arange(width) >= torch.as_tensor(starts)[:, None]
                    beginning = self.encoded.before(starts)
                    self.prefix = SharedPrefix(model, beginning.inputs, beginning.positions, score)

    def log_probs(self, view: str, targets: Targets, indices: Sequence[int]) -> torch.Tensor:
        """Compute the log-probabilities of the targets' tokens; see [`MaskedViews.log_probs`]."""
        mask, targets = self.masks[view], targets_of(targets, indices)
        keep = mask.keep[list(indices)]
        encoded = self.encoded if mask.pooling is None else self.encoded.pooled(self.model, mask.pooling)
        seen = encoded.view(keep, indices, drop=not self.why_masked or mask.pooling is not None)
        positions = _positions(self.model, seen, mask.pooling, indices)
        if self.prefix is None or view == "image":
            with embedded(self.model, seen.embeddings):
                return PlainPrompt(self.model, seen.inputs, self.score, positions).log_probs(targets)
        rest = encoded.view(keep & self.behind[list(indices)], indices)
        tokens = {key: value for key, value in rest.inputs.items() if key in CONTINUED_INPUTS}
        with embedded(self.model, rest.embeddings):
            positions = positions[..., -tokens["input_ids"].shape[1] :]  # the views have the same end
            return self.prefix.log_probs(tokens, positions, targets, indices)

    def _release(self, view: str) -> None:
        if view == "text" and self.prefix is not None:  # the last view that begins with it
            self.prefix.close()
            self.prefix = None


class PlainViews(MaskedViews):
    """The reference of [`BatchedViews`], and the published method: each post and view by itself, masked tokens in their place.

    Args:
        model (`torch.nn.Module`): causal (vision-)language model, or a PEFT model around one.
        batch ([`~dynkp.batches.typed_batches.SinglePostsBatch`]): a batch of B posts, whole and post by post.
        strides (`Mapping[str, Sequence[int]]`): as for [`BatchedViews`].
        masking ([`Masking`], *optional*): as for [`BatchedViews`].
        score ([`~dynkp.mechanics.shared_prompt.Scorer`], *optional*): as for [`BatchedViews`].
    """

    def __init__(
        self,
        model: nn.Module,
        batch: SinglePostsBatch,
        strides: Mapping[str, Sequence[int]],
        masking: Masking = Masking(),
        *,
        score: Scorer = score_targets,
    ):
        singles = batch["single_posts"]
        super().__init__(PlainPostGradients(model, len(singles)), _indices_of_views(batch["layouts"], strides))
        self.model, self.score = model, score
        self.prompts = [single["prompt"] for single in singles]
        self.masks = []
        for index, single in enumerate(singles):
            own = {modality: [of_posts[index]] for modality, of_posts in strides.items()}
            width, post_ids = single["prompt"]["input_ids"].shape[1], [batch["id"][index]]
            self.masks.append(masking.masks(single["layouts"], own, width, post_ids))

    def log_probs(self, view: str, targets: Targets, indices: Sequence[int]) -> torch.Tensor:
        """Compute the log-probabilities of the targets' tokens; see [`MaskedViews.log_probs`]."""
        length = max((targets["lengths"][index] for index in indices), default=0)
        rows = []
        for index in indices:
            prompt, target = self.prompts[index], targets_of(targets, [index])
            mask = self.masks[index].get(view)
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


def _indices_of_views(layouts: Sequence[PromptLayout], modalities: Iterable[str]) -> dict[str, list[int]]:
    """Per view, the posts that have it: a masked variant needs something to mask."""
    indices = {FULL: list(range(len(layouts)))}
    for modality in modalities:
        indices[modality] = [index for index, layout in enumerate(layouts) if layout.has(modality)]
    return indices


def _positions(model: nn.Module, seen: EncodedPrompt, pooling: Pooling | None, indices: Sequence[int]) -> torch.Tensor:
    """Return the position ids of a view: masked tokens leave gaps, pooled ones do not."""
    return seen.positions if pooling is None else seen.renumbered(model, [pooling.grids[index] for index in indices])
