"""AimKP's filter and objective give the numbers computed by hand.

Holds: a tie, a zero gradient and a gradient that is not finite drop the variant; dropped variants have no influence on
value or gradient, even if they are NaN; posts count by their target tokens over the whole optimizer step, so that
splitting it into micro-batches changes nothing.
"""

from __future__ import annotations

import math

import pytest
import torch

from dynkp.objectives.filtering import filtered_loss, gradient_cosine, keep_variants
from dynkp.objectives.token_loss import TargetLoss

NAN, INF = math.nan, math.inf


def test_cosine_by_hand() -> None:
    dot = torch.tensor([24.0, -25.0, 0.0, 0.0, NAN, 1e30])
    full = torch.tensor([25.0, 25.0, 25.0, 0.0, 25.0, 1e30])
    variant = torch.tensor([25.0, 25.0, 0.0, 25.0, 25.0, 1e30])
    cosines = gradient_cosine(dot, full, variant)
    torch.testing.assert_close(cosines[:4], torch.tensor([0.96, -1.0, 0.0, 0.0]))
    assert cosines[4].isnan() and cosines[5] == pytest.approx(1.0), "1e30 squared would overflow"


def test_kept_strictly_above_the_threshold() -> None:
    # 0.5 and 0.25 are exact in binary: a tie is a tie.
    cosines = torch.tensor([[0.5, 0.25], [0.51, 0.26], [NAN, INF], [-1.0, -0.9]])
    assert keep_variants(cosines, [0.5, 0.25]).tolist() == [[False, False], [True, True], [False, False], [False, False]]
    assert keep_variants(cosines, None).tolist() == [[True, True], [True, True], [False, False], [True, True]]
    # bfloat16 or double, the paper's thresholds are compared in the cosines' own type.
    assert keep_variants(torch.tensor([[0.1]], dtype=torch.float64), [0.1]).tolist() == [[False]]


KEPT = torch.tensor([[True, True], [True, False], [False, False]])


# Losses of the full input and of two variants; those of dropped variants may be anything.
FULL = torch.tensor([1.0, 2.0, 5.0])
VARIANTS = torch.tensor([[3.0, 8.0], [4.0, NAN], [INF, NAN]])


@pytest.mark.parametrize(
    ("reduction", "losses", "weights"),
    [
        ("mean", [(1 + 3 + 8) / 3, (2 + 4) / 2, 5.0], [[1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]),
        ("sum", [12.0, 6.0, 5.0], [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
    ],
)
def test_filtered_losses_and_their_weights_by_hand(reduction: str, losses: list[float], weights: list[list[float]]) -> None:
    """The gradients with respect to the losses are the weights of g_0 and g_m in the update; exactly zero if dropped."""
    full, variants = FULL.clone().requires_grad_(), VARIANTS.clone().requires_grad_()
    combined = filtered_loss(full, variants, KEPT, reduction)
    torch.testing.assert_close(combined, torch.tensor(losses))
    combined.sum().backward()
    found = torch.cat([full.grad[:, None], variants.grad], dim=1)
    torch.testing.assert_close(found, torch.tensor(weights))
    assert not found[:, 1:][~KEPT].any()


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("mean", [[(1 + 0 + 2) / 3, (0 + 1 + 2) / 3], [0.5, 1.0], [1.0, 1.0]]),
        ("sum", [[3.0, 3.0], [1.0, 2.0], [1.0, 1.0]]),
    ],
)
def test_the_update_by_hand(reduction: str, expected: list[list[float]]) -> None:
    """Losses linear in two parameters, with gradients g_0, g_1 and g_2 of each of three posts."""
    gradients = torch.tensor(
        [[[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]], [[1.0, 1.0], [0.0, 1.0], [9.0, 9.0]], [[1.0, 1.0], [9.0, 9.0], [7.0, 7.0]]]
    )
    parameters = torch.zeros(3, 2, requires_grad=True)  # a copy per post
    losses = (gradients * parameters[:, None]).sum(dim=2)
    filtered_loss(losses[:, 0], losses[:, 1:], KEPT, reduction).sum().backward()
    torch.testing.assert_close(parameters.grad, torch.tensor(expected))


def test_an_unknown_reduction_is_an_error() -> None:
    with pytest.raises(ValueError, match="`variant_reduction` is 'max'"):
        filtered_loss(FULL, VARIANTS, KEPT, "max")


def test_posts_count_by_their_target_tokens_over_the_step() -> None:
    """Posts of 2 and 6 tokens: (2·1 + 6·mean(2, 4)) / 8 = 2.5, in one micro-batch or two."""
    tokens = torch.tensor([2.0, 6.0])
    full = TargetLoss(torch.tensor([2.0, 12.0]), tokens).normalized(over_tokens=True)  # 1 and 2 nats a token
    text = TargetLoss(torch.tensor([99.0, 24.0]), tokens).normalized(over_tokens=True)  # 4 nats a token
    kept = torch.tensor([[False], [True]])
    total = filtered_loss(full.total, text.total[:, None], kept)
    assert total.tolist() == [2.0, 18.0] and full.denominator.tolist() == [2.0, 6.0]
    assert (total.sum() / full.denominator.sum()).item() == 2.5
    parts = [filtered_loss(full.total[[i]], text.total[[i], None], kept[[i]]) for i in range(2)]
    assert sum(part.item() for part in parts) / full.denominator.sum().item() == 2.5
    assert filtered_loss(full.total, text.total[:, None], kept, "sum").tolist() == [2.0, 36.0]
