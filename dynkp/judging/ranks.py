"""Systems ranked by judges: mean ranks, whether the order shown mattered, whether judges agree (Dynamic CoT, Table 8).

Given   judgements: of a post, the candidates in the order shown, the systems behind each, and a rank per criterion.
Gives   each system's mean rank with a bootstrap interval over posts, a test of position bias, Krippendorff's alpha.
Holds   of a judge's numbers only their order counts; systems with the same answer share a candidate, and so a rank; a post
        weighs the same however many judged it; resampling is seeded.

The paper does not say what rank follows a tie. Its six systems average 2.4 (people: 1.9), where average ranks (1.5, 1.5, 3)
would give 3.5, so it is not those. Dense ranks (1, 1, 2) are the default: our guess.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dynkp.mmkp_f1.significance import Interval, quantiles, resampled_means
from dynkp.report.tables import markdown_table

CRITERIA = ("correctness", "relevance", "usefulness")
# The mean of a candidate's ranks by the criteria: the paper's one figure per system.
OVERALL = "overall"
MEASURES = (*CRITERIA, OVERALL)
TIES = ("dense", "min", "average")
_ENTRIES = 1 << 21


@dataclass(frozen=True)
class Judgement:
    """What one judge said about one post.

    Attributes:
        post: the post's id.
        order: the systems behind each candidate, in the order the candidates were shown.
        ranks: criterion -> rank of each candidate in that order, lower is better, as the judge gave them.
        judge: who.

    Example:
        >>> Judgement("7", [["a"], ["b", "c"]], dict.fromkeys(CRITERIA, [2, 1])).post
        '7'
    """

    post: str
    order: Sequence[Sequence[str]]
    ranks: Mapping[str, Sequence[float]]
    judge: str = ""

    def candidate_ranks(self, ties: str = "dense") -> NDArray[np.float64]:
        """(measures, candidates): the ranks, ties resolved, and their mean over the criteria.

        Systems stand behind candidates, and are what is ranked: of two systems with one answer that is best, `min` has the
        next one third, `average` has both at 1.5.
        """
        sizes = [len(systems) for systems in self.order]
        rows = [_resolved(self.ranks[name], sizes, ties) for name in CRITERIA]
        return np.array([*rows, np.mean(rows, axis=0)])

    def row(self, ties: str = "dense") -> dict[str, Any]:
        """The judgement as a JSON row: `ranks` as criterion -> system -> rank."""
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
    """Candidates that were shown at one position: how many, their mean rank, and what it would be were all shown alike."""

    position: int
    posts: int
    mean_rank: float
    expected: float


class PositionBias(NamedTuple):
    """Ranks by the position shown, and the p-value of the hypothesis that the position does not matter (None: no data)."""

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
    """Each system's mean rank over posts, 1 being best.

    Where several judged a post, its rank is their mean.

    Args:
        judgements: of any number of judges; each must rank all systems.
        systems: their names.
        ties: the rank of equals and of what follows: `dense` (1, 1, 2), `min` (1, 1, 3), `average` (1.5, 1.5, 3).
        confidence: of the intervals, between 0 and 1.
        resamples: how often posts are drawn with replacement.
        seed: of the draws.

    Returns:
        System -> measure (`MEASURES`) -> mean rank and its percentile interval.

    Raises:
        ValueError: if there is no judgement, or `ties` is not known.

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
    """Whether candidates are ranked better or worse for where they were shown.

    The order shown was drawn at random, so without bias any other order of a post's ranks was as likely. The statistic is
    the sum over positions of n (mean rank - expected rank)²; the p-value is the share of orders, drawn anew within each
    post, in which it is as large. Posts with one candidate say nothing and are left out. An order that several judges were
    shown was drawn once, so their ranks are averaged first.

    Args:
        judgements: as in `mean_ranks`.
        ties: as in `mean_ranks`.
        permutations: how many orders to draw.
        seed: of the draws.

    Returns:
        Measure -> bias.

    Raises:
        ValueError: as in `mean_ranks`.
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
    # Those with equally many candidates together, so that their orders are drawn at once.
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
    """(permutations, measures): the statistic of `position_bias`, positions drawn anew within each post."""
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
    """Krippendorff's alpha between judges, for ordinal data: 1 is agreement, 0 is chance.

    A unit is a candidate of a post; a judge's rank of it is the value. Posts with one candidate are left out.

    Args:
        judgements: of several judges.
        ties: as in `mean_ranks`.

    Returns:
        Measure -> alpha; None where no two judged the same candidate, or all gave one and the same rank.

    Raises:
        ImportError: if the package `krippendorff` is not installed.
        ValueError: as in `mean_ranks`, or if a judge judged a post twice.

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
                raise ValueError(f"post {judgement.post!r} was judged twice by {judgement.judge!r}: keep one of them")
            if len(judgement.order) > 1:
                of_unit[judgement.judge] = ranks[:, place]
    judges = list(dict.fromkeys(judgement.judge for judgement in judgements))
    nothing = np.full(len(MEASURES), np.nan)
    data = np.array([[unit.get(judge, nothing) for unit in values.values()] for judge in judges])
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
    """All figures but the agreement, as JSON values; arguments as in `mean_ranks`."""
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
    """A report as Markdown: mean ranks, the best system first, then ranks by position, then agreement if there is any.

    Args:
        report: what `rank_report` gave; `alpha` (measure -> alpha) is shown if it is there.
    """
    systems = sorted(report["mean_ranks"].items(), key=lambda item: item[1][OVERALL]["mean"])
    rows = [["mean rank", *MEASURES]]
    for system, measures in systems:
        rows.append([system, *(_with_interval(measures[name]) for name in MEASURES)])
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
        parts += [markdown_table(rows), "In brackets: the difference to what it would be if positions did not matter."]
    if "alpha" in report:
        alphas = [report["alpha"][name] for name in MEASURES]
        rows = [["agreement", *MEASURES], ["Krippendorff's α", *("-" if a is None else f"{a:.3f}" for a in alphas)]]
        parts.append(markdown_table(rows))
    return "\n\n".join(parts)


def _with_interval(cell: Mapping[str, float]) -> str:
    return f"{cell['mean']:.2f} ({cell['low']:.2f}-{cell['high']:.2f})"
