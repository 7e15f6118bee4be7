"""Keyphrase scores, convention `cmkp`: the script of Wang et al. (2020), by which the baselines' papers report.

Given ranked predictions and gold keyphrases per post, gives P, R, F1 and MAP at k per subset of the phrases. Holds:
every printed digit of the 2020 script, at a tenth of its time. A phrase is compared as its words' Porter stems
(NLTK's default mode, which lower-cases), joined by one blank. No torch, nothing else of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

# A prediction with one of these among its words is dropped before the cut at k, as the 2020 script does.
_DROPPED_TOKENS = frozenset(("<unk>", ",", "."))


class _Post(NamedTuple):
    gold: frozenset[str]
    ranked: list[str]
    text: str | None


def score_keyphrases(
    predictions: Iterable[Sequence[str]],
    references: Iterable[Sequence[str]],
    *,
    texts: Iterable[str] | None = None,
    train_keyphrases: Iterable[str] | None = None,
    ks: Sequence[int] = (1, 3, 5),
) -> dict[str, dict[str, float | None]]:
    """Score ranked keyphrases against the gold ones by convention `cmkp`.

    With G the set of a post's gold phrases, Q its predictions without repeats, m = min(k, |Q|) and h the hits among
    the first m: P = h/m (0 without predictions), R = h/|G|, AP = (1/|G|) Σ_{j≤m} rel_j · hits_j/j. Reported are the
    means over posts, and F1@k, the **harmonic mean of the two means**, which is not the mean of the posts' F1.

    A subset keeps, of gold **and** predictions, the phrases of one kind, cuts at k inside it, and averages over the
    posts with at least one such gold phrase. Present: the stemmed phrase is a run of the stemmed text's words. Seen:
    it is among the training keyphrases.

    Args:
        predictions: per post its keyphrases, best first; an empty list scores 0.
        references: per post its gold keyphrases, at least one; the same order and number of posts.
        texts: per post its text, words apart by blanks; gives the subsets `present` and `absent`.
        train_keyphrases: the training set's keyphrases; gives the subsets `seen` and `unseen`.
        ks: the cut-offs, at least 1 each.

    Returns:
        Per subset (`all` first) `posts`, the number averaged over, and for every k `P@k`, `R@k`, `F1@k`, `MAP@k` as
        fractions in [0, 1]; None where a subset has no post.

    Raises:
        TypeError: if something other than strings stands where keyphrases or texts belong.
        ValueError: if numbers of posts differ, a post has no gold keyphrase, one is blank, or a cut-off is below 1.

    Example:
        >>> scores = score_keyphrases([["dogs", "cats"], ["sun"]], [["dog"], ["rain"]], ks=[1])
        >>> scores["all"]
        {'posts': 2, 'P@1': 0.5, 'R@1': 0.5, 'F1@1': 0.5, 'MAP@1': 0.5}
    """
    for k in ks:
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"ks={list(ks)!r}: every cut-off must be a whole number of at least 1")
    predicted = _phrase_lists("predictions", predictions)
    gold = _phrase_lists("references", references)
    text_list = [None] * len(gold) if texts is None else _strings("texts", texts)
    for name, rows in (("predictions", predicted), ("texts", text_list)):
        if len(rows) != len(gold):
            raise ValueError(f"{name} has {len(rows)} posts and references has {len(gold)}: give one each per post")
    for index, phrases in enumerate(gold):
        if not phrases or not all(phrase.strip() for phrase in phrases):
            raise ValueError(
                f"references[{index}]={phrases!r} must hold at least one keyphrase and no blank one: "
                "leave posts without gold keyphrases out"
            )
    # Blanks around text and phrase make a substring a run of whole words; a blank prediction is absent.
    posts = [
        _Post(frozenset(map(stem_phrase, phrases)), _ranked(ranked), text and f" {stem_phrase(text)} ")
        for phrases, ranked, text in zip(gold, predicted, text_list, strict=True)
    ]

    scores = {"all": _mean_scores(posts, ks)}
    if texts is not None:
        scores["present"] = _mean_scores(_restricted(posts, lambda phrase, text: f" {phrase} " in text), ks)
        scores["absent"] = _mean_scores(_restricted(posts, lambda phrase, text: f" {phrase} " not in text), ks)
    if train_keyphrases is not None:
        seen = frozenset(map(stem_phrase, _strings("train_keyphrases", train_keyphrases)))
        scores["seen"] = _mean_scores(_restricted(posts, lambda phrase, text: phrase in seen), ks)
        scores["unseen"] = _mean_scores(_restricted(posts, lambda phrase, text: phrase not in seen), ks)
    return scores


@lru_cache(maxsize=1 << 17)
def stem_phrase(phrase: str) -> str:
    """Stem every blank-separated word of a phrase (or text) and join the stems by one blank.

    Example:
        >>> stem_phrase("Wildflower  Hours")
        'wildflow hour'
    """
    return " ".join(map(_stem_word, phrase.split()))


@lru_cache(maxsize=1 << 17)
def _stem_word(word: str) -> str:
    return _stemmer().stem(word)


@lru_cache(maxsize=1)
def _stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer  # over a second to import: only when something is scored

    return PorterStemmer()


def _ranked(phrases: Sequence[str]) -> list[str]:
    stemmed = dict.fromkeys(map(stem_phrase, phrases))
    return [phrase for phrase in stemmed if _DROPPED_TOKENS.isdisjoint(phrase.split())]


def _restricted(posts: list[_Post], belongs: Callable[[str, Any], bool]) -> list[_Post]:
    """Keep the phrases that belong, then the posts with such a gold phrase."""
    kept = []
    for gold, ranked, text in posts:
        if part := frozenset(phrase for phrase in gold if belongs(phrase, text)):
            kept.append(_Post(part, [phrase for phrase in ranked if belongs(phrase, text)], text))
    return kept


def _mean_scores(posts: list[_Post], ks: Sequence[int]) -> dict[str, float | None]:
    scores: dict[str, float | None] = {"posts": len(posts)}
    for k in ks:
        precision = recall = average_precision = 0.0
        for gold, ranked, _ in posts:
            hits = 0
            gain = 0.0
            for position, phrase in enumerate(ranked[:k], start=1):
                if phrase in gold:
                    hits += 1
                    gain += hits / position
            if hits:
                precision += hits / min(k, len(ranked))
                recall += hits / len(gold)
                average_precision += gain / len(gold)
        harmonic = 2 * precision * recall / (precision + recall) if precision else 0.0
        for name, total in (("P", precision), ("R", recall), ("F1", harmonic), ("MAP", average_precision)):
            scores[f"{name}@{k}"] = total / len(posts) if posts else None
    return scores


def _phrase_lists(name: str, rows: Iterable[Sequence[str]]) -> list[list[str]]:
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
        raise TypeError(f"{name} must be a list with a list of keyphrases per post, got {type(rows).__name__}")
    checked = []
    for index, row in enumerate(rows):
        if isinstance(row, str):
            raise TypeError(f"{name}[{index}]={row!r:.80} is a string: give a list of keyphrases, {[row]!r:.80}")
        checked.append(_strings(f"{name}[{index}]", row))
    return checked


def _strings(name: str, values: Iterable[str]) -> list[str]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list of strings, got {type(values).__name__}: {values!r:.80}")
    listed = list(values)
    for index, value in enumerate(listed):
        if not isinstance(value, str):
            raise TypeError(f"{name}[{index}] must be a string, got {type(value).__name__}: {value!r:.80}")
    return listed
