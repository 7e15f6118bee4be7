"""What scores do not say about outputs: how many, how long, how often repeated, how often unusable.

Given lists of predicted keyphrases, or a model's raw outputs. Gives shares and means, `None` where there is nothing to
take them of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .answers import END_THINK, THINK, answer_phrases, count_words
from .scoring import stem_phrase


def list_statistics(predictions: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """Describe lists of keyphrases.

    Args:
        predictions: per post its keyphrases.

    Returns:
        `empty_share`, of posts without a keyphrase; `keyphrases_per_post`, blank ones left out; `repeat_share`, of
        keyphrases whose stems repeat an earlier one of their post.

    Example:
        >>> list_statistics([["dogs", "dog", "cat", "sun"], []])
        {'empty_share': 0.5, 'keyphrases_per_post': 2.0, 'repeat_share': 0.25}
    """
    stems = [[stem for phrase in phrases if (stem := stem_phrase(phrase))] for phrases in predictions]
    listed = sum(map(len, stems))
    distinct = sum(len(set(phrases)) for phrases in stems)
    return {
        "empty_share": _share(sum(not phrases for phrases in stems), len(stems)),
        "keyphrases_per_post": _share(listed, len(stems)),
        "repeat_share": _share(listed - distinct, listed),
    }


def output_statistics(
    outputs: Sequence[str], separator: str = ";", count_tokens: Callable[[str], int] | None = None
) -> dict[str, float | None]:
    """Describe a model's raw outputs.

    Args:
        outputs: per post what the model wrote.
        separator: what joins keyphrases in them.
        count_tokens: output -> its number of tokens; without it tokens are not counted.

    Returns:
        What `list_statistics` says of the keyphrases, repeats not removed; `unparsable_share`, of outputs that hold
        something but no keyphrase (reasoning that was cut off, for one); `reasoning_share`; `output_words`, the mean
        number of words, reasoning included; and `output_tokens`.

    Example:
        >>> statistics = output_statistics(["<think>A dog.</think><answer>dog; dog</answer>", "<think>A", ""])
        >>> statistics["unparsable_share"] == 1 / 3, statistics["repeat_share"]
        (True, 0.5)
    """
    phrases = [answer_phrases(output, separator) for output in outputs]
    unparsable = sum(bool(output.strip()) and not found for output, found in zip(outputs, phrases, strict=True))
    reasoning = sum(THINK in output or END_THINK in output for output in outputs)
    statistics = list_statistics(phrases) | {
        "unparsable_share": _share(unparsable, len(outputs)),
        "reasoning_share": _share(reasoning, len(outputs)),
        "output_words": _share(sum(map(count_words, outputs)), len(outputs)),
    }
    if count_tokens is not None:
        statistics["output_tokens"] = _share(sum(map(count_tokens, outputs)), len(outputs))
    return statistics


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None
