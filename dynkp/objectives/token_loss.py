"""Negative log-likelihoods of targets: sums and means over tokens, and their share in the mean of an optimizer step.

The papers' NLL(y | x) is the mean over the tokens of target y of their negative log-likelihood under prompt x, in nats per
token. A post without a target (all its token weights are zero) contributes an exact zero, never 0/0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class PostLosses(NamedTuple):
    """One loss per post, as numerator and denominator of the optimizer step's mean.

    The loss of an optimizer step is the sum of all numerators over the sum of all denominators, over the posts of all
    micro-batches and ranks.

    Attributes:
        total (`torch.Tensor` of shape `(B,)`): what each post adds to the numerator, in nats.
        denominator (`torch.Tensor` of shape `(B,)`): what each post adds to the denominator: 1 for a mean over posts, its
            number of target tokens for a mean over tokens.
    """

    total: torch.Tensor
    denominator: torch.Tensor


class TargetLoss(NamedTuple):
    """Negative log-likelihood of one target per post, with numerator and denominator kept separate.

    Attributes:
        total (`torch.Tensor` of shape `(B,)`): Σ_t w_t · (-log p_t), in nats.
        tokens (`torch.Tensor` of shape `(B,)`): Σ_t w_t, the number of target tokens, each counted with its token weight; 0
            for a post without the target.
    """

    total: torch.Tensor
    tokens: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """NLL(y | x) (Dynamic CoT, Eq. 2 and 4): shape (B,), nats per token; 0 for a post without the target."""
        return self.total / self.tokens.clamp(min=torch.finfo(self.tokens.dtype).tiny)

    def normalized(self, over_tokens: bool) -> PostLosses:
        """Weigh the posts against each other.

        Args:
            over_tokens (`bool`): take the optimizer step's mean over target tokens, so that a post counts by its number of
                tokens. `False` takes the mean over each post's tokens first and then over posts.

        Returns:
            [`PostLosses`]: total and tokens, or mean and ones.

        Example:
            >>> loss = TargetLoss(total=torch.tensor([6.0]), tokens=torch.tensor([3.0]))
            >>> loss.normalized(over_tokens=True)
            PostLosses(total=tensor([6.]), denominator=tensor([3.]))
            >>> loss.normalized(over_tokens=False)
            PostLosses(total=tensor([2.]), denominator=tensor([1.]))
        """
        return PostLosses(*self) if over_tokens else PostLosses(self.mean, torch.ones_like(self.total))


def target_loss(log_probs: torch.Tensor, weights: torch.Tensor) -> TargetLoss:
    """Sum the token losses of each post's target.

    Args:
        log_probs (`torch.Tensor` of shape `(B, T)`): log-probabilities of the target's tokens, in nats.
        weights (`torch.Tensor` of shape `(B, T)`): token weights, zero at padding; ones elsewhere give the papers' mean.

    Returns:
        [`TargetLoss`]: parts of shape (B,), in the dtype of `log_probs`.

    Example:
        >>> target_loss(torch.tensor([[-1.0, -3.0, 0.0]]), torch.tensor([[1, 1, 0]])).mean
        tensor([2.])
    """
    weights = weights.to(log_probs.dtype)
    return TargetLoss(-(log_probs * weights).sum(dim=1), weights.sum(dim=1))


def sum_per_post(values: torch.Tensor, mask: torch.Tensor) -> TargetLoss:
    """Sum token losses that are given in one row, post by post.

    Args:
        values (`torch.Tensor` of shape `(N,)`): losses of N tokens, in reading order, in nats.
        mask (`torch.Tensor` of shape `(B, L)`): bool; its N True entries are the tokens' positions.

    Returns:
        [`TargetLoss`]: parts of shape (B,); each token has weight 1.

    Example:
        >>> sum_per_post(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([[True, True], [False, True]])).total
        tensor([4., 5.])
    """
    spread = values.new_zeros(mask.shape).masked_scatter(mask, values)
    return TargetLoss(spread.sum(dim=1), mask.to(values.dtype).sum(dim=1))
