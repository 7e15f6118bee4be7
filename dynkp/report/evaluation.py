"""Evaluation of keyphrase predictions: systems scored on the same posts and compared.

Given   prediction rows of one system or several, the posts, and the training keyphrases if there are any.
Gives   per system the scores of each subset with confidence intervals and the statistics of its outputs; the differences to
        the first system, with tests; tables of both.
Holds   predictions and posts are matched by id, never by position; missing, repeated and unknown ids are errors that list
        them; several decodes of a post are scored separately, and a system's scores are the means over its decodes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dynkp.files.json_lines import write_json_lines
from dynkp.mmkp_f1.answers import normalise_phrase
from dynkp.mmkp_f1.evaluation import allowed_subsets
from dynkp.mmkp_f1.outputs import list_statistics
from dynkp.mmkp_f1.scoring import KeyphraseScorer, PostScores
from dynkp.mmkp_f1.significance import bootstrap_intervals, paired_bootstrap, paired_permutation
from dynkp.prediction.prediction_files import listed, match_predictions
from dynkp.report import evaluation_tables


class GoldPost(NamedTuple):
    """The columns of a post that scoring needs.

    Attributes:
        id: The post's id.
        keyphrases: Its gold keyphrases, at least one.
        text: Its text; decides which keyphrases are present.
    """

    id: str
    keyphrases: list[str]
    text: str


def gold_posts(posts: Iterable[Mapping[str, Any]]) -> list[GoldPost]:
    """Extract from posts what scoring needs.

    Args:
        posts: Rows with `id`, `keyphrases` and, if the subsets present and absent are scored, `text`.

    Returns:
        The posts, in their order.

    Raises:
        ValueError: If there are no posts; if posts have no keyphrases, or an empty one; or if posts share an id. The error
            lists the posts' ids.

    Example:
        >>> gold_posts([{"id": 7, "keyphrases": ["dog"], "text": "my dog"}])
        [GoldPost(id='7', keyphrases=['dog'], text='my dog')]
    """
    gold = [GoldPost(str(row["id"]), list(row["keyphrases"] or []), row.get("text") or "") for row in posts]
    check_ids(post.id for post in gold)
    if without := [post.id for post in gold if not any(normalise_phrase(phrase) for phrase in post.keyphrases)]:
        raise ValueError(f"posts without keyphrases, which cannot be scored: {listed(without)}. Remove these posts")
    if partly := [post.id for post in gold if not all(normalise_phrase(phrase) for phrase in post.keyphrases)]:
        raise ValueError(f"posts with an empty keyphrase: {listed(partly)}. Remove the empty keyphrases")
    return gold


def check_ids(ids: Iterable[str]) -> None:
    """Check that there are posts, and that no two share an id.

    Args:
        ids: The posts' ids.

    Raises:
        ValueError: If there is no id, or if posts share one; the error lists these ids.

    Example:
        >>> check_ids(["a", "b", "a"])
        Traceback (most recent call last):
        ...
        ValueError: several posts have the same id: 'a'
    """
    counts = Counter(ids)
    if not counts:
        raise ValueError("there are no posts to score")
    if repeated := [post_id for post_id, count in counts.items() if count > 1]:
        raise ValueError(f"several posts have the same id: {listed(repeated)}")


class Evaluation:
    """Systems scored on the same posts.

    Args:
        gold: The posts.
        train_keyphrases: The training set's keyphrases, which decide what is seen; None if there are none.
        convention: The scoring convention: `cmkp`, `aimkp`, `padded` or `unpadded`.
        ks: The cut-offs.
        subsets: The subsets to score; None for `all`, `present`, `absent` and, with training keyphrases, `seen` and `unseen`.
            The first one is compared by all measures, the others by F1 at the first cut-off.
        confidence: The confidence of the intervals, between 0 and 1.
        resamples: The number of resamples of intervals and tests; 0 computes neither.
        seed: The seed of both.
        semantic_model: A sentence-transformers model for semantic scores; None for none.

    Attributes:
        systems: Name -> the system's figures, in the order in which they were added.
        post_scores: Name -> subset -> the scores of each post.

    Raises:
        ValueError: If an argument is out of range, or a subset needs what is not given.

    Example:
        >>> evaluation = Evaluation(gold_posts([{"id": "1", "keyphrases": ["dog"], "text": "my dog"}]))
        >>> evaluation.add("mine", [{"id": "1", "keyphrases": ["dogs"]}])
        >>> evaluation.report()["subsets"]["all"]["f1@1"]
        1.0
    """

    def __init__(
        self,
        gold: Sequence[GoldPost],
        *,
        train_keyphrases: Iterable[str] | None = None,
        convention: str = "cmkp",
        ks: Sequence[int] = (1, 3, 5),
        subsets: Sequence[str] | None = None,
        confidence: float = 0.95,
        resamples: int = 10_000,
        seed: int = 0,
        semantic_model: Any = None,
    ):
        if not 0 < confidence < 1:
            raise ValueError(f"confidence={confidence!r} must be between 0 and 1, such as 0.95")
        if resamples < 0:
            raise ValueError(f"resamples={resamples!r} must be 0, for neither intervals nor tests, or more")
        self.gold = gold
        self.train_keyphrases = None if train_keyphrases is None else list(train_keyphrases)
        self.convention = convention
        self.ks = tuple(ks)
        self.subsets = list(subsets) if subsets else allowed_subsets(True, self.train_keyphrases is not None)
        self.confidence, self.resamples, self.seed = confidence, resamples, seed
        self.semantic_model = semantic_model
        self.systems: dict[str, dict[str, Any]] = {}
        self.post_scores: dict[str, dict[str, PostScores]] = {}
        self._comparisons: list[dict[str, Any]] | None = None
        self._scorer()  # raises what it raises before any file is read

    def _scorer(self) -> KeyphraseScorer:
        return KeyphraseScorer(
            convention=self.convention,
            ks=self.ks,
            subsets=self.subsets,
            train_keyphrases=self.train_keyphrases,
            keep_posts=True,
        )

    def add(self, name: str, rows: Iterable[Mapping[str, Any]], *, allow_missing: bool = False) -> None:
        """Score a system.

        Args:
            name: The system's name in the report.
            rows: Its predictions: `id`, `keyphrases` and, optionally, `reasoned`, `output_words`, `output_tokens`, `raw`,
                `modality` and `decode`.
            allow_missing: Whether a post without a prediction is scored as an empty prediction.

        Raises:
            ValueError: If another system has the name; if the predictions' ids and the posts' do not match; or if predictions
                were made from different modalities.
        """
        if name in self.systems:
            raise ValueError(f"two systems are called {name!r}: give each system its own name")
        decodes, missing = match_predictions(rows, self.gold, allow_missing=allow_missing)
        every = [row for matched in decodes for row in matched]
        modality = _modality(name, every)
        gold, texts = [post.keyphrases for post in self.gold], [post.text for post in self.gold]
        scores, kept, semantic = [], [], []
        for matched in decodes:
            scorer = self._scorer()
            lists = [list(row["keyphrases"]) for row in matched]
            scorer.add_batch(lists, gold, texts)
            scores.append(scorer.compute())
            kept.append(scorer.post_scores())
            if self.semantic_model is not None:
                from dynkp.mmkp_f1.semantic import semantic_scores

                semantic.append(semantic_scores(lists, gold, self.semantic_model, ks=self.ks))
        self.post_scores[name] = {subset: _mean_post_scores([one[subset] for one in kept]) for subset in self.subsets}
        system: dict[str, Any] = {
            "posts": len(self.gold),
            "missing": missing,
            "decodes": len(decodes),
            "modality": modality,
            "subsets": {subset: _mean_scores([one[subset] for one in scores]) for subset in self.subsets},
            **list_statistics([list(row["keyphrases"]) for row in every]),
            **output_means(every),
        }
        if semantic:
            system |= _mean_scores(semantic)
        if len(decodes) > 1:
            system["subsets_of_decodes"] = scores
        if self.resamples:
            system["intervals"] = {
                "confidence": self.confidence,
                "resamples": self.resamples,
                "seed": self.seed,
                "subsets": {subset: self._intervals(one) for subset, one in self.post_scores[name].items()},
            }
        self.systems[name] = system
        self._comparisons = None

    def _intervals(self, scores: PostScores) -> dict[str, list[float] | None]:
        if not len(scores.positions):
            return dict.fromkeys(scores.measures())
        intervals = bootstrap_intervals(scores, confidence=self.confidence, resamples=self.resamples, seed=self.seed)
        return {measure: [interval.low, interval.high] for measure, interval in intervals.items()}

    def report(self) -> dict[str, Any]:
        """Return all figures as JSON values.

        Returns:
            With one system `convention` and its figures: `subsets` -> `all` -> `posts`, `phrases`, `p@1`, ..., then
            `intervals` and the statistics of its outputs. With several systems `convention`, `systems` (name -> the same),
            and `comparisons`: the difference of every other system to the first one.
        """
        if len(self.systems) == 1:
            return {"convention": self.convention, **next(iter(self.systems.values()))}
        return {"convention": self.convention, "systems": self.systems, "comparisons": self.comparisons()}

    def shown_measures(self) -> list[str]:
        """Return the measures that the tables show."""
        names = [f"f1@{k}" for k in self.ks]
        if self.convention in ("padded", "unpadded"):
            names += ["f1@m", "f1@o"]
        return [*names, f"map@{max(self.ks)}", f"ndcg@{max(self.ks)}"]

    def comparisons(self) -> list[dict[str, Any]]:
        """Compare each system with the first: by every shown measure on the first subset, by F1 at the first cut-off on others.

        Returns:
            One row per comparison with `first`, `second`, `subset`, `measure`, `difference` (second less first), the bounds
            `low` and `high` of its interval, `bootstrap_p` and `permutation_p`; none with a single system or `resamples=0`.
        """
        if not self.resamples or len(self.systems) < 2:
            return []
        if self._comparisons is None:
            first, *others = self.systems
            lead, *more = self.subsets
            pairs = [(lead, measure) for measure in self.shown_measures()]
            pairs += [(subset, f"f1@{self.ks[0]}") for subset in more]
            compared = [pair for pair in pairs if len(self.post_scores[first][pair[0]].positions)]
            self._comparisons = [self._comparison(first, other, *pair) for other in others for pair in compared]
        return self._comparisons

    def _comparison(self, first: str, other: str, subset: str, measure: str) -> dict[str, Any]:
        one, two = self.post_scores[first][subset], self.post_scores[other][subset]
        options = {"seed": self.seed}
        boot = paired_bootstrap(one, two, measure, confidence=self.confidence, resamples=self.resamples, **options)
        permutation = paired_permutation(one, two, measure, permutations=self.resamples, **options)
        return {
            "first": first,
            "second": other,
            "subset": subset,
            "measure": measure,
            "difference": boot.difference,
            "low": boot.low,
            "high": boot.high,
            "bootstrap_p": boot.p_value,
            "permutation_p": permutation.p_value,
        }

    def write_posts(self, path: str | os.PathLike[str]) -> None:
        """Write the scores of every post as JSON Lines.

        A row has `id`, `system` and `scores`: subset -> measure -> value, for the subsets that the post belongs to. Several
        decodes are averaged. By convention `cmkp`, F1 is not defined for a single post.

        Args:
            path: The file; missing folders are created.
        """
        # Of each post that belongs to a subset, the index among the subset's scores.
        indices = {
            name: {
                subset: {int(position): index for index, position in enumerate(scores.positions)}
                for subset, scores in subsets.items()
            }
            for name, subsets in self.post_scores.items()
        }

        def rows() -> Iterator[dict[str, Any]]:
            for position, post in enumerate(self.gold):
                for name, subsets in self.post_scores.items():
                    scores = {
                        subset: {column: float(values[index]) for column, values in one.columns.items()}
                        for subset, one in subsets.items()
                        if (index := indices[name][subset].get(position)) is not None
                    }
                    yield {"id": post.id, "system": name, "scores": scores}

        write_json_lines(path, rows())

    def tables(self) -> list[list[list[str]]]:
        """Return the tables, each as rows of cells with the column heads first, in percent.

        Returns:
            For one system, a table of its subsets. For several, a table of their measures on the first subset and one of
            their F1 on all subsets, with marks of significant differences; and, for systems that were given different
            modalities of the posts, a table of their measures by modality.
        """
        systems, k = self.systems, self.ks[0]
        if len(systems) == 1:
            (system,) = systems.values()
            return [evaluation_tables.single_system_table(system, k, self.shown_measures())]
        tables = [
            evaluation_tables.measures_table(systems, self.subsets[0], self.shown_measures(), self._mark),
            evaluation_tables.subsets_table(systems, self.subsets, f"f1@{k}", self._mark),
        ]
        by_modality = len({system["modality"] for system in systems.values()}) > 1
        return [*tables, self.modality_table()] if by_modality else tables

    def modality_table(self) -> list[list[str]]:
        """Return the table of systems by the modality of their inputs, as in Table 1 of AimKP (AAAI 2026)."""
        measures = [*(f"f1@{k}" for k in self.ks), f"map@{max(self.ks)}"]
        return evaluation_tables.modality_table(self.systems, self.subsets[0], measures)

    def caption(self) -> str:
        """Return what must be stated beside the tables."""
        confidence = self.confidence if self.resamples else None
        return evaluation_tables.caption(self.systems, convention=self.convention, posts=len(self.gold), confidence=confidence)

    def _mark(self, name: str, subset: str, measure: str) -> str:
        for row in self.comparisons():
            if (row["second"], row["subset"], row["measure"]) == (name, subset, measure):
                return evaluation_tables.significance_mark(row["permutation_p"])
        return ""


def output_means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compute the means of the output columns that all rows have.

    Args:
        rows: Prediction rows; those filled in for missing predictions, with `id` and `keyphrases` only, are ignored.

    Returns:
        `reasoning_share`, `output_words` and `output_tokens` from the columns `reasoned`, `output_words` and `output_tokens`;
        and, from `raw`, `unparsable_share`, the share of outputs with text but no keyphrase.

    Example:
        >>> output_means([{"id": "1", "keyphrases": [], "raw": "<think>"}, {"id": "2", "keyphrases": ["a"], "raw": "a"}])
        {'unparsable_share': 0.5}
    """
    given = [row for row in rows if len(row) > 2]
    if not given:
        return {}
    means = {}
    names = {"reasoned": "reasoning_share", "output_words": "output_words", "output_tokens": "output_tokens"}
    for column, name in names.items():
        if all(isinstance(row.get(column), int | float) for row in given):
            means[name] = sum(row[column] for row in given) / len(given)
    if all(isinstance(row.get("raw"), str) for row in given):
        means["unparsable_share"] = sum(bool(row["raw"].strip()) and not row["keyphrases"] for row in given) / len(given)
    return means


def _modality(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The part of the posts from which a system's predictions were made."""
    found = {row.get("modality", "both") for row in rows if row["keyphrases"] or "modality" in row} or {"both"}
    if len(found) > 1:
        raise ValueError(
            f"system {name!r} has predictions from {' and '.join(map(repr, sorted(found)))} (column modality), which are "
            "different systems: put them into separate files"
        )
    return found.pop()


def _mean_scores(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The means of several decodes' scores; counts are the same in all."""
    if len(scores) == 1:
        return dict(scores[0])
    means: dict[str, Any] = {}
    for name, value in scores[0].items():
        values = [one[name] for one in scores]
        means[name] = value if value is None or name in ("posts", "phrases") else float(np.mean(values))
    return means


def _mean_post_scores(scores: Sequence[PostScores]) -> PostScores:
    first = scores[0]
    columns = {name: np.mean([one.columns[name] for one in scores], axis=0) for name in first.columns}
    return PostScores(first.convention, first.positions, columns)
