"""MulCoT-RD's loss: hard labels and the assistant's soft labels, task by task.

Given   the student's logits z_S at the answers' tokens, (N, V), and what the assistant says about the same tokens: its
        logits z_A, or its K likeliest tokens with their log-probabilities.
Gives   one divergence per token, KL(softmax(z_A/T) ‖ softmax(z_S/T)) in nats, without the factor T², and the task's loss
        (1-λ)·CE + λ·KL per post.
Holds   gradients reach the student alone; with K = V the truncated divergence is the whole one, and with a smaller K
        never more than it: what is left out of the K counts as one further token, of both models.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from dynkp.objectives.token_loss import TargetLoss

with warnings.catch_warnings():  # "APIs here are unstable": tests/trainer/test_trl_seam.py finds out before a user does
    warnings.simplefilter("ignore", UserWarning)
    from trl.experimental.gkd import GKDTrainer

# Numbers in a (tokens, V) tensor from which on it is taken in pieces that the backward pass computes again.
_LARGE = 2**25


class SoftLabels(NamedTuple):
    """What the assistant says about N tokens, cut to its K likeliest, at the temperature of the distillation.

    Attributes:
        ids (`torch.Tensor` of shape `(N, K)`): token ids.
        log_probs (`torch.Tensor` of shape `(N, K)`): log softmax(z_A/T) of these.
        rest (`torch.Tensor` of shape `(N,)`): log of the probability of all other tokens together; -inf if there are none.
        vocabulary (`int`): ids the probabilities are spread over: those below this number.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    rest: torch.Tensor
    vocabulary: int


def truncate(logits: torch.Tensor, k: int, temperature: float) -> SoftLabels:
    """The K likeliest tokens of softmax(z_A/T), and what the others have together.

    Args:
        logits (`torch.Tensor` of shape `(N, V)`): z_A.
        k (`int`): K; V if it is larger.
        temperature (`float`): T > 0.

    Example: `truncate(torch.tensor([[0.0, 0.0, 0.0]]), 2, 1.0).rest.exp()` is 1/3.
    """
    vocabulary = logits.shape[1]
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    top, ids = log_probs.topk(min(k, vocabulary), dim=-1)
    rest = log_probs.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)  # 1 - Σ top would be rounding alone
    return SoftLabels(ids, top, rest, vocabulary)


def soft_label_divergence(student: torch.Tensor, assistant: torch.Tensor | SoftLabels, temperature: float) -> torch.Tensor:
    """KL(softmax(z_A/T) ‖ softmax(z_S/T)) of each token.

    Both are cut to the ids they share: the first V where the vocabularies have different sizes.

    Args:
        student (`torch.Tensor` of shape `(N, V_S)`): z_S.
        assistant (`torch.Tensor` of shape `(N, V_A)`, or [`SoftLabels`]): z_A, without gradient; or its likeliest tokens at
            the same temperature, which must be ids of the student's.
        temperature (`float`): T > 0; the paper's is 2.0.

    Returns:
        `torch.Tensor` of shape `(N,)`: nats, not negative up to rounding.

    Example:

    ```python
    >>> z = torch.tensor([[2.0, 0.0]])
    >>> soft_label_divergence(z, z, 2.0), soft_label_divergence(torch.zeros(1, 2), z, 2.0)
    (tensor([0.]), tensor([0.1109]))
    ```
    """
    if isinstance(assistant, SoftLabels):
        ids, log_probs, rest, vocabulary = assistant
        return _in_pieces(
            lambda z, *labels: _truncated_divergence(z[:, :vocabulary], labels, temperature), student, ids, log_probs, rest
        )
    shared = min(student.shape[1], assistant.shape[1])
    return _in_pieces(
        lambda z_s, z_a: _whole_divergence(z_s[:, :shared], z_a[:, :shared], temperature), student, assistant.detach()
    )


def _whole_divergence(student: torch.Tensor, assistant: torch.Tensor, temperature: float) -> torch.Tensor:
    # TRL's generalized Jensen-Shannon divergence is the forward KL at beta 0.
    dtype = torch.promote_types(student.dtype, torch.float32)
    return GKDTrainer.generalized_jsd_loss(
        student.to(dtype), assistant.to(dtype), beta=0, temperature=temperature, reduction="none"
    ).sum(dim=-1)


def _truncated_divergence(student: torch.Tensor, labels: Sequence[torch.Tensor], temperature: float) -> torch.Tensor:
    """The divergence of K tokens and one that stands for all others; exact for the K, a lower bound for the others."""
    ids, log_probs, rest = labels
    scaled = student.to(torch.promote_types(student.dtype, torch.float32)) / temperature
    log_probs, rest = log_probs.to(scaled.dtype), rest.to(scaled.dtype)
    top = scaled.gather(-1, ids.long())
    if ids.shape[1] == scaled.shape[1]:
        top = top.log_softmax(dim=-1)
        return (log_probs.exp() * (log_probs - top)).sum(dim=-1)
    # One pass over the vocabulary, and no difference of numbers close to 1: the K hold nearly all there is.
    others = scaled.scatter(-1, ids.long(), -torch.inf).logsumexp(dim=-1)
    everything = torch.logaddexp(top.logsumexp(dim=-1), others)
    top, others = top - everything[:, None], others - everything
    return (log_probs.exp() * (log_probs - top)).sum(dim=-1) + rest.exp() * (rest - others)


def hard_label_loss(student: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """-log p_S of each token, (N,), nats; `student` holds the logits (N, V_S), `token_ids` (N,) what should follow."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    return _in_pieces(
        lambda z, tokens: torch.nn.functional.cross_entropy(z.to(dtype), tokens, reduction="none"), student, token_ids
    )


def distilled(hard: TargetLoss, soft: TargetLoss, weight: float) -> TargetLoss:
    """(1-λ)·CE + λ·KL of one task, each the mean over a post's tokens.

    Args:
        hard, soft ([`TargetLoss`]): cross-entropy and divergence, parts `(B,)`.
        weight (`float`): λ between 0 and 1; the paper's is 0.3.

    Returns:
        [`TargetLoss`]: parts `(B,)`; a post weighs what its cross-entropy weighs, 0 without this task.

    Example: a CE of 2.0 and a KL of 1.0 at λ = 0.25 make 1.75.
    """
    return TargetLoss(((1 - weight) * hard.mean + weight * soft.mean) * hard.tokens, hard.tokens)


def multitask_loss(
    losses: Sequence[TargetLoss], weights: Sequence[float], over_tokens: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """L = Σ_k w_k L_k, as what each post adds to numerator and denominator of the optimizer step's mean.

    Over posts (the default) a post adds its tasks' weighted means and counts 1, whatever tasks it has. Over tokens it adds
    their weighted sums and tokens.

    Args:
        losses (`Sequence[TargetLoss]`): one per task, parts `(B,)`; at least one.
        weights (`Sequence[float]`): w_k; the paper's are 1 and 1.
        over_tokens (`bool`): normalise over tokens instead of posts.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: numerator and denominator, each `(B,)`.

    Example: means 2.0 (label) and 1.0 (chain) with weights 1 and 1 give 3.0 over 1.
    """
    pairs = list(zip(losses, weights, strict=True))
    if over_tokens:
        sums = zip(*((w * loss.total, w * loss.tokens) for loss, w in pairs), strict=True)
        numerator, denominator = (torch.stack(parts).sum(dim=0) for parts in sums)
        return numerator, denominator
    total = torch.stack([w * loss.mean for loss, w in pairs]).sum(dim=0)
    return total, torch.ones_like(total)


def _in_pieces(function: Callable[..., torch.Tensor], *rows: torch.Tensor) -> torch.Tensor:
    """`function` of tensors with N rows; where they are large, piece by piece, so that few temporaries live at once."""
    pieces = -(-rows[0].numel() // _LARGE)
    if pieces <= 1:
        return function(*rows)
    parts = zip(*(tensor.chunk(pieces) for tensor in rows), strict=True)
    return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])
