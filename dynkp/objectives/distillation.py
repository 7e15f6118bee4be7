"""MulCoT-RD's objective: hard labels and the assistant's soft labels, task by task (Findings of ACL 2026).

The loss of task k is L_k = (1-λ)·CE_k + λ·KL(softmax(z_A/T) ‖ softmax(z_S/T)), with z_S the student's and z_A the assistant's
logits at the tokens of an answer, and L = Σ_k w_k L_k. There is no factor T².

Gradients reach the student alone. Soft labels may be truncated to the assistant's K likeliest tokens: all others then count as
one further token, of both models, so that the truncated divergence is never larger than the whole one, and equal to it where K
is the size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.checkpoint import checkpoint

from dynkp.objectives.token_loss import PostLosses, TargetLoss

# Tensors of (tokens, V) with at least as many numbers are processed in pieces, which the backward pass computes again.
_LARGE = 2**25


class SoftLabels(NamedTuple):
    """The assistant's distributions over the next token at N positions, truncated to the K likeliest tokens.

    Attributes:
        ids (`torch.Tensor` of shape `(N, K)`): token ids.
        log_probs (`torch.Tensor` of shape `(N, K)`): their log softmax(z_A/T), in nats.
        rest (`torch.Tensor` of shape `(N,)`): log of the total probability of all other tokens; -inf if there are none.
        vocabulary (`int`): number of token ids that the distribution is over: those below this number.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    rest: torch.Tensor
    vocabulary: int


def truncate(logits: torch.Tensor, k: int, temperature: float) -> SoftLabels:
    """Truncate softmax(z_A/T) to its K likeliest tokens.

    Args:
        logits (`torch.Tensor` of shape `(N, V)`): z_A.
        k (`int`): K; values above V mean V.
        temperature (`float`): T > 0.

    Returns:
        [`SoftLabels`]: of N positions.

    Example:
        >>> truncate(torch.tensor([[0.0, 0.0, 0.0]]), 2, 1.0).rest.exp()
        tensor([0.3333])
    """
    vocabulary = logits.shape[1]
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    top, ids = log_probs.topk(min(k, vocabulary), dim=-1)
    rest = log_probs.scatter(-1, ids, -torch.inf).logsumexp(dim=-1)  # 1 - Σ top would consist of rounding errors
    return SoftLabels(ids, top, rest, vocabulary)


def soft_label_divergence(student: torch.Tensor, assistant: torch.Tensor | SoftLabels, temperature: float) -> torch.Tensor:
    """Compute KL(softmax(z_A/T) ‖ softmax(z_S/T)) of each token.

    Where the vocabularies have different sizes, both models' logits are cut to the ids they share, the first ones.

    Args:
        student (`torch.Tensor` of shape `(N, V_S)`): z_S.
        assistant (`torch.Tensor` of shape `(N, V_A)`, or [`SoftLabels`]): z_A, which gets no gradient; or truncated soft labels
            of the same temperature, whose ids must be ids of the student.
        temperature (`float`): T > 0; the paper's is 2.0.

    Returns:
        `torch.Tensor` of shape `(N,)`: nats, not negative up to rounding; float32, or float64 for float64 logits.

    Example:
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> soft_label_divergence(z, z, 2.0), soft_label_divergence(torch.zeros(1, 2), z, 2.0)
        (tensor([0.]), tensor([0.1109]))
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
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_q, log_p = ((logits.to(dtype) / temperature).log_softmax(dim=-1) for logits in (student, assistant))
    return kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)


def _truncated_divergence(student: torch.Tensor, labels: Sequence[torch.Tensor], temperature: float) -> torch.Tensor:
    """Compute the divergence over K tokens and one that stands for all others."""
    ids, log_probs, rest = labels
    scaled = student.to(torch.promote_types(student.dtype, torch.float32)) / temperature
    log_probs, rest = log_probs.to(scaled.dtype), rest.to(scaled.dtype)
    top = scaled.gather(-1, ids.long())
    if ids.shape[1] == scaled.shape[1]:
        return kl_div(top.log_softmax(dim=-1), log_probs, reduction="none", log_target=True).sum(dim=-1)
    # One pass over the vocabulary, and no difference of numbers close to 1: the K tokens have nearly all of the probability.
    others = scaled.scatter(-1, ids.long(), -torch.inf).logsumexp(dim=-1)
    everything = torch.logaddexp(top.logsumexp(dim=-1), others)
    top, others = top - everything[:, None], others - everything
    of_top = kl_div(top, log_probs, reduction="none", log_target=True).sum(dim=-1)
    return of_top + kl_div(others, rest, reduction="none", log_target=True)


def hard_label_loss(student: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Compute the cross-entropy -log softmax(z_S) of each token.

    Args:
        student (`torch.Tensor` of shape `(N, V)`): z_S.
        token_ids (`torch.Tensor` of shape `(N,)`): the tokens that should follow.

    Returns:
        `torch.Tensor` of shape `(N,)`: nats; float32, or float64 for float64 logits.

    Example:
        >>> hard_label_loss(torch.zeros(1, 2), torch.tensor([1]))
        tensor([0.6931])
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    return _in_pieces(lambda z, tokens: cross_entropy(z.to(dtype), tokens, reduction="none"), student, token_ids)


def distilled(hard: TargetLoss, soft: TargetLoss, distillation_weight: float) -> TargetLoss:
    """Combine hard and soft labels of one task: L_k = (1-λ)·CE_k + λ·KL_k, each the mean over a post's tokens.

    Args:
        hard ([`~dynkp.objectives.token_loss.TargetLoss`]): cross-entropy CE_k, parts of shape (B,).
        soft ([`~dynkp.objectives.token_loss.TargetLoss`]): divergence KL_k, parts of shape (B,); it may count other tokens.
        distillation_weight (`float`): λ between 0 and 1; the paper's is 0.3.

    Returns:
        [`~dynkp.objectives.token_loss.TargetLoss`]: parts of shape (B,), with the tokens of the cross-entropy.

    Example:
        >>> hard, soft = (TargetLoss(torch.tensor([total]), torch.tensor([2.0])) for total in (4.0, 2.0))
        >>> distilled(hard, soft, 0.25).mean
        tensor([1.7500])
    """
    mean = (1 - distillation_weight) * hard.mean + distillation_weight * soft.mean
    return TargetLoss(mean * hard.tokens, hard.tokens)


def multitask_loss(
    losses: Mapping[str, TargetLoss], task_weights: Mapping[str, float], over_tokens: bool = False
) -> PostLosses:
    """Combine the losses of the tasks: L = Σ_k w_k L_k.

    Args:
        losses (`Mapping[str, TargetLoss]`): L_k per task k, parts of shape (B,); at least one.
        task_weights (`Mapping[str, float]`): w_k per task; the paper's are 1 and 1.
        over_tokens (`bool`, *optional*, defaults to `False`): normalize over tokens instead of posts. Over posts, a post adds
            its tasks' weighted means and counts 1, whatever tasks it has; over tokens, it adds their weighted sums and weighted
            numbers of tokens.

    Returns:
        [`~dynkp.objectives.token_loss.PostLosses`]: parts of shape (B,).

    Example:
        >>> label, chain = (TargetLoss(torch.tensor([total]), torch.tensor([2.0])) for total in (4.0, 2.0))
        >>> multitask_loss({"label": label, "chain": chain}, {"label": 1.0, "chain": 1.0})
        PostLosses(total=tensor([3.]), denominator=tensor([1.]))
    """
    weighted = [(task_weights[task], loss) for task, loss in losses.items()]
    if over_tokens:
        total = torch.stack([weight * loss.total for weight, loss in weighted]).sum(dim=0)
        return PostLosses(total, torch.stack([weight * loss.tokens for weight, loss in weighted]).sum(dim=0))
    total = torch.stack([weight * loss.mean for weight, loss in weighted]).sum(dim=0)
    return PostLosses(total, torch.ones_like(total))


def _in_pieces(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """Apply `function` to tensors of N rows; if they are large, piece by piece, so that few temporaries exist at a time."""
    pieces = -(-tensors[0].numel() // _LARGE)
    if pieces <= 1:
        return function(*tensors)
    parts = zip(*(tensor.chunk(pieces) for tensor in tensors), strict=True)
    return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])
