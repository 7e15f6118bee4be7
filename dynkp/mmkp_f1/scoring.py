"""Keyphrase scores in four conventions, over subsets of the keyphrases.

Given   ranked predictions and gold keyphrases per post; texts and training keyphrases for the subsets.
Gives   P, R, F1, MAP and NDCG at k per subset, and optionally per post, with the numbers of posts and gold phrases.
Holds   the figures equal those of the 2020 script (`cmkp`) and of AimKP's script (`aimkp`) in every digit, in a tenth of their
        time; memory does not grow with the number of posts unless per-post scores are kept. Neither torch nor any part of the
        package outside this folder is imported.

Phrases are normalised by `normalise_phrase` ("#" and characters without width are stripped, NFC), gold ones, predictions and
training ones alike, and compared as their words' Porter stems (NLTK's default mode, which lower-cases), joined by one space.
Texts are normalised to NFC, and characters without width are stripped from their words; "#" is kept in texts, as in the
official scripts. Phrases are numbered, and counted in arrays of numbers, several thousand posts at a time. README.md has the
formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from .answers import ZERO_WIDTH, canonical_text, normalise_phrase
from .porter import porter_stem

CONVENTIONS = ("cmkp", "aimkp", "padded", "unpadded")
SUBSETS = ("all", "present", "absent", "seen", "unseen")

Scores = dict[str, dict[str, Any]]
_Array = np.ndarray[Any, Any]

# A prediction that contains one of these words is dropped before the cut at k, as in the 2020 script.
_DROPPED_TOKENS = frozenset(("<unk>", ",", "."))
_OPPOSITES = ({"present", "absent"}, {"seen", "unseen"})
_POSTS_AT_A_TIME = 8192


def score_keyphrases(
    predictions: Iterable[Sequence[str]],
    references: Iterable[Sequence[str]],
    *,
    texts: Iterable[str] | None = None,
    train_keyphrases: Iterable[str] | None = None,
    ks: Sequence[int] = (1, 3, 5),
    convention: str = "cmkp",
    subsets: Sequence[str] | None = None,
) -> Scores:
    """Score ranked keyphrases against the gold keyphrases.

    The conventions give different figures: name the convention beside every figure. With G a post's distinct gold phrases, Q
    its predictions and h the hits among the first k:

    - `cmkp` (Wang et al. 2020): Q without repeats; P = h/min(k, |Q|), R = h/|G|; F1@k is the **harmonic mean of the means**
      of P and R; the ideal order of NDCG is that of the predictions.
    - `aimkp` (AimKP's tables): P = h/k, R = h/(number of gold phrases as listed); F1@k is the mean of the posts' F1; "MAP@k"
      is the mean of the precisions at 1, ..., min(k, |Q|), which is not mean average precision.
    - `padded`, `unpadded` (the keyphrase generation literature): Q without repeats and empty phrases; P = h/k or
      h/min(k, |Q|), R = h/|G|; F1@k is the mean of the posts' F1; also F1@M (all predictions), F1@O (as many as gold
      phrases) and R-precision.

    A subset restricts both gold phrases **and** predictions to one kind, cuts at k within it, and averages over the posts
    with at least one such gold phrase. Present: the stemmed phrase is a run of words of the stemmed text. Seen: it is among
    the training keyphrases. Kinds joined by "&", as in `present&unseen`, are intersected.

    Args:
        predictions: Per post the predicted keyphrases, best first; an empty list scores 0.
        references: Per post the gold keyphrases, at least one; the same posts in the same order.
        texts: Per post the text (with its OCR, if that counts as text), words separated by whitespace; for present and
            absent.
        train_keyphrases: The training set's keyphrases; for seen and unseen.
        ks: The cut-offs, each at least 1.
        convention: One of `CONVENTIONS`.
        subsets: The subsets to score; `None` for `all` and the single kinds that texts and training keyphrases allow.

    Returns:
        Per subset `posts`, the number averaged over, `phrases`, the number of gold phrases, and for every k `p@k`, `r@k`,
        `f1@k`, `map@k`, `ndcg@k` as fractions in [0, 1], `None` if a subset has no post. Convention `cmkp` adds
        `micro_f1@k`; `padded` and `unpadded` add `p@m`, `r@m`, `f1@m`, `f1@o`, `r_precision`.

    Raises:
        TypeError: If keyphrases or texts are not strings.
        ValueError: If numbers of posts differ; if a post has no gold keyphrase, or an empty one; if a cut-off is below 1; or
            if a subset needs an input that is not given.

    Example:
        >>> scores = score_keyphrases([["dogs", "cats"], ["sun"]], [["dog"], ["rain"]], ks=[1])
        >>> scores["all"]["posts"], scores["all"]["p@1"], scores["all"]["f1@1"]
        (2, 0.5, 0.5)
    """
    if subsets is None:
        allowed = {"all": True, "present": texts is not None, "seen": train_keyphrases is not None}
        subsets = [name for name in SUBSETS if allowed[{"absent": "present", "unseen": "seen"}.get(name, name)]]
    scorer = KeyphraseScorer(convention=convention, ks=ks, subsets=subsets, train_keyphrases=train_keyphrases)
    scorer.add_batch(predictions, references, texts)
    return scorer.compute()


class KeyphraseScorer:
    """Scores of posts that are added in batches; `score_keyphrases` defines them.

    Memory does not grow with the number of posts, except by about 100 bytes per post, subset and cut-off with `keep_posts`.

    Args:
        convention: One of `CONVENTIONS`.
        ks: The cut-offs, each at least 1.
        subsets: The subsets to score.
        train_keyphrases: The training set's keyphrases; for seen and unseen.
        keep_posts: Whether to keep the scores of every post for `post_scores`, as intervals and tests need them.

    Raises:
        TypeError: As in `score_keyphrases`.
        ValueError: As in `score_keyphrases`.

    Example:
        >>> scorer = KeyphraseScorer(ks=[1])
        >>> scorer.add_batch([["dogs", "cats"]], [["dog"]])
        >>> scorer.add_batch([["sun"]], [["rain"]])
        >>> scorer.compute()["all"]["f1@1"]
        0.5
    """

    def __init__(
        self,
        *,
        convention: str = "cmkp",
        ks: Sequence[int] = (1, 3, 5),
        subsets: Sequence[str] = ("all",),
        train_keyphrases: Iterable[str] | None = None,
        keep_posts: bool = False,
    ) -> None:
        if convention not in CONVENTIONS:
            raise ValueError(f"convention={convention!r} is not known: use one of {', '.join(CONVENTIONS)}")
        if isinstance(subsets, str):
            raise TypeError(f"subsets={subsets!r} is a string: give a list of subsets, {[subsets]!r}")
        self.convention = convention
        self.ks = checked_cuts(ks)
        self.subsets = {name: _kinds(name) for name in subsets}
        needed = set().union(*self.subsets.values())
        self._seen: frozenset[str] | None = None
        if train_keyphrases is not None:
            phrases = checked_strings("train_keyphrases", train_keyphrases)
            self._seen = frozenset(stem_phrase(normalise_phrase(phrase)) for phrase in phrases)
        elif wanting := needed & {"seen", "unseen"}:
            raise ValueError(f"the subset {min(wanting)!r} needs train_keyphrases, the training set's phrases: give them")
        self._needs_texts = min(needed & {"present", "absent"}, default=None)
        self._posts = 0
        self._totals: dict[str, _Totals] = {name: _Totals(0, {}) for name in self.subsets}
        self._kept: dict[str, list[PostScores]] | None = {name: [] for name in self.subsets} if keep_posts else None

    def add_batch(
        self, predictions: Iterable[Sequence[str]], references: Iterable[Sequence[str]], texts: Iterable[str] | None = None
    ) -> None:
        """Add posts: all of them, or none if one cannot be scored.

        Args:
            predictions: Per post the predicted keyphrases, best first.
            references: Per post the gold keyphrases, at least one.
            texts: Per post the text; needed if a subset is present or absent.

        Raises:
            TypeError: As in `score_keyphrases`.
            ValueError: As in `score_keyphrases`.
        """
        predicted = checked_phrase_lists("predictions", predictions)
        gold = checked_phrase_lists("references", references)
        text_list = None if texts is None else checked_strings("texts", texts)
        if self._needs_texts and text_list is None:
            raise ValueError(f"the subset {self._needs_texts!r} needs texts, one per post: give them")
        check_lengths(gold, predictions=predicted, texts=text_list)
        check_gold(gold)
        for start in range(0, len(gold), _POSTS_AT_A_TIME):
            part = slice(start, start + _POSTS_AT_A_TIME)
            self._add(predicted[part], gold[part], text_list[part] if text_list and self._needs_texts else None)

    def _add(self, predicted: list[list[str]], gold: list[list[str]], texts: list[str] | None) -> None:
        phrases = _PhraseNumbers()
        rows = len(gold)
        ranked = _Phrases(phrases.of(predicted), _owners(predicted), rows)
        golden = _Phrases(phrases.of(gold), _owners(gold), rows)
        stems = list(phrases.numbers)
        gold_listed = golden  # with repeats
        golden = golden.where(golden.is_first(len(stems)))
        first = ranked.is_first(len(stems))
        if self.convention != "aimkp":
            kept = first & ~_marked(stems, ranked.ids, self._is_dropped)
            ranked, first = ranked.where(kept), first[kept]
        hit = ranked.isin(golden, len(stems)) & first
        if self.convention == "aimkp":
            golden = gold_listed

        kinds: dict[str, tuple[_Array, _Array]] = {}
        if texts is not None:
            stemmed = [_stemmed_text(text) for text in texts]
            found = [_in_texts(stems, part, stemmed) for part in (golden, ranked)]
            kinds["present"] = (found[0], found[1])
            kinds["absent"] = (~found[0], ~found[1])
        if (seen := self._seen) is not None:
            known = [_marked(stems, part.ids, seen.__contains__) for part in (golden, ranked)]
            kinds["seen"] = (known[0], known[1])
            kinds["unseen"] = (~known[0], ~known[1])

        for name, conditions in self.subsets.items():
            in_gold, in_ranked = np.ones(len(golden.ids), bool), np.ones(len(ranked.ids), bool)
            for kind in conditions - {"all"}:
                in_gold, in_ranked = in_gold & kinds[kind][0], in_ranked & kinds[kind][1]
            gold_part, ranked_part = golden.where(in_gold), ranked.where(in_ranked)
            counts = gold_part.counts()
            distinct = gold_part.where(gold_part.is_first(len(stems))).counts() if self.convention == "aimkp" else counts
            columns = _post_columns(self.convention, self.ks, ranked_part, hit[in_ranked], counts, distinct)
            members = np.flatnonzero(counts)
            columns = {column: values[members] for column, values in columns.items()}
            self._totals[name].add(len(members), columns)
            if self._kept is not None:
                self._kept[name].append(PostScores(self.convention, members + self._posts, columns))
        self._posts += rows

    def totals(self) -> dict[str, Any]:
        """Return the sums over the posts added so far, small enough to be sent to another process's scorer."""
        return self._totals

    def add_totals(self, totals: Mapping[str, Any]) -> None:
        """Add the posts of another scorer with the same options.

        Args:
            totals: The other scorer's `totals()`.

        Raises:
            ValueError: If the other scorer has different options, or if this scorer keeps the scores of every post, which
                totals do not contain.
        """
        if self._kept is not None:
            raise ValueError("keep_posts=True: another scorer's totals do not contain the scores of its posts")
        if totals.keys() != self._totals.keys():
            raise ValueError(f"totals of the subsets {list(totals)} do not fit those of this scorer, {list(self.subsets)}")
        for name, total in totals.items():
            self._totals[name].merge(total)

    def _is_dropped(self, phrase: str) -> bool:
        if self.convention == "cmkp":
            return not _DROPPED_TOKENS.isdisjoint(phrase.split())
        return not phrase  # an empty phrase is no prediction here; in the two scripts it takes a rank

    def compute(self) -> Scores:
        """Return the scores of all posts added so far, as `score_keyphrases` does; more posts may be added afterwards."""
        return {name: total.scores(measures(self.convention, self.ks), self.convention) for name, total in self._totals.items()}

    def post_scores(self) -> dict[str, PostScores]:
        """Return the scores of every post, per subset.

        Raises:
            ValueError: If the scorer was created without `keep_posts=True`.
        """
        if self._kept is None:
            raise ValueError("the scores of single posts were not kept: create the scorer with keep_posts=True")
        names = _column_names(self.convention, self.ks)
        return {
            subset: PostScores(
                self.convention,
                np.concatenate([part.positions for part in parts] or [np.empty(0, np.int64)]),
                {name: np.concatenate([part.columns[name] for part in parts] or [np.empty(0)]) for name in names},
            )
            for subset, parts in self._kept.items()
        }


@dataclass(frozen=True)
class PostScores:
    """The scores of each post of a subset.

    Attributes:
        convention: The scoring convention.
        positions: The indices of the subset's posts among all posts scored, (posts,), ascending.
        columns: Name -> values, (posts,): `p@k`, `r@k`, `map@k`, `ndcg@k`, `phrases` (gold phrases), and depending on the
            convention `hits@k` and `predicted@k` (`cmkp`), or the posts' `f1@k`.
    """

    convention: str
    positions: _Array
    columns: Mapping[str, _Array]

    def score(self, measure: str) -> float | None:
        """Compute one measure over all posts, as `score_keyphrases` does.

        Args:
            measure: The measure, such as `f1@1`.

        Returns:
            The score, `None` without posts.

        Raises:
            ValueError: If the measure is not known.
        """
        inputs, combine = self.recipe(measure)
        if not len(self.positions):
            return None
        return float(combine(*(self.columns[name].mean() for name in inputs)))

    def recipe(self, measure: str) -> tuple[tuple[str, ...], Callable[..., Any]]:
        """Return how a measure is computed from the columns' means.

        Args:
            measure: The measure, such as `f1@1`.

        Returns:
            The names of the columns, and a function of their means, which also accepts arrays of means.

        Raises:
            ValueError: If the measure is not known.
        """
        name, _, cut = measure.partition("@")
        if self.convention == "cmkp" and name == "f1" and f"p@{cut}" in self.columns:
            return (f"p@{cut}", f"r@{cut}"), _harmonic_mean
        if self.convention == "cmkp" and name == "micro_f1" and f"p@{cut}" in self.columns:
            return (f"hits@{cut}", f"predicted@{cut}", "phrases"), _micro_f1
        if measure not in self.columns or name in ("phrases", "hits", "predicted"):
            raise ValueError(
                f"measure={measure!r} is not among the scores of convention {self.convention!r}: {', '.join(self.measures())}"
            )
        return (measure,), _itself

    def measures(self) -> list[str]:
        """Return the names of all measures."""
        cuts = (name.partition("@")[2] for name in self.columns if name.startswith("map@"))
        return measures(self.convention, [int(cut) for cut in cuts])


def measures(convention: str, ks: Sequence[int]) -> list[str]:
    """Return the names of a convention's measures, in the order of the results.

    Args:
        convention: One of `CONVENTIONS`.
        ks: The cut-offs.

    Example:
        >>> measures("cmkp", [1])
        ['p@1', 'r@1', 'f1@1', 'map@1', 'ndcg@1', 'micro_f1@1']
    """
    names = [f"{name}@{k}" for k in ks for name in ("p", "r", "f1", "map", "ndcg")]
    if convention == "cmkp":
        return names + [f"micro_f1@{k}" for k in ks]
    return names + (["p@m", "r@m", "f1@m", "f1@o", "r_precision"] if convention in ("padded", "unpadded") else [])


def _column_names(convention: str, ks: Sequence[int]) -> list[str]:
    if convention == "cmkp":
        return ["phrases", *(f"{name}@{k}" for k in ks for name in ("p", "r", "map", "ndcg", "hits", "predicted"))]
    return ["phrases", *measures(convention, ks)]


def _harmonic_mean(precision: Any, recall: Any) -> Any:
    return 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)


def _micro_f1(hits: Any, predicted: Any, phrases: Any) -> Any:
    return 2 * hits / (predicted + phrases)


def _itself(value: Any) -> Any:
    return value


@dataclass
class _Totals:
    posts: int
    sums: dict[str, float]

    def add(self, posts: int, columns: Mapping[str, _Array]) -> None:
        self.posts += posts
        for name, values in columns.items():
            # Added one after the other, as the scripts do, so that batches do not change the result in any digit.
            self.sums[name] = float(np.add.accumulate(np.concatenate([[self.sums.get(name, 0.0)], values]))[-1])

    def merge(self, other: _Totals) -> None:
        if self.sums and other.sums and self.sums.keys() != other.sums.keys():
            raise ValueError(
                "the totals are of another convention or of other cut-offs: create both scorers with the same options"
            )
        self.posts += other.posts
        for name, total in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + total

    def scores(self, wanted: Sequence[str], convention: str) -> dict[str, Any]:
        row: dict[str, Any] = {"posts": self.posts, "phrases": int(self.sums.get("phrases", 0))}
        if not self.posts:
            return row | dict.fromkeys(wanted)
        means = {name: np.float64(total / self.posts) for name, total in self.sums.items()}
        one = PostScores(convention, np.zeros(1), {name: mean.reshape(1) for name, mean in means.items()})
        return row | {name: one.score(name) for name in wanted}


class _Phrases(NamedTuple):
    """Phrases of several posts, concatenated: their numbers, and the indices (rows) of their posts, ascending."""

    ids: _Array
    row: _Array
    rows: int

    def where(self, mask: _Array) -> _Phrases:
        return _Phrases(self.ids[mask], self.row[mask], self.rows)

    def counts(self) -> _Array:
        return np.bincount(self.row, minlength=self.rows)

    def ranks(self) -> _Array:
        """The rank of each phrase in its post, from 0."""
        counts = self.counts()
        return np.arange(len(self.ids)) - (np.cumsum(counts) - counts)[self.row]

    def is_first(self, vocabulary: int) -> _Array:
        """The mask of phrases that do not repeat an earlier one of the same post."""
        mask = np.zeros(len(self.ids), bool)
        mask[np.unique(self.row * vocabulary + self.ids, return_index=True)[1]] = True
        return mask

    def isin(self, others: _Phrases, vocabulary: int) -> _Array:
        """The mask of phrases that are among the same post's phrases in `others`."""
        return np.isin(self.row * vocabulary + self.ids, others.row * vocabulary + others.ids)


def _post_columns(
    convention: str, ks: Sequence[int], ranked: _Phrases, hit: _Array, gold: _Array, distinct: _Array
) -> dict[str, _Array]:
    """Compute the scores of every post.

    Args:
        convention: One of `CONVENTIONS`.
        ks: The cut-offs.
        ranked: The predictions.
        hit: The mask of predictions that are hits, of repeats the first only.
        gold: The number of gold phrases, by which recall is divided, (rows,); posts without any score 0.
        distinct: The number of distinct gold phrases, which can be hit, (rows,).

    Returns:
        The columns of `PostScores`, (rows,).
    """
    rows = ranked.rows
    rank, listed = ranked.ranks(), ranked.counts()
    total_hits = _sums(ranked.row, hit, rows)
    so_far = np.cumsum(hit) - (np.cumsum(total_hits) - total_hits)[ranked.row]  # hits up to and including this rank
    precision_here = so_far / (rank + 1)
    gain = hit / np.log2(rank + 2)
    widest = int(max(distinct.max(initial=0), total_hits.max(initial=0)))
    ideal_gain = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(widest) + 2))])  # of the first 0, 1, 2, ... ranks

    columns: dict[str, _Array] = {"phrases": gold.astype(float)}
    for k in ks:
        within = rank < k
        row = ranked.row[within]
        hits = _sums(row, hit[within], rows)
        predicted = np.minimum(k, listed)
        precision = _ratio(hits, predicted if convention in ("cmkp", "unpadded") else k)
        recall = _ratio(hits, gold)
        columns[f"p@{k}"], columns[f"r@{k}"] = precision, recall
        if convention == "cmkp":
            columns[f"hits@{k}"], columns[f"predicted@{k}"] = hits, predicted.astype(float)
        else:
            columns[f"f1@{k}"] = _harmonic_mean(precision, recall)
        if convention == "aimkp":
            columns[f"map@{k}"] = _ratio(_sums(row, precision_here[within], rows), predicted)
        else:
            columns[f"map@{k}"] = _ratio(_sums(row, (precision_here * hit)[within], rows), gold)
        # In the 2020 script the ideal is the best order of the predictions, otherwise that of the gold phrases.
        best = ideal_gain[np.minimum(k, total_hits.astype(int) if convention == "cmkp" else distinct)]
        columns[f"ndcg@{k}"] = _ratio(_sums(row, gain[within], rows), best)
    if convention in ("padded", "unpadded"):
        columns["p@m"], columns["r@m"] = _ratio(total_hits, listed), _ratio(total_hits, gold)
        columns["f1@m"] = _harmonic_mean(columns["p@m"], columns["r@m"])
        within = rank < gold[ranked.row]
        hits = _sums(ranked.row[within], hit[within], rows)
        columns["r_precision"] = _ratio(hits, gold)
        precision = _ratio(hits, np.minimum(gold, listed) if convention == "unpadded" else gold)
        columns["f1@o"] = _harmonic_mean(precision, columns["r_precision"])
    return columns


def _sums(row: _Array, values: _Array, rows: int) -> _Array:
    return np.bincount(row, weights=values, minlength=rows)


def _ratio(numerator: _Array, denominator: Any) -> _Array:
    # Wherever the denominator is 0, the numerator is 0 too.
    return numerator / np.where(np.equal(denominator, 0), 1, denominator)


# --- phrases and their numbers ---


class _StemCache(dict[str, str]):
    """Word -> stem; bounded: emptied when it is full, and long words (degenerate outputs) are not kept."""

    def __missing__(self, word: str) -> str:
        stem = porter_stem(word)
        if len(word) <= 64:
            if len(self) >= 1 << 17:
                self.clear()
            self[word] = stem
        return stem


_stems = _StemCache()
_stem_word = _stems.__getitem__


def stem_phrase(phrase: str) -> str:
    """Stem every whitespace-separated word of a phrase or text, and join the stems by one space.

    The text is normalised to NFC first, and characters without width are stripped from both ends of every word.

    Args:
        phrase: The phrase or text.

    Example:
        >>> stem_phrase("Wildflower  Hours")
        'wildflow hour'
    """
    if phrase.isascii():
        return " ".join(map(_stem_word, phrase.split()))
    words = (word.strip(ZERO_WIDTH) for word in canonical_text(phrase).split())
    return " ".join(_stem_word(word) for word in words if word)


class _PhraseNumbers(dict[str, int]):
    """Phrase as written -> number, equal for phrases with equal stems; `numbers` maps stems to numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[str, int] = {}

    def __missing__(self, phrase: str) -> int:
        number = self[phrase] = self.numbers.setdefault(stem_phrase(normalise_phrase(phrase)), len(self.numbers))
        return number

    def of(self, lists: list[list[str]]) -> _Array:
        return np.fromiter(map(self.__getitem__, chain.from_iterable(lists)), np.int64)


def _owners(lists: list[list[str]]) -> _Array:
    return np.repeat(np.arange(len(lists)), np.fromiter(map(len, lists), np.int64, len(lists)))


def _marked(stems: list[str], ids: _Array, holds: Callable[[str], bool]) -> _Array:
    """The mask of phrases whose stems have a property."""
    return np.fromiter(map(holds, stems), bool, len(stems))[ids] if len(ids) else np.zeros(0, bool)


def _stemmed_text(text: str) -> str:
    return f" {stem_phrase(text)} "


def _in_texts(stems: list[str], phrases: _Phrases, texts: list[str]) -> _Array:
    # With spaces around text and phrase, a substring is a run of whole words. An empty phrase is in no text.
    runs = [f" {stem} " if stem else "\n" for stem in stems]
    pairs = zip(map(runs.__getitem__, phrases.ids.tolist()), map(texts.__getitem__, phrases.row.tolist()), strict=True)
    return np.fromiter((run in text for run, text in pairs), bool, len(phrases.ids))


# --- checks ---


def checked_cuts(ks: Sequence[int]) -> tuple[int, ...]:
    """Check the cut-offs and remove repeats.

    Args:
        ks: The cut-offs.

    Returns:
        The cut-offs, in their order.

    Raises:
        TypeError: If they are not a list.
        ValueError: If one is not an integer of at least 1.
    """
    if isinstance(ks, (int, str)) or not isinstance(ks, Iterable):
        raise TypeError(f"ks={ks!r} must be a list of cut-offs, such as [1, 3, 5]")
    for k in ks:
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k:
            raise ValueError(f"ks={list(ks)!r}: every cut-off must be an integer of at least 1")
    return tuple(dict.fromkeys(map(int, ks)))


def _kinds(subset: str) -> frozenset[str]:
    kinds = frozenset(subset.split("&")) if isinstance(subset, str) else frozenset()
    if not kinds or not kinds <= set(SUBSETS):
        raise ValueError(
            f"subsets: {subset!r} is not known: use {', '.join(SUBSETS)}, or intersections such as 'present&unseen'"
        )
    for pair in _OPPOSITES:
        if pair <= kinds:
            raise ValueError(f"subsets: {subset!r} is empty, no phrase is both {' and '.join(sorted(pair))}")
    return kinds


def check_lengths(gold: list[list[str]], **others: Sequence[Any] | None) -> None:
    """Check that lists have one entry per post.

    Args:
        gold: The posts' gold keyphrases.
        **others: Name -> list, or `None` if it is not given.

    Raises:
        ValueError: If a list has another length; the error names it.
    """
    for name, rows in others.items():
        if rows is not None and len(rows) != len(gold):
            raise ValueError(f"{name} has {len(rows)} posts and references has {len(gold)}: give one entry per post")


def check_gold(gold: list[list[str]]) -> None:
    """Check that every post has gold keyphrases, and none of them is empty.

    Args:
        gold: The posts' gold keyphrases.

    Raises:
        ValueError: If a post has none, or an empty one; the error names the first such post.
    """
    for index, phrases in enumerate(gold):
        if not phrases or not all(map(normalise_phrase, phrases)):
            raise ValueError(
                f"references[{index}]={phrases!r:.200} must contain at least one keyphrase and no empty one: "
                "remove posts without gold keyphrases"
            )


def checked_phrase_lists(name: str, rows: Iterable[Sequence[str]]) -> list[list[str]]:
    """Check that an argument is a list of lists of strings.

    Args:
        name: The argument's name, for errors.
        rows: The argument.

    Returns:
        The lists.

    Raises:
        TypeError: If the argument or an entry has another type; the error names it.
    """
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
        raise TypeError(f"{name} must be a list with a list of keyphrases per post, got {type(rows).__name__}")
    listed: list[Any] = list(rows)
    # Two fast passes in C, which almost always succeed; otherwise a slow one, which finds the wrong entry.
    if set(map(type, listed)) <= {list} and set(map(type, chain.from_iterable(listed))) <= {str}:
        return listed
    return [_checked_row(name, index, row) for index, row in enumerate(listed)]


def _checked_row(name: str, index: int, row: Any) -> list[str]:
    if isinstance(row, str):
        raise TypeError(f"{name}[{index}]={row!r:.80} is a string: give a list of keyphrases, {[row]!r:.80}")
    return checked_strings(f"{name}[{index}]", row)


def checked_strings(name: str, values: Iterable[str]) -> list[str]:
    """Check that an argument is a list of strings.

    Args:
        name: The argument's name, for errors.
        values: The argument.

    Returns:
        The list.

    Raises:
        TypeError: If the argument or an entry has another type; the error names it.
    """
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list of strings, got {type(values).__name__}: {values!r:.80}")
    listed = list(values)
    for index, value in enumerate(listed):
        if not isinstance(value, str):
            raise TypeError(f"{name}[{index}] must be a string, got {type(value).__name__}: {value!r:.80}")
    return listed
