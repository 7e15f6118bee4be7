"""All scores of one system, in one dictionary.

Given   predictions (lists of keyphrases or raw outputs) and gold keyphrases.
Gives   the convention, scores per subset, intervals, statistics of the outputs, semantic scores.
Holds   the module of the `evaluate` library returns the same dictionary.
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
    """Score a system and compute statistics of its outputs.

    Args:
        predictions: Per post the predicted keyphrases, best first; with `parse` the model's raw output.
        references: Per post the gold keyphrases, at least one.
        texts: Per post the text, for the subsets present and absent; `None` leaves these subsets out.
        train_keyphrases: The training set's keyphrases, for the subsets seen and unseen; `None` leaves these subsets out.
        convention: The scoring convention, `cmkp`, `aimkp`, `padded` or `unpadded`; see `score_keyphrases`.
        ks: The cut-offs.
        subsets: The subsets to score; `None` for `all` and the single kinds that texts and training keyphrases allow.
        confidence: The confidence of bootstrap intervals, such as 0.95; `None` for no intervals.
        resamples: The number of bootstrap resamples.
        seed: The seed of the bootstrap.
        parse: Whether predictions are raw outputs, to be parsed by `parse_answer`.
        separator: The separator of keyphrases in raw outputs.
        count_tokens: A function that returns the number of tokens of a raw output; `None` to count no tokens.
        semantic_model: A sentence-transformers model for semantic scores; `None` for none.

    Returns:
        `convention`, `posts`, `subsets` (as `score_keyphrases` returns them); the statistics of `list_statistics` or, with
        `parse`, `output_statistics`; with a confidence `intervals` (`confidence`, `resamples`, `seed`, and under `subsets`
        per subset and measure two bounds, `None` without posts); and with a model the scores of `semantic_scores`.

    Raises:
        TypeError: As in `score_keyphrases`.
        ValueError: As in `score_keyphrases`, or if `confidence` is not between 0 and 1.

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
    """Return the subsets that can be scored: `all`, and the single kinds whose inputs are given.

    Args:
        texts: Whether the posts' texts are given.
        train_keyphrases: Whether the training keyphrases are given.

    Example:
        >>> allowed_subsets(texts=False, train_keyphrases=True)
        ['all', 'seen', 'unseen']
    """
    given = {"present": texts, "absent": texts, "seen": train_keyphrases, "unseen": train_keyphrases}
    return [subset for subset in SUBSETS if given.get(subset, True)]
