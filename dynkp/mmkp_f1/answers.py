"""The parser of a model's outputs, and the normalisation of keyphrases.

Given   a model's output; a keyphrase.
Gives   its keyphrases, and whether it contains reasoning; the keyphrase as it is compared with others.
Holds   every string is accepted, in time linear in its length; the targets that `dynkp.data.tasks` writes are parsed to what
        they were written from. Gold keyphrases, predictions and training keyphrases are normalised by one function,
        `normalise_phrase`, which changes nothing when it is applied again.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

THINK, END_THINK = "<think>", "</think>"
ANSWER, END_ANSWER = "<answer>", "</answer>"
TAGS = (THINK, END_THINK, ANSWER, END_ANSWER)
TAG = re.compile("</?(?:think|answer)>")

# Characters without width: soft hyphen, zero-width spaces and joiners, byte order mark, and the marks of text direction.
ZERO_WIDTH = (
    "\u00ad\u061c\u180e\u200b\u200c\u200d\u200e\u200f\u2060\ufeff" + "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)
# All whitespace of Unicode (none beyond U+3000), characters without width, and the number sign, ASCII, small and full-width:
# what is stripped from both ends of a keyphrase.
STRIPPED = "".join(character for character in map(chr, range(0x3001)) if character.isspace()) + ZERO_WIDTH + "#\ufe5f\uff03"
# Python's normalisation takes quadratic time in a run of combining marks (never `\w`); no script has such long ones.
_LONG_RUN = re.compile(r"([^\x00-\x7f\w\s]{32,})")


class Answer(NamedTuple):
    """A parsed output.

    Attributes:
        keyphrases: The keyphrases in their order, without exact repeats; may be empty.
        reasoned: Whether the output contains reasoning (a `<think>` or `</think>`).
    """

    keyphrases: list[str]
    reasoned: bool


def canonical_text(text: str) -> str:
    r"""Normalise a text to Unicode's composed form (NFC), so that canonically equivalent texts are equal.

    Runs of 32 or more combining marks or symbols are kept as they are; the time is linear in the length of the text.

    Args:
        text: The text.

    Example:
        >>> canonical_text("cafe\u0301") == "caf\u00e9"
        True
    """
    if text.isascii():
        return text
    pieces = _LONG_RUN.split(text)
    pieces[::2] = [unicodedata.normalize("NFC", piece) for piece in pieces[::2]]
    return "".join(pieces)


def normalise_phrase(phrase: str) -> str:
    r"""Normalise a keyphrase: Unicode's composed form (NFC), without `STRIPPED` characters at both ends.

    These are whitespace, number signs ("#" and its full-width form) and characters without width (zero-width spaces and
    joiners, marks of text direction). Case, and characters inside the keyphrase, are kept.

    Args:
        phrase: The keyphrase.

    Example:
        >>> normalise_phrase(" #NBA Finals "), normalise_phrase("\uff03NBA\u200f")
        ('NBA Finals', 'NBA')
    """
    return canonical_text(phrase).strip(STRIPPED)


def parse_answer(output: str, separator: str = ";") -> Answer:
    """Parse the keyphrases in a model's output.

    The answer is the first `<answer>…</answer>` behind the first `</think>`; without a `</think>` (or with none behind it) the
    first of the output; else the whole output. Every `<think>…</think>` is removed from it, so an `<answer>` that is quoted
    inside the reasoning is not taken for the answer; the rest is split at the separator, each piece is normalised by
    `normalise_phrase`, and empty pieces and repeats are dropped. In cases that the methods do not define:

    - after an unclosed `<think>` (the output was cut off) everything is reasoning, not an answer;
    - a `</think>` before any `<think>` closes reasoning that the chat template had opened in the prompt;
    - a remaining tag (an unclosed `<answer>`) is markup, never part of a keyphrase, and acts as a separator;
    - repeats are exact, after normalisation: the metric ignores case and inflection itself.

    Args:
        output: The output, with special tokens removed except for the four tags.
        separator: The separator of keyphrases; whitespace around it is ignored. AimKP-style checkpoints use ",".

    Returns:
        The keyphrases, and whether the output contains reasoning.

    Raises:
        TypeError: If `output` is not a string.

    Example:
        >>> parse_answer("<think>A dog.</think><answer>#beagles; dogs; beagles</answer>")
        Answer(keyphrases=['beagles', 'dogs'], reasoned=True)
    """
    return Answer(
        keyphrases=list(dict.fromkeys(answer_phrases(output, separator))),
        reasoned=THINK in output or END_THINK in output,
    )


def answer_phrases(output: str, separator: str = ";") -> list[str]:
    """Parse the keyphrases in a model's output as `parse_answer` does, but keep repeats.

    Args:
        output: The output.
        separator: The separator of keyphrases.

    Returns:
        The keyphrases in their order, with repeats.

    Raises:
        TypeError: If `output` is not a string.

    Example:
        >>> answer_phrases("dogs; cats; dogs")
        ['dogs', 'cats', 'dogs']
    """
    if not isinstance(output, str):
        raise TypeError(f"output must be a string, got {type(output).__name__}: {output!r:.80}")
    mark = separator.strip() or separator
    # Remaining tags become separators: if they were removed, the text around them could form a new tag.
    pieces = TAG.sub(lambda tag: mark, _answer(output)).split(mark)
    # NFC makes ";" of the Greek question mark: the composed pieces are split again.
    composed = (part for piece in pieces for part in canonical_text(piece).split(mark))
    return [phrase for part in composed if (phrase := normalise_phrase(part))]


def _answer(output: str) -> str:
    """Return the part of an output that is its answer, without reasoning."""
    _, closed, behind = output.partition(END_THINK)
    if not closed:
        tagged = _first_tagged(output)
        return _without_blocks(output if tagged is None else tagged)
    whole = _without_reasoning(output)
    found = (tagged for text in (_without_blocks(behind), whole) if (tagged := _first_tagged(text)) is not None)
    return next(found, whole)


def _first_tagged(text: str) -> str | None:
    # find, not a regular expression: "<answer>" repeated a million times must not cost a million scans.
    start = text.find(ANSWER)
    end = text.find(END_ANSWER, start) if start >= 0 else -1
    return text[start + len(ANSWER) : end] if end >= 0 else None


def _without_reasoning(text: str) -> str:
    opened, closed = text.find(THINK), text.find(END_THINK)
    return _without_blocks(text, closed + len(END_THINK) if closed >= 0 and not 0 <= opened < closed else 0)


def _without_blocks(text: str, position: int = 0) -> str:
    """Return a text from a position on, without what stands between `<think>` and `</think>` or the end."""
    kept = []
    while (opened := text.find(THINK, position)) >= 0:
        kept.append(text[position:opened])
        closed = text.find(END_THINK, opened)
        if closed < 0:
            return "".join(kept)
        position = closed + len(END_THINK)
    return "".join([*kept, text[position:]])


def count_words(output: str) -> int:
    """Count the whitespace-separated words of a model's output, of reasoning and answer together, without tags.

    Args:
        output: The output.

    Example:
        >>> count_words("<think>A dog.</think><answer>beagles</answer>")
        3
    """
    return len(TAG.sub(" ", output).split())
