"""Sums and means over tokens, against numbers worked out by hand.

Holds: means over tokens are never 0/0; a post without target has an exact zero and no gradient; weights move the mean; posts
count by their tokens, or each once.
"""

from __future__ import annotations

import pytest
import torch

from dynkp.objectives.token_loss import PostLosses, TargetLoss, sum_per_post, target_loss


def test_target_loss_by_hand() -> None:
    log_probs = torch.tensor([[-1.0, -3.0, 0.0], [-0.5, -0.5, -2.0], [0.0, 0.0, 0.0]])
    weights = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 4.0], [0.0, 0.0, 0.0]])
    loss = target_loss(log_probs, weights)
    assert loss.total.tolist() == [4.0, 9.0, 0.0]
    assert loss.tokens.tolist() == [2.0, 6.0, 0.0]
    assert loss.mean.tolist() == [2.0, 1.5, 0.0]


def test_a_post_without_target_has_an_exact_zero_and_no_nan_gradient() -> None:
    log_probs = torch.tensor([[-1.0, -2.0], [0.0, 0.0]], requires_grad=True)
    target_loss(log_probs, torch.tensor([[1.0, 1.0], [0.0, 0.0]])).mean.sum().backward()
    assert log_probs.grad.tolist() == [[-0.5, -0.5], [0.0, 0.0]]


def test_no_target_at_all() -> None:
    loss = target_loss(torch.zeros(3, 0), torch.zeros(3, 0))
    assert loss.mean.tolist() == [0.0, 0.0, 0.0]
    assert target_loss(torch.zeros(0, 0), torch.zeros(0, 0)).mean.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_log_probabilities_decide_the_precision(dtype: torch.dtype) -> None:
    loss = target_loss(torch.tensor([[-1.0]], dtype=dtype), torch.tensor([[1]]))
    assert loss.total.dtype == loss.tokens.dtype == loss.mean.dtype == dtype


def test_answer_weights_move_the_mean() -> None:
    """Two thinking tokens at 1 nat, one answer token at 4: (1 + 1 + 2 * 4) / (1 + 1 + 2) with weight 2."""
    log_probs = torch.tensor([[-1.0, -1.0, -4.0]])
    assert target_loss(log_probs, torch.tensor([[1.0, 1.0, 2.0]])).mean.item() == 2.5
    assert target_loss(log_probs, torch.tensor([[1.0, 1.0, 0.0]])).mean.item() == 1.0


def test_posts_count_by_their_tokens_or_each_once() -> None:
    loss = TargetLoss(torch.tensor([6.0, 8.0, 0.0]), torch.tensor([3.0, 2.0, 0.0]))
    over_tokens, over_posts = loss.normalized(over_tokens=True), loss.normalized(over_tokens=False)
    assert isinstance(over_posts, PostLosses)
    assert (over_tokens.total.tolist(), over_tokens.denominator.tolist()) == ([6.0, 8.0, 0.0], [3.0, 2.0, 0.0])
    assert (over_posts.total.tolist(), over_posts.denominator.tolist()) == ([2.0, 4.0, 0.0], [1.0, 1.0, 1.0])


def test_token_losses_in_a_row_are_summed_per_post() -> None:
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, True]])
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64, requires_grad=True)
    loss = sum_per_post(values, mask)
    assert (loss.total.tolist(), loss.tokens.tolist()) == ([3.0, 0.0, 12.0], [2.0, 0.0, 2.0])
    assert loss.total.dtype == loss.tokens.dtype == torch.float64
    loss.mean.sum().backward()
    assert values.grad.tolist() == [0.5, 0.5, 0.5, 0.5]
    assert sum_per_post(torch.zeros(0), torch.zeros(2, 3).bool()).mean.tolist() == [0.0, 0.0]
