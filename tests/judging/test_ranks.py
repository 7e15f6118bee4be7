"""Invariants of ranks:

- only the order of a judge's numbers counts; ties are resolved as named, by hand on small cases; systems with equal predictions
  share a rank; posts have equal weight, however many judges ranked them; intervals are those of the resampled posts;
- the position test is exact (all orders of small cases, counted), finds a judge who prefers a position, and finds nothing for
  one who does not; agreement is Krippendorff's alpha, by hand;
- tables show every system, the best first, with special characters of names escaped.
"""

from __future__ import annotations

import itertools
import random

import pytest

from dynkp.judging.ranks import (
    CRITERIA,
    MEASURES,
    OVERALL,
    Judgement,
    agreement,
    mean_ranks,
    position_bias,
    rank_report,
    rank_tables,
)


def judged(post: str, order: list[list[str]], *ranks: list[float], judge: str = "") -> Judgement:
    """One list of ranks for all criteria, or one for each."""
    return Judgement(post, order, dict(zip(CRITERIA, ranks * (3 // len(ranks)), strict=True)), judge)


@pytest.mark.parametrize(
    ("ties", "alone", "together"),
    [("dense", [2, 1, 2], [2, 1, 3]), ("min", [2, 1, 2], [3, 1, 4]), ("average", [2.5, 1, 2.5], [3, 1.5, 4])],
)
def test_ties(ties: str, alone: list[float], together: list[float]) -> None:
    three = [["a"], ["b"], ["c"]]
    assert judged("1", three, [3, 1, 3]).candidate_ranks(ties).tolist() == [alone] * 4
    assert judged("1", three, [2.5, 2, 2.5]).candidate_ranks(ties).tolist() == [alone] * 4
    assert judged("1", [["a"], ["b", "d"], ["c"]], [2, 1, 3]).candidate_ranks(ties).tolist() == [together] * 4


def test_mean_ranks_by_hand() -> None:
    posts = [judged("1", [["b"], ["a"]], [2, 1], [2, 2], [1, 2]), judged("2", [["a", "b"]], [1])]
    found = mean_ranks(posts, ["a", "b"], resamples=2000)
    means = {system: [measures[name].score for name in MEASURES] for system, measures in found.items()}
    assert means["a"] == pytest.approx([1, 1, 1.5, 7 / 6])
    assert means["b"] == pytest.approx([1.5, 1, 1, 7 / 6])
    # Usefulness of a is 2 and 1: resampled means are 1, 1.5 and 2.
    assert found["a"]["usefulness"] == (1.5, 1, 2)
    assert found["a"]["correctness"] == (1, 1, 1)
    half = mean_ranks(posts, ["a", "b"], confidence=0.4, resamples=2000)["a"]["usefulness"]
    assert half == (1.5, 1.5, 1.5)
    assert mean_ranks(posts, ["b", "a"], resamples=50, seed=3) == mean_ranks(posts, ["a", "b"], resamples=50, seed=3)


def test_a_post_weighs_the_same_however_many_judged_it() -> None:
    order = [["a"], ["b"]]
    three = [judged("1", order, [1, 2], judge=name) for name in "xyz"]
    assert mean_ranks([*three, judged("2", order, [2, 1], judge="x")], ["a", "b"])["a"][OVERALL].score == 1.5


def biased_statistic(posts: list[list[float]]) -> float:
    """Plainly: the sum over positions of n (mean rank - expected rank)²."""
    total = 0.0
    for place in range(max(map(len, posts))):
        there = [ranks for ranks in posts if len(ranks) > place]
        difference = sum(ranks[place] - sum(ranks) / len(ranks) for ranks in there)
        total += difference**2 / len(there)
    return total


@pytest.mark.parametrize("posts", [[[1, 2, 3], [1, 2]], [[1, 2, 2], [1, 1], [1, 2]], [[1, 2]] * 3, [[1, 2, 3]] * 3])
def test_the_position_test_is_exact(posts: list[list[float]]) -> None:
    observed = biased_statistic(posts)
    orders = list(itertools.product(*map(itertools.permutations, posts)))
    exact = sum(biased_statistic([list(ranks) for ranks in order]) >= observed - 1e-9 for order in orders) / len(orders)
    judgements = [judged(str(n), [[str(k)] for k in range(len(ranks))], ranks) for n, ranks in enumerate(posts)]
    for bias in position_bias(judgements, permutations=4000).values():
        assert bias.p_value == pytest.approx(exact, abs=0.03)


def test_ranks_by_position_by_hand() -> None:
    judgements = [judged("1", [["a"], ["b"], ["c"]], [1, 3, 2]), judged("2", [["c"], ["a", "b"]], [1, 2])]
    places = position_bias([*judgements, judged("3", [["a", "b", "c"]], [1])])["relevance"].positions
    assert [tuple(place) for place in places] == [(1, 2, 1, 1.75), (2, 2, 2.5, 1.75), (3, 1, 2, 2)]
    assert position_bias([judged("3", [["a", "b"]], [1])])[OVERALL] == ([], None)


def test_an_order_that_several_judges_saw_was_drawn_once() -> None:
    # Three posts on which a stands first, by chance in 1 of 4 (with b first as often): ten judges who like a prove nothing.
    order = [["a"], ["b"]]
    judgements = [judged(str(n), order, [1, 2], judge=f"{judge}") for n in range(3) for judge in range(10)]
    bias = position_bias(judgements)[OVERALL]
    assert bias.p_value == pytest.approx(0.25, abs=0.03) and bias.positions[0] == (1, 3, 1, 1.5)
    # Shown the other way round, it was drawn again.
    turned = [judged("0", order[::-1], [1, 2], judge="x")]
    assert position_bias([*judgements, *turned])[OVERALL].positions[0].posts == 4


def test_bias_is_found_where_it_is_and_only_there() -> None:
    generator = random.Random(1)

    def p_value(biased: bool, seed: int) -> float:
        posts = []
        for number in range(40):
            systems = list("abc")
            generator.shuffle(systems)
            fair: list[float] = [{"a": 1.0, "b": 2.0, "c": 3.0}[system] for system in systems]
            ranks = [1.0, 2.0, 3.0] if biased and number % 2 else fair
            posts.append(judged(str(number), [[system] for system in systems], ranks))
        p_value = position_bias(posts, permutations=200, seed=seed)[OVERALL].p_value
        assert p_value is not None
        return p_value

    assert all(p_value(True, seed) < 0.01 for seed in range(5))
    fair = [p_value(False, seed) for seed in range(100)]
    assert sum(p < 0.05 for p in fair) <= 12 and 0.35 < sum(fair) / 100 < 0.65


def test_agreement_by_hand() -> None:
    order = [["a"], ["b"]]
    same = judged("1", [["a", "b"]], [1], judge="x")
    first, second = judged("1", order, [1, 2], judge="x"), judged("1", order[::-1], [2, 1], judge="y")
    assert agreement([first, second]) == dict.fromkeys(MEASURES, 1.0)
    # Two units, each ranked 1 and 2: 4 disagreeing pairs where 8/3 are expected.
    opposed = judged("1", order, [1, 2], [1, 2], [2, 1], judge="y")
    found = agreement([first, opposed])
    assert (found["correctness"], found["usefulness"]) == (1.0, pytest.approx(-0.5))
    # A judge alone, and judges who never differ, say nothing about agreement.
    assert agreement([first, judged("2", order, [1, 2], judge="y")]) == dict.fromkeys(MEASURES)
    assert agreement([judged("1", order, [1, 1], judge=name) for name in "xy"]) == dict.fromkeys(MEASURES)
    assert agreement([same, judged("1", [["a", "b"]], [1], judge="y")]) == dict.fromkeys(MEASURES)
    with pytest.raises(ValueError, match="post '1' was judged twice by 'x'"):
        agreement([first, first])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="no post was ranked"):
        mean_ranks([], ["a"])
    for function in (lambda posts, ties: mean_ranks(posts, ["a"], ties=ties), lambda posts, ties: agreement(posts, ties=ties)):
        with pytest.raises(ValueError, match="ties='none' is not known: use one of dense"):
            function([judged("1", [["a"]], [1])], "none")


def test_tables() -> None:
    posts = [judged("1", [["a|b"], ["c"]], [2, 1]), judged("2", [["c", "a|b"]], [1])]
    report = rank_report(posts, ["a|b", "c"], resamples=10)
    assert (report["judged"], report["judged_alike"], report["ties"]) == (2, 1, "dense")
    lines = rank_tables({**report, "alpha": {**dict.fromkeys(MEASURES, 0.5), OVERALL: None}}).splitlines()
    assert lines[0].split("|")[1].strip() == "mean rank"
    assert lines[2].startswith("| c ") and "1.00 (1.00-1.00)" in lines[2]
    assert lines[3].startswith("| a\\|b ") and "1.50 (1.00-2.00)" in lines[3]
    assert "over 2 posts, ties dense; on 1 of them all systems agree" in "\n".join(lines)
    assert "| 2.00 (+0.50) |" in "\n".join(lines) and "| p-value " in "\n".join(lines)
    assert lines[-1].startswith("| Krippendorff's α | ") and lines[-1].endswith(" - |")
    alone = rank_tables(rank_report(posts[1:], ["a|b", "c"], resamples=10))
    assert "position" not in alone and "Krippendorff" not in alone
