"""Statistics of judgements: mean ranks, position bias, and agreement between judges (Dynamic CoT, Table 8).

Given   judgements: for a post, the candidates in the order shown, the systems of each, and their ranks by each criterion.
Gives   each system's mean rank with a bootstrap interval over posts, a test of position bias, Krippendorff's alpha.
Holds   only the order of a judge's numbers counts; systems with equal predictions share a candidate, and so a rank; posts
        have equal weight, however many judges ranked them; resampling is seeded.

The paper does not state which rank follows a tie. Its six systems average 2.4 (people: 1.9); average ranks (1.5, 1.5, 3)
would give 3.5, so it does not use those. Dense ranks (1, 1, 2) are the default, which is our assumption.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dynkp.files.terminal import printable
from dynkp.mmkp_f1.significance import Interval, quantiles, resampled_means
from dynkp.report.tables import markdown_table

CRITERIA = ("correctness", "relevance", "usefulness")
# The mean of a candidate's ranks by the criteria: the single figure that the paper reports per system.
OVERALL = "overall"
MEASURES = (*CRITERIA, OVERALL)
TIES = ("dense", "min", "average")
_ENTRIES = 1 << 21


@dataclass(frozen=True)
class Judgement:
    """One judge's ranking of one post's candidates.

    Attributes:
        post: The post's id.
        order: The systems of each candidate, in the order in which the candidates were shown.
        ranks: Criterion -> rank of each candidate in that order, lower is better, as the judge gave them.
        judge: The judge's name.

    Example:
        >>> Judgement("7", [["a"], ["b", "c"]], dict.fromkeys(CRITERIA, [2, 1])).post
        '7'
    """

    post: str
    order: Sequence[Sequence[str]]
    ranks: Mapping[str, Sequence[float]]
    judge: str = ""

    def candidate_ranks(self, ties: str = "dense") -> NDArray[np.float64]:
        """Compute the ranks of the candidates, with ties resolved, and their mean over the criteria.

        Systems are ranked, not candidates: if the best candidate is that of two systems, `min` ranks the next one third, and
        `average` ranks both at 1.5.

        Args:
            ties: One of `TIES`; see `mean_ranks`.

        Returns:
            The ranks, (measures, candidates), in the order of `MEASURES`.
        """
        sizes = [len(systems) for systems in self.order]
        rows = [_resolved(self.ranks[name], sizes, ties) for name in CRITERIA]
        return np.array([*rows, np.mean(rows, axis=0)])

    def row(self, ties: str = "dense") -> dict[str, Any]:
        """Return the judgement as JSON values: `id`, `judge`, `ranks` (criterion -> system -> rank) and `order`.

        Args:
            ties: One of `TIES`; see `mean_ranks`.
        """
        by_system = {
            name: {system: float(rank) for systems, rank in zip(self.order, ranks, strict=True) for system in systems}
            for name, ranks in zip(CRITERIA, self.candidate_ranks(ties), strict=False)  # the last row is their mean
        }
        return {"id": self.post, "judge": self.judge, "ranks": by_system, "order": [list(systems) for systems in self.order]}


def _resolved(ranks: Sequence[float], sizes: Sequence[int], ties: str) -> list[float]:
    if ties == "dense":
        levels = sorted(set(ranks))
        return [float(levels.index(rank) + 1) for rank in ranks]
    counts = Counter[float]()
    for rank, size in zip(ranks, sizes, strict=True):
        counts[rank] += size
    better = [sum(count for other, count in counts.items() if other < rank) for rank in ranks]
    share = 0.0 if ties == "min" else 0.5
    return [1 + below + share * (counts[rank] - 1) for below, rank in zip(better, ranks, strict=True)]


class PositionRank(NamedTuple):
    """The ranks of the candidates that were shown at one position.

    Attributes:
        position: The position, from 1.
        posts: The number of posts that have a candidate there.
        mean_rank: The mean of these candidates' ranks.
        expected: The same mean if the position had no effect: the mean over all candidates of these posts.
    """

    position: int
    posts: int
    mean_rank: float
    expected: float


class PositionBias(NamedTuple):
    """Ranks by the position shown, and a test of its effect.

    Attributes:
        positions: The ranks at each position.
        p_value: The p-value of the hypothesis that the position has no effect; None without data.
    """

    positions: list[PositionRank]
    p_value: float | None


def mean_ranks(
    judgements: Sequence[Judgement],
    systems: Sequence[str],
    *,
    ties: str = "dense",
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, dict[str, Interval]]:
    """Compute each system's mean rank over posts; 1 is best.

    If several judges ranked a post, the post's ranks are the means of theirs.

    Args:
        judgements: The judgements of any number of judges; each must rank all systems.
        systems: The systems' names.
        ties: The ranks of equal candidates and of the next one: `dense` (1, 1, 2), `min` (1, 1, 3), `average` (1.5, 1.5, 3).
        confidence: The confidence of the intervals, between 0 and 1.
        resamples: The number of resamples of the posts.
        seed: The seed of the resamples.

    Returns:
        System -> measure (`MEASURES`) -> mean rank and its percentile interval.

    Raises:
        ValueError: If there is no judgement, or `ties` is not known.

    Example:
        >>> ranks = mean_ranks([Judgement("7", [["a"], ["b"]], dict.fromkeys(CRITERIA, [2, 1]))], ["a", "b"])
        >>> ranks["a"]["overall"]
        Interval(score=2.0, low=2.0, high=2.0)
    """
    _check(judgements, ties)
    by_post: dict[str, list[NDArray[np.float64]]] = {}
    for judgement in judgements:
        ranks = judgement.candidate_ranks(ties)
        place = {system: number for number, group in enumerate(judgement.order) for system in group}
        by_post.setdefault(judgement.post, []).append(ranks[:, [place[system] for system in systems]])
    table = np.array([np.mean(rows, axis=0).ravel() for rows in by_post.values()])
    means, draws = table.mean(axis=0), resampled_means(table, resamples, seed)
    names = [(measure, system) for measure in MEASURES for system in systems]
    found: dict[str, dict[str, Interval]] = {system: {} for system in systems}
    for column, (measure, system) in enumerate(names):
        found[system][measure] = Interval(float(means[column]), *quantiles(draws[:, column], confidence))
    return found


def position_bias(
    judgements: Sequence[Judgement], *, ties: str = "dense", permutations: int = 2_000, seed: int = 0
) -> dict[str, PositionBias]:
    """Test whether the position at which a candidate is shown has an effect on its rank.

    The order shown was drawn at random, so that without bias every other order of a post's ranks is equally likely. The
    statistic is the sum over positions of n (mean rank - expected rank)²; the p-value is the share of orders, permuted within
    each post, for which it is at least as large. Posts with one candidate carry no information and are left out. An order
    that several judges saw was drawn once, so their ranks are averaged first.

    Args:
        judgements: The judgements, as in `mean_ranks`.
        ties: One of `TIES`, as in `mean_ranks`.
        permutations: The number of permuted orders.
        seed: The seed of the permutations.

    Returns:
        Measure -> bias.

    Raises:
        ValueError: If there is no judgement, or `ties` is not known.
    """
    _check(judgements, ties)
    by_draw: dict[tuple[Any, ...], list[NDArray[np.float64]]] = {}
    for judgement in judgements:
        if len(judgement.order) > 1:
            order = tuple(frozenset(systems) for systems in judgement.order)
            by_draw.setdefault((judgement.post, order), []).append(judgement.candidate_ranks(ties))
    if not by_draw:
        return {measure: PositionBias([], None) for measure in MEASURES}
    shown = [np.mean(ranks, axis=0) for ranks in by_draw.values()]
    # Posts with equally many candidates together, so that their orders are drawn at once.
    groups: dict[int, NDArray[np.float64]] = {}
    for count in sorted({ranks.shape[1] for ranks in shown}):
        groups[count] = np.array([ranks for ranks in shown if ranks.shape[1] == count])  # (posts, measures, positions)
    most = max(groups)
    posts, sums, expected = np.zeros(most), np.zeros((len(MEASURES), most)), np.zeros((len(MEASURES), most))
    for count, ranks in groups.items():
        posts[:count] += len(ranks)
        sums[:, :count] += ranks.sum(axis=0)
        expected[:, :count] += ranks.mean(axis=2).sum(axis=0)[:, None]
    observed = ((sums - expected) ** 2 / posts).sum(axis=1)
    drawn = _permuted_statistics(groups, posts, permutations, seed)
    p_values = (1 + (drawn >= observed - 1e-9).sum(axis=0)) / (1 + permutations)
    return {
        measure: PositionBias(
            [
                PositionRank(
                    place + 1,
                    int(posts[place]),
                    float(sums[row, place] / posts[place]),
                    float(expected[row, place] / posts[place]),
                )
                for place in range(most)
            ],
            float(p_values[row]),
        )
        for row, measure in enumerate(MEASURES)
    }


def _permuted_statistics(
    groups: Mapping[int, NDArray[np.float64]], posts: NDArray[np.float64], permutations: int, seed: int
) -> NDArray[np.float64]:
    """The statistic of `position_bias` with positions permuted within each post, (permutations, measures)."""
    generator = np.random.default_rng(seed)
    sums = np.zeros((permutations, len(MEASURES), len(posts)))
    for count, ranks in groups.items():
        centred = ranks - ranks.mean(axis=2, keepdims=True)
        at_once = max(1, _ENTRIES // ranks.size)
        for start in range(0, permutations, at_once):
            size = min(at_once, permutations - start)
            order = generator.random((size, len(ranks), 1, count)).argsort(axis=3)
            sums[start : start + size, :, :count] += np.take_along_axis(centred[None], order, axis=3).sum(axis=1)
    return (sums**2 / posts).sum(axis=2)


def agreement(judgements: Sequence[Judgement], *, ties: str = "dense") -> dict[str, float | None]:
    """Compute Krippendorff's alpha between judges, for ordinal data: 1 is perfect agreement, 0 is chance.

    A unit is a candidate of a post, its value a judge's rank of it. Posts with one candidate are left out.

    Args:
        judgements: The judgements of several judges.
        ties: One of `TIES`, as in `mean_ranks`.

    Returns:
        Measure -> alpha; None if no two judges ranked the same candidate, or if all ranks are equal.

    Raises:
        ImportError: If the package `krippendorff` is not installed.
        ValueError: If there is no judgement, `ties` is not known, or a judge ranked a post twice.

    Example:
        >>> same = dict.fromkeys(CRITERIA, [1, 2])
        >>> agreement([Judgement("7", [["a"], ["b"]], same, "Ann"), Judgement("7", [["a"], ["b"]], same, "Ben")])["overall"]
        1.0
    """
    _check(judgements, ties)
    try:
        import krippendorff
    except ImportError as error:
        raise ImportError("agreement is computed by krippendorff: pip install 'dynkp[scores]'") from error
    values: dict[tuple[str, frozenset[str]], dict[str, NDArray[np.float64]]] = {}
    for judgement in judgements:
        ranks = judgement.candidate_ranks(ties)
        for place, systems in enumerate(judgement.order):
            of_unit = values.setdefault((judgement.post, frozenset(systems)), {})
            if judgement.judge in of_unit:
                raise ValueError(f"post {judgement.post!r} was judged twice by {judgement.judge!r}: keep one judgement")
            if len(judgement.order) > 1:
                of_unit[judgement.judge] = ranks[:, place]
    judges = list(dict.fromkeys(judgement.judge for judgement in judgements))
    missing = np.full(len(MEASURES), np.nan)
    data = np.array([[unit.get(judge, missing) for unit in values.values()] for judge in judges])
    alphas: dict[str, float | None] = {}
    for row, measure in enumerate(MEASURES):
        table = data[:, :, row]
        table = table[:, (~np.isnan(table)).sum(axis=0) > 1]
        several = table.size > 0 and len(np.unique(table[~np.isnan(table)])) > 1
        alphas[measure] = float(krippendorff.alpha(table, level_of_measurement="ordinal")) if several else None
    return alphas


def _check(judgements: Sequence[Judgement], ties: str) -> None:
    if ties not in TIES:
        raise ValueError(f"ties={ties!r} is not known: use one of {', '.join(TIES)}")
    if not judgements:
        raise ValueError("there is no judgement: no post was ranked")


def rank_report(
    judgements: Sequence[Judgement],
    systems: Sequence[str],
    *,
    ties: str = "dense",
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Return all figures except the agreement, as JSON values.

    Args:
        judgements: The judgements, as in `mean_ranks`.
        systems: The systems' names.
        ties: One of `TIES`, as in `mean_ranks`.
        confidence: The confidence of the intervals, between 0 and 1.
        resamples: The number of resamples of the posts.
        seed: The seed of resamples and permutations.

    Returns:
        `judged` and `judged_alike`, the numbers of posts and of posts on which all systems agree; `ties`; `confidence`;
        `mean_ranks` (system -> measure -> `mean`, `low`, `high`); and `position_bias` (measure -> `positions`, `p_value`).

    Raises:
        ValueError: If there is no judgement, or `ties` is not known.
    """
    posts = {judgement.post for judgement in judgements}
    same = {judgement.post for judgement in judgements if len(judgement.order) == 1}
    ranks = mean_ranks(judgements, systems, ties=ties, confidence=confidence, resamples=resamples, seed=seed)
    bias = position_bias(judgements, ties=ties, seed=seed)
    return {
        "judged": len(posts),
        "judged_alike": len(same),
        "ties": ties,
        "confidence": confidence,
        "mean_ranks": {
            system: {
                measure: {"mean": found.score, "low": found.low, "high": found.high} for measure, found in measures.items()
            }
            for system, measures in ranks.items()
        },
        "position_bias": {
            measure: {"positions": [place._asdict() for place in found.positions], "p_value": found.p_value}
            for measure, found in bias.items()
        },
    }


def rank_tables(report: Mapping[str, Any]) -> str:
    """Lay out a report as Markdown: mean ranks, the best system first; ranks by position; and agreement, if computed.

    Args:
        report: The figures that `rank_report` returned, and optionally `alpha` (measure -> alpha).

    Returns:
        The tables and their captions, separated by empty lines.
    """
    systems = sorted(report["mean_ranks"].items(), key=lambda item: item[1][OVERALL]["mean"])
    rows = [["mean rank", *MEASURES]]
    for system, measures in systems:
        rows.append([printable(system), *(_with_interval(measures[name]) for name in MEASURES)])
    parts = [
        markdown_table(rows),
        f"1 is best, {report['confidence']:.0%} intervals over {report['judged']:,} posts, ties {report['ties']}; on "
        f"{report['judged_alike']:,} of them all systems agree.",
    ]
    bias = report["position_bias"]
    if bias[OVERALL]["positions"]:
        rows = [["rank by position shown", "posts", *MEASURES]]
        for place, first in enumerate(bias[OVERALL]["positions"]):
            cells = [bias[name]["positions"][place] for name in MEASURES]
            shown = [f"{cell['mean_rank']:.2f} ({cell['mean_rank'] - cell['expected']:+.2f})" for cell in cells]
            rows.append([str(first["position"]), f"{first['posts']:,}", *shown])
        rows.append(["p-value", "", *(f"{bias[name]['p_value']:.4f}" for name in MEASURES)])
        parts += [markdown_table(rows), "In brackets: the difference to the mean rank expected if positions had no effect."]
    if "alpha" in report:
        alphas = [report["alpha"][name] for name in MEASURES]
        rows = [["agreement", *MEASURES], ["Krippendorff's α", *("-" if a is None else f"{a:.3f}" for a in alphas)]]
        parts.append(markdown_table(rows))
    return "\n\n".join(parts)


def _with_interval(cell: Mapping[str, float]) -> str:
    return f"{cell['mean']:.2f} ({cell['low']:.2f}-{cell['high']:.2f})"
