"""The answer parser: how a model's output is read.

Given a model's output, gives its keyphrases and whether it reasoned. Holds: any string is taken, in time linear in its
length; the targets that `dynkp.data.tasks` writes are read back as they were written.
"""

from __future__ import annotations

import re
from typing import NamedTuple

THINK, END_THINK = "<think>", "</think>"
ANSWER, END_ANSWER = "<answer>", "</answer>"
TAGS = (THINK, END_THINK, ANSWER, END_ANSWER)
TAG = re.compile("</?(?:think|answer)>")

# Every blank of Unicode (none lies beyond U+3000) and "#": what the parser strips from a keyphrase's ends.
STRIPPED = "".join(character for character in map(chr, range(0x3001)) if character.isspace()) + "#"


class Answer(NamedTuple):
    """A model's output, read.

    Attributes:
        keyphrases: in the order given, without exact repeats; may be empty.
        reasoned: whether the output holds reasoning (a `<think>` or `</think>`).
    """

    keyphrases: list[str]
    reasoned: bool


def parse_answer(output: str, separator: str = ";") -> Answer:
    """Read the keyphrases in a model's output.

    The answer is the first `<answer>…</answer>` if there is one, else the whole output. From it any `<think>…</think>`
    is removed; what is left is split on the separator, "#" and blanks are stripped from both ends of each piece, and
    empty pieces and repeats are dropped. Where methods leave it open:

    - an unclosed `<think>` (the output was cut off) leaves nothing after it: it is all reasoning, not an answer;
    - a `</think>` before any `<think>` closes reasoning that the chat template had opened in the prompt;
    - tags left over (an unclosed `<answer>`) are markup, never part of a keyphrase, and separate;
    - repeats are exact, after stripping: the metric folds case and word forms itself.

    Args:
        output: what the model wrote, special tokens removed but for the four tags.
        separator: what joins keyphrases; blanks around it do not matter. AimKP-style checkpoints use ",".

    Returns:
        The keyphrases and whether the output reasoned.

    Raises:
        TypeError: if `output` is not a string.

    Example:
        >>> parse_answer("<think>A dog.</think><answer>#beagles; dogs; beagles</answer>")
        Answer(keyphrases=['beagles', 'dogs'], reasoned=True)
    """
    return Answer(
        keyphrases=list(dict.fromkeys(answer_phrases(output, separator))),
        reasoned=THINK in output or END_THINK in output,
    )


def answer_phrases(output: str, separator: str = ";") -> list[str]:
    """What `parse_answer` reads, with the repeats.

    Example:
        >>> answer_phrases("dogs; cats; dogs")
        ['dogs', 'cats', 'dogs']
    """
    if not isinstance(output, str):
        raise TypeError(f"output must be a string, got {type(output).__name__}: {output!r:.80}")
    answer = output
    # find, not a regular expression: "<answer>" a million times over must not cost a million scans.
    start = output.find(ANSWER)
    end = output.find(END_ANSWER, start) if start >= 0 else -1
    if end >= 0:
        answer = output[start + len(ANSWER) : end]
    mark = separator.strip() or separator
    # Tags left over become separators: merely removed, their surroundings could close up to a new tag.
    pieces = TAG.sub(lambda tag: mark, _without_reasoning(answer)).split(mark)
    return [phrase for piece in pieces if (phrase := piece.strip(STRIPPED))]


def _without_reasoning(text: str) -> str:
    opened, closed = text.find(THINK), text.find(END_THINK)
    position = closed + len(END_THINK) if closed >= 0 and not 0 <= opened < closed else 0
    kept = []
    while (opened := text.find(THINK, position)) >= 0:
        kept.append(text[position:opened])
        closed = text.find(END_THINK, opened)
        if closed < 0:
            return "".join(kept)
        position = closed + len(END_THINK)
    return "".join([*kept, text[position:]])


def count_words(output: str) -> int:
    """Count the blank-separated words of a model's output, reasoning and answer together, tags aside.

    Example:
        >>> count_words("<think>A dog.</think><answer>beagles</answer>")
        3
    """
    return len(TAG.sub(" ", output).split())
