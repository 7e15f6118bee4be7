"""Everything the metric says about one system, in one dictionary with the convention at its head.

Given predictions (lists or raw outputs) and gold keyphrases. Gives scores per subset, intervals, what the outputs are
like, semantic scores. It is what the `evaluate` module and the reports call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .answers import parse_answer
from .outputs import list_statistics, output_statistics
from .scoring import SUBSETS, KeyphraseScorer, checked_phrase_lists, checked_strings
from .semantic import semantic_scores
from .significance import bootstrap_intervals


def evaluate_keyphrases(
    predictions: Iterable[Any],
    references: Iterable[Sequence[str]],
    *,
    texts: Iterable[str] | None = None,
    train_keyphrases: Iterable[str] | None = None,
    convention: str = "cmkp",
    ks: Sequence[int] = (1, 3, 5),
    subsets: Sequence[str] | None = None,
    confidence: float | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    parse: bool = False,
    separator: str = ";",
    count_tokens: Callable[[str], int] | None = None,
    semantic_model: Any = None,
) -> dict[str, Any]:
    """Score a system and describe its outputs.

    Args:
        predictions: per post its keyphrases, best first; with `parse` the model's raw output.
        references: per post its gold keyphrases, at least one.
        texts: per post its text, for the subsets present and absent.
        train_keyphrases: for the subsets seen and unseen.
        convention: `cmkp`, `aimkp`, `padded` or `unpadded`; see `score_keyphrases`.
        ks: the cut-offs.
        subsets: those wanted; `None` is `all` and the single kinds that texts and training keyphrases allow.
        confidence: such as 0.95, for bootstrap intervals; `None` for none.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        parse: whether predictions are raw outputs, to be read by `parse_answer`.
        separator: what joins keyphrases in raw outputs.
        count_tokens: raw output -> its number of tokens.
        semantic_model: a sentence-transformers model for semantic scores; `None` for none.

    Returns:
        `convention`, `posts`, `subsets` (as `score_keyphrases` gives them), what `list_statistics` or, with `parse`,
        `output_statistics` gives, with a confidence `intervals` (`confidence`, `resamples`, `seed`, and under `subsets`
        per subset and measure its two bounds, `None` without posts), and with a model the scores of `semantic_scores`.

    Raises:
        TypeError, ValueError: as in `score_keyphrases`.

    Example:
        >>> outputs = ["<think>A dog.</think><answer>dogs; cats</answer>", "sun"]
        >>> result = evaluate_keyphrases(outputs, [["dog"], ["rain"]], parse=True, ks=[1])
        >>> result["convention"], result["subsets"]["all"]["f1@1"], result["reasoning_share"]
        ('cmkp', 0.5, 0.5)
    """
    if confidence is not None and not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r} must be between 0 and 1, such as 0.95")
    if parse:
        outputs = checked_strings("predictions", predictions)
        predicted = [parse_answer(output, separator).keyphrases for output in outputs]
        statistics = output_statistics(outputs, separator, count_tokens)
    else:
        predicted = checked_phrase_lists("predictions", predictions)
        statistics = list_statistics(predicted)
    gold = checked_phrase_lists("references", references)
    scorer = KeyphraseScorer(
        convention=convention,
        ks=ks,
        subsets=allowed_subsets(texts is not None, train_keyphrases is not None) if subsets is None else subsets,
        train_keyphrases=train_keyphrases,
        keep_posts=confidence is not None,
    )
    scorer.add_batch(predicted, gold, texts)
    result: dict[str, Any] = {"convention": convention, "posts": len(gold), "subsets": scorer.compute()} | statistics
    if confidence is not None:
        intervals: dict[str, Any] = {}
        for subset, scores in scorer.post_scores().items():
            intervals[subset] = dict.fromkeys(scores.measures())
            if len(scores.positions):
                found = bootstrap_intervals(scores, confidence=confidence, resamples=resamples, seed=seed)
                intervals[subset] = {measure: [interval.low, interval.high] for measure, interval in found.items()}
        result["intervals"] = {"confidence": confidence, "resamples": resamples, "seed": seed, "subsets": intervals}
    if semantic_model is not None:
        result |= semantic_scores(predicted, gold, semantic_model, ks=ks)
    return result


def allowed_subsets(texts: bool, train_keyphrases: bool) -> list[str]:
    """`all` and the single kinds for which there is what they need."""
    given = {"present": texts, "absent": texts, "seen": train_keyphrases, "unseen": train_keyphrases}
    return [subset for subset in SUBSETS if given.get(subset, True)]
