"""Bootstrap confidence intervals, and two paired tests between systems.

Given   the scores of every post of one system, or of two systems on the same posts (`KeyphraseScorer.post_scores`).
Gives   an interval of a measure, or the difference of two systems with an interval or a p-value.
Holds   posts are resampled, and a measure is computed from each resample's means: the F1 of convention `cmkp` from its P and
        R, not as a mean over posts. Results depend on the seed only; memory does not grow with the number of resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .scoring import PostScores

_Array = np.ndarray[Any, Any]

# Entries of the posts-by-resamples table computed at a time: small enough for the processor's cache.
_ENTRIES = 1 << 19


class Interval(NamedTuple):
    """A score with its confidence interval.

    Attributes:
        score: The score.
        low: The lower bound.
        high: The upper bound.
    """

    score: float
    low: float
    high: float


class Difference(NamedTuple):
    """The difference of two systems' scores, with its confidence interval and p-value.

    Attributes:
        difference: The second system's score less the first's.
        low: The lower bound.
        high: The upper bound.
        p_value: The two-sided p-value.
    """

    difference: float
    low: float
    high: float
    p_value: float


class PermutationTest(NamedTuple):
    """The difference of two systems' scores, with its p-value.

    Attributes:
        difference: The second system's score less the first's.
        p_value: The two-sided p-value.
    """

    difference: float
    p_value: float


def bootstrap_interval(
    scores: PostScores, measure: str = "f1@1", *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Compute the percentile interval of a measure by resampling posts with replacement.

    Args:
        scores: The scores of every post.
        measure: The measure, such as `f1@1`.
        confidence: The confidence, between 0 and 1, such as 0.95.
        resamples: The number of resamples, each of as many posts as there are.
        seed: The seed of the resamples.

    Returns:
        The score and its interval.

    Raises:
        ValueError: If there is no post, a number is out of range, or the measure is not known.

    Example:
        >>> from dynkp.mmkp_f1.scoring import KeyphraseScorer
        >>> scorer = KeyphraseScorer(ks=[1], keep_posts=True)
        >>> scorer.add_batch([["a"]] * 50 + [["b"]] * 50, [["a"]] * 100)
        >>> score, low, high = bootstrap_interval(scorer.post_scores()["all"], "f1@1")
        >>> score, 0.3 < low < 0.45, 0.55 < high < 0.7
        (0.5, True, True)
    """
    return bootstrap_intervals(scores, [measure], confidence=confidence, resamples=resamples, seed=seed)[measure]


def bootstrap_intervals(
    scores: PostScores,
    measures: Sequence[str] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Compute the percentile intervals of several measures from the same resamples.

    Args:
        scores: The scores of every post.
        measures: The measures; `None` for all.
        confidence: The confidence, between 0 and 1, such as 0.95.
        resamples: The number of resamples, each of as many posts as there are.
        seed: The seed of the resamples.

    Returns:
        Measure -> score and interval.

    Raises:
        ValueError: If there is no post, a number is out of range, or a measure is not known.
    """
    _check(scores, confidence, resamples)
    names = scores.measures() if measures is None else list(measures)
    columns = sorted({column for name in names for column in scores.recipe(name)[0]})
    means = dict(zip(columns, resampled_means(_table(scores, columns), resamples, seed).T, strict=True))
    intervals = {}
    for name in names:
        inputs, combine = scores.recipe(name)
        low, high = quantiles(combine(*(means[column] for column in inputs)), confidence)
        score = scores.score(name)
        assert score is not None
        intervals[name] = Interval(score, low, high)
    return intervals


def paired_bootstrap(
    first: PostScores,
    second: PostScores,
    measure: str = "f1@1",
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Compare two systems on the same resampled posts.

    The p-value is twice the share of resamples on the other side of zero, with the sample itself counted as one.

    Args:
        first: The scores of every post of the first system.
        second: Those of the second system, for the same posts.
        measure: The measure, such as `f1@1`.
        confidence: The confidence, between 0 and 1, such as 0.95.
        resamples: The number of resamples, each of as many posts as there are.
        seed: The seed of the resamples.

    Returns:
        The difference, its interval and its p-value.

    Raises:
        ValueError: If there is no post, a number is out of range, the measure is not known, or posts or conventions differ.
    """
    inputs, combine = _paired(first, second, measure)
    _check(first, confidence, resamples)
    table = np.hstack([_table(first, inputs), _table(second, inputs)])
    means = resampled_means(table, resamples, seed).T
    differences = combine(*means[len(inputs) :]) - combine(*means[: len(inputs)])
    low, high = quantiles(differences, confidence)
    # The scores of equal systems may differ in the last digits by rounding.
    tail = min((differences <= 1e-12).sum(), (differences >= -1e-12).sum())
    return Difference(_difference(first, second, measure), low, high, min(1.0, 2 * (1 + int(tail)) / (1 + resamples)))


def paired_permutation(
    first: PostScores, second: PostScores, measure: str = "f1@1", *, permutations: int = 10_000, seed: int = 0
) -> PermutationTest:
    """Test the hypothesis that two systems are interchangeable, by exchanging their scores of randomly chosen posts.

    The p-value is the share of such exchanges whose difference is at least as large as the observed one, with the observed
    assignment counted as one; the test is exact.

    Args:
        first: The scores of every post of the first system.
        second: Those of the second system, for the same posts.
        measure: The measure, such as `f1@1`.
        permutations: The number of random exchanges.
        seed: The seed of the exchanges.

    Returns:
        The difference and its p-value.

    Raises:
        ValueError: If there is no post, posts or conventions differ, or the measure is not known.
    """
    inputs, combine = _paired(first, second, measure)
    _check(first, 0.5, permutations)
    one, other = _table(first, inputs), _table(second, inputs)
    exchanged = (other - one)[(one != other).any(axis=1)]  # exchanging equal scores has no effect
    posts = len(one)
    observed = _difference(first, second, measure)
    extreme = 0
    generator = np.random.default_rng(seed)
    width = 8 * -(-len(exchanged) // 64)  # bytes per row: whole draws of the generator, so that parts do not change the result
    for rows in _parts(permutations, len(exchanged)):
        drawn = np.frombuffer(generator.bytes(rows * width), np.uint8).reshape(rows, width)
        bits = np.unpackbits(drawn, axis=1)
        moved = bits[:, : len(exchanged)].astype(float) @ exchanged
        one_means, other_means = ((one.sum(axis=0) + moved) / posts).T, ((other.sum(axis=0) - moved) / posts).T
        extreme += int((np.abs(combine(*other_means) - combine(*one_means)) >= abs(observed) - 1e-12).sum())
    return PermutationTest(observed, (1 + extreme) / (1 + permutations))


def resampled_means(table: _Array, resamples: int, seed: int) -> _Array:
    """Compute the columns' means over posts drawn with replacement.

    Args:
        table: A row of values per post, (posts, columns).
        resamples: The number of resamples, each of as many posts as there are.
        seed: The seed of the resamples.

    Returns:
        The means, (resamples, columns).
    """
    posts = len(table)
    generator = np.random.default_rng(seed)
    means = []
    for rows in _parts(resamples, posts):
        drawn = generator.integers(0, posts, (rows, posts)) + posts * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * posts).reshape(rows, posts)
        means.append(times.astype(float) @ table / posts)
    return np.concatenate(means)


def _parts(rows: int, columns: int) -> Iterator[int]:
    largest = max(1, _ENTRIES // max(1, columns))
    for start in range(0, rows, largest):
        yield min(largest, rows - start)


def _table(scores: PostScores, columns: Sequence[str]) -> _Array:
    return np.stack([scores.columns[column] for column in columns], axis=1)


def quantiles(values: _Array, confidence: float) -> tuple[float, float]:
    """Compute the bounds of the percentile interval of resampled values.

    Args:
        values: The values, (resamples,).
        confidence: The confidence, between 0 and 1.

    Returns:
        The lower and the upper bound.

    Example:
        >>> quantiles(np.arange(101), 0.5)
        (25.0, 75.0)
    """
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _difference(first: PostScores, second: PostScores, measure: str) -> float:
    one, other = first.score(measure), second.score(measure)
    assert one is not None and other is not None
    return other - one


def _paired(first: PostScores, second: PostScores, measure: str) -> tuple[tuple[str, ...], Callable[..., Any]]:
    if first.convention != second.convention:
        raise ValueError(
            f"first is scored by convention {first.convention!r} and second by {second.convention!r}: use one convention"
        )
    if not np.array_equal(first.positions, second.positions):
        raise ValueError(
            f"first has {len(first.positions)} posts and second {len(second.positions)}, or they are different posts: "
            "paired tests need both systems' scores of the same posts in the same order, in the same subset"
        )
    second.recipe(measure)
    return first.recipe(measure)


def _check(scores: PostScores, confidence: float, resamples: int) -> None:
    if not len(scores.positions):
        raise ValueError("scores has no post, so that neither interval nor test can be computed")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r} must be between 0 and 1, such as 0.95")
    if isinstance(resamples, bool) or not isinstance(resamples, int) or resamples < 1:
        raise ValueError(f"the number of resamples, {resamples!r}, must be an integer of at least 1")
