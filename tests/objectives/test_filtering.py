"""AimKP's filter and objective give the numbers computed by hand.

Holds: a tie, a zero gradient and a gradient that is not finite drop the variant; dropped variants have no influence on
value or gradient, even if they are NaN; posts count by their target tokens over the whole optimizer step, so that
splitting it into micro-batches changes nothing.
"""

from __future__ import annotations

import math

import pytest
import torch

from dynkp.objectives.filtering import combine, filtered_loss, gradient_cosine, keep_variants, variant_weights
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
    assert keep_variants(cosines, [-2.0, -2.0]).tolist() == [[True, True], [True, True], [False, False], [True, True]]
    # bfloat16 or double, the paper's thresholds are compared in the cosines' own type.
    assert keep_variants(torch.tensor([[0.1]], dtype=torch.float64), [0.1]).tolist() == [[False]]


KEPT = torch.tensor([[True, True], [True, False], [False, False]])


def test_weights_by_hand() -> None:
    third = 1 / 3
    expected = torch.tensor([[third, third, third], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(variant_weights(KEPT), expected)
    assert variant_weights(KEPT, "sum").tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    with pytest.raises(ValueError, match="`variant_reduction` is 'max'"):
        variant_weights(KEPT, "max")


@pytest.mark.parametrize(
    ("reduction", "losses", "gradients"),
    [
        ("mean", [(1 + 3 + 8) / 3, (2 + 4) / 2, 5.0], [[(1 + 0 + 2) / 3, (0 + 1 + 2) / 3], [0.5, 1.0], [1.0, 1.0]]),
        ("sum", [12.0, 6.0, 5.0], [[3.0, 3.0], [1.0, 2.0], [1.0, 1.0]]),
    ],
)
def test_combined_losses_and_gradients_by_hand(reduction: str, losses: list[float], gradients: list[list[float]]) -> None:
    full = torch.tensor([1.0, 2.0, 5.0])
    variants = torch.tensor([[3.0, 8.0], [4.0, NAN], [INF, NAN]])  # dropped ones may be anything
    torch.testing.assert_close(combine(full, variants, KEPT, reduction), torch.tensor(losses))
    g0 = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    g = torch.tensor([[[0.0, 1.0], [2.0, 2.0]], [[0.0, 1.0], [9.0, 9.0]], [[9.0, 9.0], [NAN, NAN]]])
    torch.testing.assert_close(combine(g0, g, KEPT, reduction), torch.tensor(gradients))
    weights = variant_weights(KEPT, reduction)[:, :, None]
    finite = torch.cat([g0[:, None], g], dim=1).nan_to_num()
    torch.testing.assert_close((weights * finite).sum(dim=1), torch.tensor(gradients))


def test_dropped_variants_have_no_gradient() -> None:
    full = torch.ones(3, requires_grad=True)
    variants = torch.tensor([[3.0, 8.0], [4.0, NAN], [INF, NAN]], requires_grad=True)
    combine(full, variants, KEPT).sum().backward()
    torch.testing.assert_close(full.grad, torch.tensor([1 / 3, 0.5, 1.0]))
    torch.testing.assert_close(variants.grad, torch.tensor([[1 / 3, 1 / 3], [0.5, 0.0], [0.0, 0.0]]))


def test_posts_count_by_their_target_tokens_over_the_step() -> None:
    """Posts of 2 and 6 tokens: (2·1 + 6·mean(2, 4)) / 8 = 2.5, in one micro-batch or two."""
    tokens = torch.tensor([2.0, 6.0])
    full = TargetLoss(torch.tensor([2.0, 12.0]), tokens)  # 1 and 2 nats a token
    text = TargetLoss(torch.tensor([99.0, 24.0]), tokens)  # 4 nats a token
    kept = torch.tensor([[False], [True]])
    total, weight = filtered_loss(full, [text], kept)
    assert total.tolist() == [2.0, 18.0] and weight.tolist() == [2.0, 6.0]
    assert (total.sum() / weight.sum()).item() == 2.5
    parts = [
        filtered_loss(TargetLoss(*(x[i : i + 1] for x in full)), [TargetLoss(*(x[i : i + 1] for x in text))], kept[i : i + 1])
        for i in range(2)
    ]
    assert sum(part[0].item() for part in parts) / sum(part[1].item() for part in parts) == 2.5
    assert filtered_loss(full, [text], kept, "sum")[0].tolist() == [2.0, 36.0]
