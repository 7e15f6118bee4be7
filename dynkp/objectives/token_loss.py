"""Means over tokens: NLL(y | prompt) of the papers, per post.

Given   log-probabilities of the target's tokens, (B, T), zero at padding, and their weights, (B, T), zero at padding.
Gives   one number per post, (B,), in nats per token.
Holds   a post whose weights are all zero has no target and contributes an exact zero, never 0/0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class TargetLoss(NamedTuple):
    """Negative log-likelihood of one target per post, numerator and denominator apart.

    Attributes:
        total (`torch.Tensor` of shape `(B,)`): Σ_t w_t · (-log p_t), nats.
        weight (`torch.Tensor` of shape `(B,)`): Σ_t w_t; 0 where the post has no such target.
    """

    total: torch.Tensor
    weight: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """NLL(y | prompt) of Dynamic CoT's Eq. 2 and 4, (B,), nats per token; 0 for a post without target."""
        return self.total / self.weight.clamp(min=torch.finfo(self.weight.dtype).tiny)

    def detach(self) -> TargetLoss:
        """The same numbers without their graph: to look at, not to learn from."""
        return TargetLoss(self.total.detach(), self.weight)


def target_loss(log_probs: torch.Tensor, weights: torch.Tensor) -> TargetLoss:
    """Sum a target's token losses, post by post.

    Args:
        log_probs (`torch.Tensor` of shape `(B, T)`): log-probabilities of the target's tokens, in nats.
        weights (`torch.Tensor` of shape `(B, T)`): token weights; all ones over the target is the papers' mean.

    Returns:
        [`TargetLoss`]

    Example:

    ```python
    >>> target_loss(torch.tensor([[-1.0, -3.0, 0.0]]), torch.tensor([[1, 1, 0]])).mean
    tensor([2.])
    ```
    """
    weights = weights.to(log_probs.dtype)
    return TargetLoss(-(log_probs * weights).sum(dim=1), weights.sum(dim=1))
