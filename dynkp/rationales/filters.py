"""Rationales that should not be learned from.

Given   an answer, the post's gold keyphrases, and the prompt's field names.
Gives   the first rule it breaks, or None.
Holds   a rule looks at one answer (near-copies of others' are `dynkp.rationales.near_copies`'s); rules are tried in the
        order of `FILTERS`, so that each rejected rationale is counted once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from dynkp.data.reasoning_tasks import ReasoningTask
from dynkp.mmkp_f1.answers import TAG

FILTERS = {
    "empty": "nothing was answered",
    "refusal": "the teacher refuses (“I'm sorry, but I can't ...”)",
    "cut_off": "the answer ended at the token limit",
    "too_short": "fewer words than --min-words",
    "too_long": "more words than --max-words",
    "field_names": 'speaks of the prompt\'s fields (“the "Post text" says ...”)',
    "wrong_prediction": "of a chain: its prediction is not the gold answer",
    "no_gold_phrase": "mentions none of the post's keyphrases",
    "near_copy": "says again what another post's rationale says",
}
DEFAULT_FILTERS = tuple(name for name in FILTERS if name != "no_gold_phrase")

# At the beginning only: a rationale may well speak of people who cannot help.
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
    """The rules that look at one answer.

    Args:
        names: which of `FILTERS` to apply.
        min_words: fewest words.
        max_words: most words.
        field_names: what the prompt calls its parts.
        reasoning_task: of chains, to read their predictions; None for other rationales.

    Raises:
        ValueError: if a name is not known.

    Example:
        >>> judge = RationaleFilter(["empty", "refusal"])
        >>> judge("I'm sorry, but I can't help with that.", keyphrases=["dogs"])
        'refusal'
        >>> judge("The picture shows a dog.", keyphrases=["dogs"]) is None
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
            raise ValueError(f"filters={sorted(unknown)} are not known: use some of {', '.join(FILTERS)}, or none")
        if not 0 <= min_words <= max_words:
            raise ValueError(f"min_words={min_words!r} must be from 0 to max_words={max_words!r}")
        self.min_words, self.max_words = min_words, max_words
        self.reasoning_task = reasoning_task
        # In quotes, or as a label: the words themselves are ordinary ones.
        fields = "|".join(re.escape(name) for name in field_names)
        named = rf"[\"“*]({fields})[\"”*]|^[ \t]*({fields}):"
        self._fields = re.compile(named, re.IGNORECASE | re.MULTILINE) if fields else None

    def __call__(
        self, text: str, *, keyphrases: Sequence[str] = (), answer: str | None = None, finish_reason: str | None = None
    ) -> str | None:
        """Judge a rationale.

        Args:
            text: the rationale.
            keyphrases: the post's gold keyphrases.
            answer: the post's gold answer as the reasoning task reads it.
            finish_reason: of the answer.

        Returns:
            The name of the rule it breaks, or None.
        """
        words = len(text.split())
        broken = {
            "empty": not TAG.sub("", text).strip(),
            "refusal": bool(_REFUSAL.match(text)),
            "cut_off": finish_reason == "length",
            "too_short": words < self.min_words,
            "too_long": words > self.max_words,
            "field_names": bool(self._fields and self._fields.search(text)),
            "wrong_prediction": self.reasoning_task is not None and self.reasoning_task.parse(text).prediction != answer,
            "no_gold_phrase": "no_gold_phrase" in self.names and not mentions_any(text, keyphrases),
        }
        return next((name for name in FILTERS if name in self.names and broken.get(name)), None)


def mentions_any(text: str, keyphrases: Iterable[str]) -> bool:
    """Whether a text has one of the phrases, as words or as a hashtag.

    Upper and lower case do not count, nor what stands between a phrase's words: "Happy Friday", "happy-friday" and
    "#HappyFriday" are one.

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
