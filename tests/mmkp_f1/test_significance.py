"""Invariants of intervals and tests:

- an interval's score is the score; its bounds are those of resampling posts one at a time and scoring each resample anew,
  including the F1 of convention `cmkp`, which is not a mean;
- intervals of means agree with theory, and 95 % intervals cover the true value about 95 % of the time;
- equal systems do not differ; p-values are uniform for interchangeable systems, and exact where all exchanges can be listed;
- the same seed gives the same figures, in whatever parts they are computed; 10,000 resamples of CMKP's test set take seconds.
"""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from dynkp.mmkp_f1 import significance
from dynkp.mmkp_f1.scoring import CONVENTIONS, KeyphraseScorer, PostScores, score_keyphrases
from dynkp.mmkp_f1.significance import bootstrap_interval, bootstrap_intervals, paired_bootstrap, paired_permutation


def drawn_posts(posts: int, seed: int, accuracy: float = 0.5) -> tuple[list[list[str]], list[list[str]]]:
    random = np.random.default_rng(seed)
    gold = [[f"g{j}" for j in range(random.integers(1, 4))] for _ in range(posts)]
    ranked = [[f"g{j}" if random.random() < accuracy else f"x{j}" for j in range(random.integers(0, 4))] for _ in range(posts)]
    return ranked, gold


def post_scores(predictions, references, convention: str = "cmkp", **more) -> PostScores:
    scorer = KeyphraseScorer(convention=convention, ks=[1, 3], keep_posts=True, **more)
    scorer.add_batch(predictions, references)
    return scorer.post_scores()["all"]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_bounds_are_those_of_scoring_every_resample_anew(convention):
    ranked, gold = drawn_posts(23, seed=1)
    scores = post_scores(ranked, gold, convention)
    resamples = 60
    drawn = np.random.default_rng(7).integers(0, 23, (resamples, 23))
    more = {"ks": [1, 3], "convention": convention}
    rows = [score_keyphrases([ranked[i] for i in row], [gold[i] for i in row], **more)["all"] for row in drawn]
    for measure, (score, low, high) in bootstrap_intervals(scores, confidence=0.8, resamples=resamples, seed=7).items():
        whole = score_keyphrases(ranked, gold, **more)["all"]
        assert score == pytest.approx(whole[measure])
        expected = np.quantile([row[measure] for row in rows], [0.1, 0.9])
        assert (low, high) == pytest.approx(tuple(expected), abs=1e-12), measure


def test_a_mean_has_the_interval_of_theory():
    hits = 300
    scores = post_scores([["a"]] * hits + [["b"]] * (1000 - hits), [["a"]] * 1000)
    score, low, high = bootstrap_interval(scores, "p@1", seed=3)
    half = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert score == pytest.approx(0.3)
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.003)


def test_intervals_cover_the_truth():
    covered = 0
    for seed in range(200):
        right = np.random.default_rng(seed).random(80) < 0.4
        scores = post_scores([["a"] if hit else ["b"] for hit in right], [["a"]] * 80)
        _, low, high = bootstrap_interval(scores, "f1@1", resamples=400, seed=seed)
        covered += low <= 0.4 <= high
    assert 180 <= covered <= 199


@pytest.mark.parametrize("measure", ["f1@1", "p@3", "micro_f1@3", "ndcg@3"])
def test_equal_systems_do_not_differ(measure):
    scores = post_scores(*drawn_posts(50, seed=2))
    assert paired_bootstrap(scores, scores, measure, resamples=200) == (0, 0, 0, 1)
    assert paired_permutation(scores, scores, measure, permutations=200) == (0, 1)


def test_permutation_p_is_the_share_of_all_exchanges():
    (first, gold), (second, _) = drawn_posts(9, seed=4, accuracy=0.3), drawn_posts(9, seed=4, accuracy=0.9)
    score = lambda ranked: score_keyphrases(ranked, gold, ks=[3])["all"]["f1@3"]  # noqa: E731
    observed = score(second) - score(first)
    extreme = 0
    for swapped in itertools.product((False, True), repeat=9):
        one = [b if swap else a for a, b, swap in zip(first, second, swapped, strict=True)]
        other = [a if swap else b for a, b, swap in zip(first, second, swapped, strict=True)]
        extreme += abs(score(other) - score(one)) >= abs(observed) - 1e-12
    difference, p_value = paired_permutation(post_scores(first, gold), post_scores(second, gold), "f1@3", permutations=20_000)
    assert difference == pytest.approx(observed)
    assert p_value == pytest.approx(extreme / 2**9, abs=0.015)


def test_p_values_of_interchangeable_systems_are_uniform():
    p_values = []
    for seed in range(120):
        first, gold = drawn_posts(60, seed=1000 + seed)
        random = np.random.default_rng(5000 + seed)
        second = [[p if random.random() < 0.5 else "x" for p in row] for row in first]
        third = [[p if random.random() < 0.5 else "x" for p in row] for row in first]
        scores = post_scores(second, gold, "padded"), post_scores(third, gold, "padded")
        p_values.append(paired_permutation(*scores, "ndcg@3", permutations=300, seed=seed).p_value)
    assert 0.42 < np.mean(p_values) < 0.6
    assert np.mean(np.array(p_values) <= 0.05) < 0.12


def test_a_real_difference_is_found_and_signed():
    (first, gold), (second, _) = drawn_posts(400, seed=6, accuracy=0.4), drawn_posts(400, seed=6, accuracy=0.7)
    scores = post_scores(first, gold), post_scores(second, gold)
    difference, low, high, p_value = paired_bootstrap(*scores, "f1@3", resamples=2000)
    assert 0 < low < difference < high and p_value < 0.01
    assert paired_permutation(*scores, "f1@3", permutations=2000).p_value < 0.01
    reverse = paired_bootstrap(*scores[::-1], "f1@3", resamples=2000)
    assert reverse == pytest.approx((-difference, -high, -low, p_value))


def test_the_seed_decides_and_the_cut_of_the_work_does_not(monkeypatch):
    scores, other = post_scores(*drawn_posts(40, seed=8)), post_scores(drawn_posts(40, seed=9)[0], drawn_posts(40, seed=8)[1])

    def figures(seed: int) -> list[float]:
        return [
            *bootstrap_interval(scores, resamples=300, seed=seed),
            *paired_bootstrap(scores, other, resamples=300, seed=seed),
            *paired_permutation(scores, other, permutations=300, seed=seed),
        ]

    whole = figures(1)
    assert figures(1) == whole
    assert figures(2) != whole
    monkeypatch.setattr(significance, "_ENTRIES", 999)
    assert figures(1) == pytest.approx(whole, abs=1e-12)


def test_ten_thousand_resamples_of_5372_posts_take_seconds():
    ranked, gold = drawn_posts(5372, seed=10)
    scores = post_scores(ranked, gold)
    began = time.process_time()
    bootstrap_intervals(scores)
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, b, empty: bootstrap_interval(empty), "scores has no post"),
        (lambda a, b, empty: bootstrap_interval(a, "f1@2"), "measure='f1@2' is not among .*: p@1, r@1"),
        (lambda a, b, empty: bootstrap_interval(a, "hits@1"), "measure='hits@1' is not among"),
        (lambda a, b, empty: bootstrap_interval(a, confidence=95), "confidence=95 must be between 0 and 1"),
        (lambda a, b, empty: bootstrap_interval(a, resamples=0), "number of resamples, 0, must be"),
        (lambda a, b, empty: paired_bootstrap(a, b), "first has 3 posts and second 4"),
        (lambda a, b, empty: paired_permutation(a, b), "first has 3 posts and second 4"),
        (lambda a, b, empty: paired_permutation(empty, empty), "scores has no post"),
        (
            lambda a, b, empty: paired_permutation(a, post_scores(*drawn_posts(3, seed=1), "aimkp")),
            "convention 'cmkp' and second by 'aimkp'",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(post_scores(*drawn_posts(3, seed=1)), post_scores(*drawn_posts(4, seed=1)), post_scores([], []))
