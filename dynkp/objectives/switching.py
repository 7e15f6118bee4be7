"""Dynamic CoT's switch (Ma et al., EMNLP 2025, Section 3.3) and the thresholds its losses are compared with.

A post is easy if its direct loss under the current weights, in nats per token, is below the threshold γ (Eq. 5); it is then
trained on its reasoning target, and otherwise on its direct target (Eq. 4). A tie is direct.

A threshold that is computed from the losses changes between optimizer steps only, so that the number of micro-batches and of
ranks never changes a decision. Its state is plain JSON.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from typing import Any

import torch

from dynkp.objectives.token_loss import PostLosses, TargetLoss


def below_threshold(direct_loss: torch.Tensor, gamma: float) -> torch.Tensor:
    """Determine the easy posts: those with a direct loss below γ, strictly (Eq. 5).

    Args:
        direct_loss (`torch.Tensor` of shape `(B,)`): L_sft, the mean negative log-likelihood of the direct target, in nats per
            token.
        gamma (`float`): γ, in nats per token; 0 makes no post easy, `inf` every post.

    Returns:
        `torch.Tensor` of shape `(B,)`: bool; False for a loss that is NaN.

    Example:
        >>> below_threshold(torch.tensor([0.1, 0.4, 0.9]), 0.4)
        tensor([ True, False, False])
    """
    return direct_loss < gamma


def switched_loss(easy: torch.Tensor, reasoning: TargetLoss, direct: TargetLoss) -> TargetLoss:
    """Select the loss of the target that each post is trained on, NLL(y^d | x) of Eq. 4.

    Args:
        easy (`torch.Tensor` of shape `(B,)`): bool; where True the post is trained on its reasoning target, y^d = y^c,
            elsewhere its direct target, y^d = y^s.
        reasoning ([`TargetLoss`]): loss of the reasoning targets y^c, parts of shape (B,).
        direct ([`TargetLoss`]): loss of the direct targets y^s, parts of shape (B,).

    Returns:
        [`TargetLoss`]: parts of shape (B,). Posts get no gradient from the loss that is not selected.

    Example:
        >>> direct = TargetLoss(torch.tensor([6.0, 8.0]), torch.tensor([3.0, 2.0]))
        >>> reasoning = TargetLoss(torch.tensor([0.0, 20.0]), torch.tensor([0.0, 10.0]))
        >>> switched_loss(torch.tensor([False, True]), reasoning, direct).mean
        tensor([2., 2.])
    """
    if easy.all():
        return reasoning  # without the direct loss, whose graph would only be traversed with zero gradients
    return TargetLoss(*(torch.where(easy, *parts) for parts in zip(reasoning, direct, strict=True)))


def mixed_loss(
    direct: TargetLoss, reasoning: TargetLoss, reasoning_share: torch.Tensor, over_tokens: bool = False
) -> PostLosses:
    """Combine both objectives of a post (the row "multi-task" of Table 4 of the paper).

    Args:
        direct ([`TargetLoss`]): loss of the direct targets y^s, parts of shape (B,).
        reasoning ([`TargetLoss`]): loss of the reasoning targets y^c, parts of shape (B,).
        reasoning_share (`torch.Tensor` of shape `(B,)`): weight of the reasoning objective against 1 for the direct one; 0
            for a post without a reasoning target.
        over_tokens (`bool`, *optional*, defaults to `False`): normalize over tokens instead of posts: a post then adds both
            targets' summed losses and their tokens, instead of the weighted average of their means and 1.

    Returns:
        [`~dynkp.objectives.token_loss.PostLosses`]: parts of shape (B,).

    Example:
        >>> direct = TargetLoss(torch.tensor([4.0]), torch.tensor([2.0]))
        >>> reasoning = TargetLoss(torch.tensor([5.0]), torch.tensor([5.0]))
        >>> mixed_loss(direct, reasoning, torch.tensor([1.0]))
        PostLosses(total=tensor([1.5000]), denominator=tensor([1.]))
    """
    if over_tokens:
        total = direct.total + reasoning_share * reasoning.total
        return PostLosses(total, direct.tokens + reasoning_share * reasoning.tokens)
    total = (direct.mean + reasoning_share * reasoning.mean) / (1 + reasoning_share)
    return PostLosses(total, torch.ones_like(total))


class Threshold:
    """A constant γ, and the interface of thresholds that are computed from the losses.

    [`value`] is γ for a whole optimizer step; [`observe`] takes the direct losses of a completed step (of the posts of all
    ranks) and changes γ for the next one. Losses that are not finite (an overflow) are left out: one of them would decide for
    all later posts.

    Args:
        gamma (`float`): γ, in nats per token.

    Attributes:
        is_constant (`bool`): whether γ does not depend on the losses.
    """

    is_constant = True

    def __init__(self, gamma: float):
        self._gamma = gamma

    @property
    def value(self) -> float:
        """γ in force, in nats per token."""
        return self._gamma

    def observe(self, direct_losses: list[float]) -> None:
        """Update γ with the direct losses of an optimizer step; a constant stays as it is.

        Args:
            direct_losses (`list[float]`): nats per token, in any order.
        """

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold, as JSON values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            state (`dict`): what [`state`] returned.
        """


class RunningMeanThreshold(Threshold):
    """γ as the mean of all direct losses observed so far (the paper's "avg", Table 5).

    Before the first step there is no mean and no post is below it, so the first step is direct.

    Example:
        >>> threshold = RunningMeanThreshold()
        >>> threshold.observe([2.0, 4.0])
        >>> threshold.value
        3.0
    """

    is_constant = False

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    @property
    def value(self) -> float:
        """γ in force, in nats per token; 0 before the first step."""
        return self._sum / self._count if self._count else 0.0

    def observe(self, direct_losses: list[float]) -> None:
        """Add the direct losses of an optimizer step to the mean; see [`Threshold.observe`]."""
        finite = list(filter(math.isfinite, direct_losses))
        # fsum: the order in which ranks or micro-batches report must not change the last bit.
        self._sum = math.fsum([self._sum, *finite])
        self._count += len(finite)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold, as JSON values."""
        return {"sum": self._sum, "count": self._count}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; see [`Threshold.load_state`]."""
        self._sum, self._count = float(state["sum"]), int(state["count"])


class QuantileThreshold(Threshold):
    """γ as the q-quantile of the last direct losses: it fixes the share of reasoning instead of the level of the loss.

    It is not in the paper. Between order statistics it is interpolated linearly, as by `numpy.quantile`. The first step is
    direct.

    Args:
        q (`float`): between 0 and 1.
        window (`int`): number of last direct losses, at least 1.

    Example:
        >>> threshold = QuantileThreshold(0.5, window=3)
        >>> threshold.observe([1.0, 2.0, 6.0])
        >>> threshold.value
        2.0
    """

    is_constant = False

    def __init__(self, q: float, window: int):
        self.q = q
        self._losses: deque[float] = deque(maxlen=window)

    @property
    def value(self) -> float:
        """γ in force, in nats per token; 0 before the first step."""
        if not self._losses:
            return 0.0
        ordered = sorted(self._losses)
        rank = self.q * (len(ordered) - 1)
        below = math.floor(rank)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (rank - below) * (ordered[above] - ordered[below])

    def observe(self, direct_losses: list[float]) -> None:
        """Add the direct losses of an optimizer step to the window; see [`Threshold.observe`]."""
        # Sorted, because which of a step's losses leave the window must not depend on how ranks split the step.
        self._losses.extend(sorted(filter(math.isfinite, direct_losses)))

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold, as JSON values."""
        return {"losses": list(self._losses)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; see [`Threshold.load_state`]."""
        self._losses.clear()
        self._losses.extend(float(loss) for loss in state["losses"])


def parse_gamma(gamma: float | int | str, window: int = 1024) -> Threshold:
    """Turn the option `gamma` into a threshold.

    Args:
        gamma (`float` or `str`): a number >= 0 (0 and `inf` included), `"avg"`, or `"quantile:q"` with 0 <= q <= 1.
        window (`int`, *optional*, defaults to 1024): number of last posts that `"quantile:q"` is computed from.

    Returns:
        [`Threshold`]: constant, running mean or quantile.

    Raises:
        ValueError: if `gamma` is none of these.

    Example:
        >>> parse_gamma("0.4").value, type(parse_gamma("avg")).__name__
        (0.4, 'RunningMeanThreshold')
    """
    wanted = "Give a number >= 0 (the paper's value is 0.4), 'inf', 'avg' or 'quantile:q' with q between 0 and 1."
    if isinstance(gamma, str):
        kind, _, argument = gamma.strip().lower().partition(":")
        try:
            if kind == "avg" and not argument:
                return RunningMeanThreshold()
            if kind == "quantile":
                q = float(argument)
                if 0.0 <= q <= 1.0:
                    return QuantileThreshold(q, window)
                raise ValueError
            gamma = float(gamma)
        except ValueError:
            raise ValueError(f"`gamma` is {gamma!r}, which is not a threshold. {wanted}") from None
    if math.isnan(gamma) or gamma < 0:
        raise ValueError(f"`gamma` is {gamma!r}, which is not a threshold. {wanted}")
    return Threshold(float(gamma))


def dropped_at_random(post_ids: list[str], epoch: int, rate: float, seed: int) -> list[bool]:
    """Draw the posts whose rationale is dropped, for the control experiment of "dynamic" without a choice by loss.

    The draw is a hash of seed, epoch and id, not a random generator's state: a resumed run, another batch size and another
    number of ranks draw the same.

    Args:
        post_ids (`list[str]`): ids of the batch's posts.
        epoch (`int`): number of completed epochs.
        rate (`float`): probability of dropping, between 0 (never) and 1 (always).
        seed (`int`): the run's seed.

    Returns:
        `list[bool]`: True where the rationale is dropped.

    Example:
        >>> dropped_at_random(["a", "b"], epoch=0, rate=1.0, seed=42)
        [True, True]
    """
    dropped = []
    for post_id in post_ids:
        digest = hashlib.sha256(f"{seed}\t{epoch}\t{post_id}".encode()).digest()
        dropped.append(int.from_bytes(digest[:8], "big") / 2**64 < rate)
    return dropped
