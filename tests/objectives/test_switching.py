"""The equations of Dynamic CoT, against numbers worked out by hand.

Holds: means over tokens are never 0/0; a tie, a NaN and γ = 0 are direct; a threshold that follows the losses depends
on whole optimizer steps only (not on how ranks or micro-batches split them), survives JSON, and is not poisoned by a
loss that is not finite; the random control draws by seed, epoch and id alone.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynkp.objectives.switching import (
    QuantileThreshold,
    RunningMeanThreshold,
    Threshold,
    below_threshold,
    dropped_at_random,
    mixed_loss,
    parse_gamma,
    switched_loss,
)
from dynkp.objectives.token_loss import TargetLoss

LOSSES = st.floats(min_value=0.0, max_value=50.0, allow_nan=False)
STEPS = st.lists(st.lists(LOSSES, min_size=1, max_size=6), min_size=1, max_size=6)


# Means over tokens


# The switch


def test_below_threshold_at_its_borders() -> None:
    losses = torch.tensor([0.0, 0.1, 0.4, 0.9, math.inf, math.nan], dtype=torch.float64)
    assert below_threshold(losses, 0.4).tolist() == [True, True, False, False, False, False]  # a tie is direct
    assert not below_threshold(losses, 0.0).any()
    assert below_threshold(losses, math.inf).tolist() == [True, True, True, True, False, False]
    assert not below_threshold(losses, math.nan).any()


def test_switched_loss_by_hand() -> None:
    direct = TargetLoss(torch.tensor([6.0, 8.0]), torch.tensor([3.0, 2.0]))
    reasoning = TargetLoss(torch.tensor([0.0, 20.0]), torch.tensor([0.0, 10.0]))
    loss = switched_loss(torch.tensor([False, True]), reasoning, direct)
    total, denominator = loss.normalized(over_tokens=False)
    assert (total.tolist(), denominator.tolist()) == ([2.0, 2.0], [1.0, 1.0])
    total, denominator = loss.normalized(over_tokens=True)
    assert (total.tolist(), denominator.tolist()) == ([6.0, 20.0], [3.0, 10.0])


def test_mixed_loss_of_two_objectives() -> None:
    """Weight 3 for the reasoning: (2 + 3 * 1) / 4; a post without rationale keeps its direct mean."""
    direct = TargetLoss(torch.tensor([4.0, 4.0]), torch.tensor([2.0, 2.0]))
    reasoning = TargetLoss(torch.tensor([5.0, 0.0]), torch.tensor([5.0, 0.0]))
    share = torch.tensor([3.0, 0.0])
    total, denominator = mixed_loss(direct, reasoning, share)
    assert (total.tolist(), denominator.tolist()) == ([1.25, 2.0], [1.0, 1.0])
    total, denominator = mixed_loss(direct, reasoning, share, over_tokens=True)
    assert (total.tolist(), denominator.tolist()) == ([19.0, 4.0], [17.0, 2.0])


def test_switched_loss_learns_from_the_selected_target_alone() -> None:
    """Also where the loss of the other target is infinite; without hard posts the direct loss is not in the graph at all."""
    tokens = torch.ones(2)
    for easy in ([True, False], [True, True], [False, False]):
        direct = torch.tensor([math.inf if easy[0] else 1.0, 2.0], requires_grad=True)
        reasoning = torch.tensor([3.0, 4.0], requires_grad=True)
        loss = switched_loss(torch.tensor(easy), TargetLoss(reasoning, tokens), TargetLoss(direct, tokens))
        expected = [r if chosen else d for chosen, r, d in zip(easy, reasoning.tolist(), direct.tolist(), strict=True)]
        assert loss.mean.tolist() == expected
        loss.mean.sum().backward()
        if all(easy):
            assert direct.grad is None
        else:
            assert direct.grad.tolist() == [float(not chosen) for chosen in easy]
        assert reasoning.grad.tolist() == [float(chosen) for chosen in easy]


# Thresholds


def test_constant_threshold() -> None:
    threshold = parse_gamma("0.4")
    threshold.observe([5.0, 6.0])
    assert (type(threshold), threshold.value, threshold.is_constant, threshold.state()) == (Threshold, 0.4, True, {})


def test_running_mean_by_hand() -> None:
    threshold = parse_gamma("avg")
    assert (threshold.value, threshold.is_constant) == (0.0, False)
    threshold.observe([2.0, 4.0])
    assert threshold.value == 3.0
    threshold.observe([])
    assert threshold.value == 3.0
    threshold.observe([9.0])
    assert threshold.value == 5.0


@given(STEPS)
def test_running_mean_is_the_mean(steps: list[list[float]]) -> None:
    threshold = RunningMeanThreshold()
    for losses in steps:
        threshold.observe(losses)
    everything = [loss for losses in steps for loss in losses]
    assert threshold.value == pytest.approx(np.mean(everything), rel=1e-12, abs=1e-12)


@given(STEPS, st.floats(0.0, 1.0), st.integers(1, 12))
def test_quantile_is_numpys(steps: list[list[float]], q: float, window: int) -> None:
    threshold = QuantileThreshold(q, window)
    assert threshold.value == 0.0
    for losses in steps:
        threshold.observe(losses)
    recent = [loss for losses in steps for loss in sorted(losses)][-window:]
    assert threshold.value == pytest.approx(np.quantile(recent, q), rel=1e-12, abs=1e-12)


def test_quantile_forgets_what_left_the_window() -> None:
    threshold = QuantileThreshold(0.5, window=3)
    threshold.observe([100.0, 100.0])
    threshold.observe([1.0, 2.0, 3.0])
    assert threshold.value == 2.0
    threshold.observe([7.0])
    assert threshold.value == 3.0  # of 2, 3, 7


@settings(deadline=None)
@given(STEPS, st.sampled_from(["avg", "quantile:0.3"]), st.randoms(use_true_random=False))
def test_the_order_within_a_step_changes_nothing(steps: list[list[float]], gamma: str, random: object) -> None:
    """Ranks and micro-batches report in any order: not even the last bit may differ."""
    first, second = parse_gamma(gamma, window=5), parse_gamma(gamma, window=5)
    for losses in steps:
        first.observe(losses)
        shuffled = list(losses)
        random.shuffle(shuffled)  # type: ignore[attr-defined]
        second.observe(shuffled)
        assert first.value == second.value and first.state() == second.state()


@settings(deadline=None)
@given(STEPS, STEPS, st.sampled_from(["avg", "quantile:0.7", "0.4"]))
def test_state_survives_json_to_the_last_bit(before: list[list[float]], after: list[list[float]], gamma: str) -> None:
    straight, resumed = parse_gamma(gamma, window=7), parse_gamma(gamma, window=7)
    for losses in before:
        straight.observe(losses)
    resumed.observe([1.0])  # what it saw before must be forgotten
    resumed.load_state(json.loads(json.dumps(straight.state())))
    assert resumed.value == straight.value
    for losses in after:
        straight.observe(losses)
        resumed.observe(losses)
        assert resumed.value == straight.value


@pytest.mark.parametrize("gamma", ["avg", "quantile:0.5", "quantile:1"])
def test_a_loss_that_is_not_finite_does_not_poison_the_threshold(gamma: str) -> None:
    """One overflow must not make every later post direct (NaN) or easy (inf)."""
    threshold = parse_gamma(gamma)
    threshold.observe([1.0, math.nan, math.inf, 1.0])
    assert threshold.value == 1.0
    threshold.observe([-math.inf, math.nan])
    assert threshold.value == 1.0


@pytest.mark.parametrize(
    ("gamma", "value"),
    [("0", 0.0), (0, 0.0), ("-0.0", 0.0), (0.4, 0.4), (" 4e-1 ", 0.4), ("inf", math.inf), ("Infinity", math.inf)],
)
def test_parse_gamma_numbers(gamma: float | str, value: float) -> None:
    assert parse_gamma(gamma).value == value


@pytest.mark.parametrize("gamma", ["AVG", " avg "])
def test_parse_gamma_avg(gamma: str) -> None:
    assert isinstance(parse_gamma(gamma), RunningMeanThreshold)


@pytest.mark.parametrize("q", ["0", "1", "0.25", " .5"])
def test_parse_gamma_quantile(q: str) -> None:
    threshold = parse_gamma(f"quantile:{q}")
    assert isinstance(threshold, QuantileThreshold) and threshold.q == float(q)


@pytest.mark.parametrize(
    "gamma",
    [-0.1, "-0.1", math.nan, "nan", "", "None", "mean", "avg:0.5", "quantile", "quantile:", "quantile:1.1"]
    + ["quantile:-0.1", "quantile:nan", "quantile:x", "0.4 nats", "0,4"],
)
def test_parse_gamma_errors_name_value_and_remedy(gamma: float | str) -> None:
    with pytest.raises(ValueError, match="`gamma` is") as error:
        parse_gamma(gamma)
    assert f"{gamma}" in str(error.value)
    assert "'avg' or 'quantile:q'" in str(error.value)


# The random control


def test_dropped_at_random_at_its_borders() -> None:
    ids = [str(index) for index in range(500)]
    assert not any(dropped_at_random(ids, 0, 0.0, seed=1))
    assert all(dropped_at_random(ids, 0, 1.0, seed=1))
    assert dropped_at_random([], 0, 0.5, seed=1) == []


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_dropped_at_random_keeps_its_rate(rate: float) -> None:
    """Within four standard errors, over posts and over epochs."""
    posts = dropped_at_random([f"post-{index}" for index in range(4000)], 3, rate, seed=42)
    epochs = [dropped_at_random(["post-1"], epoch, rate, seed=42)[0] for epoch in range(4000)]
    for dropped in (posts, epochs):
        assert abs(np.mean(dropped) - rate) < 4 * math.sqrt(rate * (1 - rate) / 4000)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=8), st.integers(0, 9), st.integers(0, 99))
def test_a_post_is_drawn_alone(ids: list[str], epoch: int, seed: int) -> None:
    """Batch size, order and neighbours do not matter."""
    together = dropped_at_random(ids, epoch, 0.5, seed)
    assert together == [dropped_at_random([post_id], epoch, 0.5, seed)[0] for post_id in ids]


def test_epoch_and_seed_draw_anew() -> None:
    ids = [f"post-{index}" for index in range(200)]
    draws = [dropped_at_random(ids, epoch, 0.5, seed) for epoch in range(2) for seed in range(2)]
    for index, draw in enumerate(draws):
        for other in draws[:index]:
            assert 50 < sum(a != b for a, b in zip(draw, other, strict=True)) < 150


def test_a_higher_rate_drops_no_other_posts_than_a_lower_one_and_more() -> None:
    """One draw per post and epoch: runs with different rates are nested, so they can be compared."""
    ids = [f"post-{index}" for index in range(300)]
    low, high = (dropped_at_random(ids, 1, rate, seed=7) for rate in (0.3, 0.6))
    assert all(b for a, b in zip(low, high, strict=True) if a) and sum(high) > sum(low)
