"""Means over tokens: NLL(y | prompt) of the papers, per post.

Given   log-probabilities of the target's tokens, (B, T), zero at padding, and their weights, (B, T), zero at padding.
Gives   one number per post, (B,), in nats per token.
Holds   a post whose weights are all zero has no target and contributes an exact zero, never 0/0.
"""

from __future__ import annotations

import torch


def weighted_sums(log_probs: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator and denominator of a post's mean negative log-likelihood.

    Args:
        log_probs (`torch.Tensor` of shape `(B, T)`): log-probabilities of the target's tokens, in nats.
        weights (`torch.Tensor` of shape `(B, T)`): non-negative weight of each token, zero at padding.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the weighted sum of -log p and the sum of the weights, each `(B,)`.
    """
    weights = weights.to(log_probs.dtype)
    return -(log_probs * weights).sum(dim=1), weights.sum(dim=1)


def mean_over_tokens(log_probs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """NLL(y | prompt): the mean over y's tokens of -log p (Dynamic CoT, Eq. 2 and 4), per post.

    Args:
        log_probs (`torch.Tensor` of shape `(B, T)`): log-probabilities of the target's tokens, in nats.
        weights (`torch.Tensor` of shape `(B, T)`): token weights; all ones over the target is the paper's mean.

    Returns:
        `torch.Tensor` of shape `(B,)`: nats per token; 0 for a post without target.

    Example:

    ```python
    >>> mean_over_tokens(torch.tensor([[-1.0, -3.0, 0.0]]), torch.tensor([[1, 1, 0]]))
    tensor([2.])
    ```
    """
    total, weight = weighted_sums(log_probs, weights)
    return total / weight.clamp(min=torch.finfo(weight.dtype).tiny)
