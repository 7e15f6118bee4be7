"""Statistics of outputs: number of keyphrases, length, repeats, and outputs that cannot be parsed.

Given   lists of predicted keyphrases, or a model's raw outputs.
Gives   shares in [0, 1] and means, `None` if the denominator is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .answers import END_THINK, THINK, answer_phrases, count_words, normalise_phrase
from .scoring import stem_phrase


def list_statistics(predictions: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """Compute statistics of lists of keyphrases.

    Args:
        predictions: Per post the predicted keyphrases.

    Returns:
        `empty_share`, the share of posts without a keyphrase; `keyphrases_per_post`, the mean number of keyphrases that are
        not empty; `repeat_share`, the share of keyphrases whose stems repeat an earlier one of their post.

    Example:
        >>> list_statistics([["dogs", "dog", "cat", "sun"], []])
        {'empty_share': 0.5, 'keyphrases_per_post': 2.0, 'repeat_share': 0.25}
    """
    stems = [[stem for phrase in phrases if (stem := stem_phrase(normalise_phrase(phrase)))] for phrases in predictions]
    listed = sum(map(len, stems))
    distinct = sum(len(set(phrases)) for phrases in stems)
    return {
        "empty_share": _ratio_or_none(sum(not phrases for phrases in stems), len(stems)),
        "keyphrases_per_post": _ratio_or_none(listed, len(stems)),
        "repeat_share": _ratio_or_none(listed - distinct, listed),
    }


def output_statistics(
    outputs: Sequence[str], separator: str = ";", count_tokens: Callable[[str], int] | None = None
) -> dict[str, float | None]:
    """Compute statistics of a model's raw outputs.

    Args:
        outputs: Per post the model's output.
        separator: The separator of keyphrases.
        count_tokens: A function that returns the number of tokens of an output; `None` to count no tokens.

    Returns:
        The statistics of `list_statistics` of the keyphrases, with repeats; `unparsable_share`, the share of outputs that
        contain text but no keyphrase (such as reasoning that was cut off); `reasoning_share`, the share of outputs with
        reasoning; `output_words`, the mean number of words, reasoning included; and, with `count_tokens`, `output_tokens`.

    Example:
        >>> statistics = output_statistics(["<think>A dog.</think><answer>dog; dog</answer>", "<think>A", ""])
        >>> statistics["unparsable_share"] == 1 / 3, statistics["repeat_share"]
        (True, 0.5)
    """
    phrases = [answer_phrases(output, separator) for output in outputs]
    unparsable = sum(bool(output.strip()) and not found for output, found in zip(outputs, phrases, strict=True))
    reasoning = sum(THINK in output or END_THINK in output for output in outputs)
    statistics = list_statistics(phrases) | {
        "unparsable_share": _ratio_or_none(unparsable, len(outputs)),
        "reasoning_share": _ratio_or_none(reasoning, len(outputs)),
        "output_words": _ratio_or_none(sum(map(count_words, outputs)), len(outputs)),
    }
    if count_tokens is not None:
        statistics["output_tokens"] = _ratio_or_none(sum(map(count_tokens, outputs)), len(outputs))
    return statistics


def _ratio_or_none(numerator: float, denominator: int) -> float | None:
    return numerator / denominator if denominator else None
