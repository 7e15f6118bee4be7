"""Filters that reject rationales not suitable for training.

Given   an answer of the teacher, the post's gold keyphrases, and the prompt's field names.
Gives   the name of the first filter that rejects it, or None.
Holds   a filter considers a single answer (`dynkp.rationales.near_copies` compares answers); filters are applied in the order
        of `FILTERS`, so that each rejected rationale is counted once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from dynkp.chat.request import is_whole
from dynkp.data.reasoning_tasks import ReasoningTask
from dynkp.mmkp_f1.answers import TAG

FILTERS = {
    "empty": "the answer is empty",
    "refusal": "the teacher refuses (“I'm sorry, but I can't ...”)",
    "cut_off": "the answer is not complete: it ended at the token limit, or for another reason than `stop`",
    "too_short": "fewer words than --min-words",
    "too_long": "more words than --max-words",
    "field_names": 'refers to the prompt\'s fields (“the "Post text" says ...”)',
    "wrong_prediction": "the response chain's prediction is not the gold answer",
    "no_gold_phrase": "mentions none of the post's keyphrases",
    "near_copy": "almost equal to another post's rationale",
}
DEFAULT_FILTERS = tuple(name for name in FILTERS if name != "no_gold_phrase")

# Matched at the beginning only: a rationale may quote a post that contains such words.
_REFUSAL = re.compile(
    r"^\W*(?:(?:i['’]?m|i am|we['’]?re)\s+(?:really |very |so )?(?:sorry|afraid|unable|not able)\b"
    r"|(?:sorry|apologies)\b[\s\S]{0,40}\b(?:can(?:no|['’])?t|unable|not able)\b"
    r"|i\s+(?:can(?:no|['’])?t|can not|could(?:n['’]?t| not)|won['’]?t|will not|must decline|decline|do not|don['’]t)\s+"
    r"(?:\w+\s+)?(?:assist|help|provide|comply|fulfil|fulfill|analy[sz]e|identify|describe|discuss|create|generate|answer|see|view"
    r"|feel comfortable|have the ability)"
    r"|as an? (?:ai|artificial intelligence|language model)\b"
    r"|i apologi[sz]e\b)",
    re.IGNORECASE,
)
_WORD = re.compile(r"\w+")


class RationaleFilter:
    """The filters that consider a single answer.

    Args:
        names: The names of the filters to apply, of `FILTERS`.
        min_words: The least number of words, for `too_short`.
        max_words: The largest number of words, for `too_long`.
        field_names: The names of the prompt's fields, for `field_names`.
        reasoning_task: The task whose response chains are filtered, for `wrong_prediction`; None for other rationales.

    Raises:
        ValueError: If a name is not known, or `min_words` is not from 0 to `max_words`.

    Example:
        >>> reject = RationaleFilter(["empty", "refusal"])
        >>> reject("I'm sorry, but I can't help with that.", keyphrases=["dogs"])
        'refusal'
        >>> reject("The image shows a dog.", keyphrases=["dogs"]) is None
        True
    """

    def __init__(
        self,
        names: Iterable[str] = DEFAULT_FILTERS,
        *,
        min_words: int = 10,
        max_words: int = 600,
        field_names: Sequence[str] = (),
        reasoning_task: ReasoningTask | None = None,
    ):
        self.names = set(names)
        if unknown := self.names - FILTERS.keys():
            raise ValueError(f"filters={sorted(unknown)} are not known: use names of {', '.join(FILTERS)}, or none")
        if not 0 <= min_words <= max_words:
            raise ValueError(f"min_words={min_words!r} must be from 0 to max_words={max_words!r}")
        self.min_words, self.max_words = min_words, max_words
        self.reasoning_task = reasoning_task
        # In quotes, or as a label: the names are ordinary words, which a rationale may use.
        fields = "|".join(re.escape(name) for name in field_names)
        named = rf"[\"“*]({fields})[\"”*]|^[ \t]*({fields}):"
        self._fields = re.compile(named, re.IGNORECASE | re.MULTILINE) if fields else None

    def __call__(
        self, text: str, *, keyphrases: Sequence[str] = (), answer: str | None = None, finish_reason: str | None = "stop"
    ) -> str | None:
        """Apply the filters to a rationale.

        Args:
            text: The rationale.
            keyphrases: The post's gold keyphrases.
            answer: The post's gold answer, as the reasoning task parses it.
            finish_reason: Why the answer ended, as the server reports it (`dynkp.chat.request.is_whole`).

        Returns:
            The name of the first filter that rejects it, or None.
        """
        words = len(text.split())
        rejected = {
            "empty": not TAG.sub("", text).strip(),
            "refusal": bool(_REFUSAL.match(text)),
            "cut_off": not is_whole(finish_reason),
            "too_short": words < self.min_words,
            "too_long": words > self.max_words,
            "field_names": bool(self._fields and self._fields.search(text)),
            "wrong_prediction": self.reasoning_task is not None and self.reasoning_task.parse(text).prediction != answer,
            "no_gold_phrase": "no_gold_phrase" in self.names and not mentions_any(text, keyphrases),
        }
        return next((name for name in FILTERS if name in self.names and rejected.get(name)), None)


def mentions_any(text: str, keyphrases: Iterable[str]) -> bool:
    """Check whether a text contains one of the keyphrases, as words or as a hashtag.

    Case is ignored, and so are whitespace and punctuation between a keyphrase's words: "Happy Friday", "happy-friday" and
    "#HappyFriday" are equal.

    Args:
        text: The text.
        keyphrases: The keyphrases.

    Example:
        >>> mentions_any("It is #HappyFriday!", ["happy friday"]), mentions_any("A fridayish day", ["friday"])
        (True, False)
    """
    text = text.casefold()
    for phrase in keyphrases:
        words = r"[\W_]*".join(map(re.escape, _WORD.findall(phrase.casefold())))
        if words and re.search(rf"(?<!\w){words}(?!\w)", text):
            return True
    return False
