"""Systems scored and compared: prediction files and posts in, one report out.

Given   prediction rows of one system or several, the posts, and the training keyphrases if there are any.
Gives   per system the scores per subset with confidence intervals and what its outputs are like, the differences to the
        first system with tests, and tables of them.
Holds   predictions and posts are matched by id, never by position; missing, repeated and unknown ids are errors that list
        them; several decodes of a post are scored one by one, and a system's scores are the means over its decodes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dynkp.files.json_lines import write_json_lines
from dynkp.mmkp_f1.evaluation import allowed_subsets
from dynkp.mmkp_f1.outputs import list_statistics
from dynkp.mmkp_f1.scoring import KeyphraseScorer, PostScores
from dynkp.mmkp_f1.significance import bootstrap_intervals, paired_bootstrap, paired_permutation
from dynkp.prediction.prediction_files import listed, match_predictions
from dynkp.report.tables import percent

# p-value below -> mark.
MARKS = ((0.01, "‡"), (0.05, "†"))


class GoldPost(NamedTuple):
    """What of a post is needed to score a prediction."""

    id: str
    keyphrases: list[str]
    text: str


def gold_posts(posts: Iterable[Mapping[str, Any]]) -> list[GoldPost]:
    """Take from posts what scoring needs.

    Args:
        posts: rows with `id`, `keyphrases` and, if need be, `text`.

    Raises:
        ValueError: listing the posts that have no keyphrases, a blank one, or an id that others have.
    """
    gold = [GoldPost(str(row["id"]), list(row["keyphrases"] or []), row.get("text") or "") for row in posts]
    if not gold:
        raise ValueError("there are no posts to score")
    if repeated := [post_id for post_id, count in Counter(post.id for post in gold).items() if count > 1]:
        raise ValueError(f"ids that several posts have: {listed(repeated)}")
    if bare := [post.id for post in gold if not any(phrase.strip() for phrase in post.keyphrases)]:
        raise ValueError(f"posts without keyphrases, which cannot be scored: {listed(bare)}. Leave them out")
    if blank := [post.id for post in gold if not all(phrase.strip() for phrase in post.keyphrases)]:
        raise ValueError(f"posts with a blank keyphrase: {listed(blank)}. Leave the blank ones out")
    return gold


class Evaluation:
    """Systems scored on the same posts.

    Args:
        gold: the posts.
        train_keyphrases: what makes a keyphrase seen; None for none.
        convention: `cmkp`, `aimkp`, `padded` or `unpadded`.
        ks: the cut-offs.
        subsets: those wanted; None is `all`, `present`, `absent` and, with training keyphrases, `seen` and `unseen`.
        confidence: of the intervals.
        resamples: of intervals and tests; 0 leaves both out.
        seed: of both.
        semantic_model: a sentence-transformers model for semantic scores; None for none.

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
            raise ValueError(f"resamples={resamples!r} must be 0, for no intervals and tests, or more")
        self.gold = gold
        self.train_keyphrases = None if train_keyphrases is None else list(train_keyphrases)
        self.convention = convention
        self.ks = tuple(ks)
        self.subsets = list(subsets) if subsets else allowed_subsets(True, self.train_keyphrases is not None)
        self.confidence, self.resamples, self.seed = confidence, resamples, seed
        self.semantic_model = semantic_model
        self.systems: dict[str, dict[str, Any]] = {}
        self.post_scores: dict[str, dict[str, PostScores]] = {}
        self._scorer()  # refuses what cannot be computed before files are read

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
            name: how the report calls it.
            rows: its predictions: `id`, `keyphrases`, and of `reasoned`, `output_words`, `output_tokens`, `raw` what there is.
            allow_missing: as in `match_predictions`.

        Raises:
            ValueError: as in `match_predictions`, or if another system has the name.
        """
        if name in self.systems:
            raise ValueError(f"two systems are called {name!r}: give them names of their own")
        decodes, missing = match_predictions(rows, self.gold, allow_missing=allow_missing)
        scores, kept, semantic = [], [], []
        for matched in decodes:
            scorer = self._scorer()
            lists = [list(row["keyphrases"]) for row in matched]
            golden = [post.keyphrases for post in self.gold]
            scorer.add_batch(lists, golden, [post.text for post in self.gold])
            scores.append(scorer.compute())
            kept.append(scorer.post_scores())
            if self.semantic_model is not None:
                from dynkp.mmkp_f1.semantic import semantic_scores

                semantic.append(semantic_scores(lists, golden, self.semantic_model, ks=self.ks))
        self.post_scores[name] = {subset: _mean_post_scores([one[subset] for one in kept]) for subset in self.subsets}
        every = [row for matched in decodes for row in matched]
        seen = {row.get("modality", "both") for row in every if row["keyphrases"] or "modality" in row} or {"both"}
        if len(seen) > 1:
            raise ValueError(
                f"system {name!r} has predictions from {' and '.join(map(repr, sorted(seen)))} (column modality), which are "
                "different systems: give them files of their own"
            )
        system: dict[str, Any] = {
            "posts": len(self.gold),
            "missing": missing,
            "decodes": len(decodes),
            "modality": seen.pop(),
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

    def _intervals(self, scores: PostScores) -> dict[str, list[float] | None]:
        if not len(scores.positions):
            return dict.fromkeys(scores.measures())
        found = bootstrap_intervals(scores, confidence=self.confidence, resamples=self.resamples, seed=self.seed)
        return {measure: [interval.low, interval.high] for measure, interval in found.items()}

    def report(self) -> dict[str, Any]:
        """Everything as JSON values.

        Returns:
            With one system `convention` and its figures: `subsets` -> `all` -> `posts`, `phrases`, `p@1`, ..., then
            `intervals` and what its outputs are like. With several `convention`, `systems` (name -> the same), and
            `comparisons`: every other system's differences to the first one.
        """
        if len(self.systems) == 1:
            return {"convention": self.convention, **next(iter(self.systems.values()))}
        return {"convention": self.convention, "systems": self.systems, "comparisons": self.comparisons()}

    def shown_measures(self) -> list[str]:
        """The measures of the tables' columns."""
        names = [f"f1@{k}" for k in self.ks]
        if self.convention in ("padded", "unpadded"):
            names += ["f1@m", "f1@o"]
        return [*names, f"map@{max(self.ks)}", f"ndcg@{max(self.ks)}"]

    def comparisons(self) -> list[dict[str, Any]]:
        """Each system against the first: every shown measure on the first subset, F1 at the first cut-off on the others."""
        if not self.resamples or len(self.systems) < 2:
            return []
        if not hasattr(self, "_comparisons"):
            first, *others = self.systems
            lead = self.subsets[0]
            pairs = [(lead, measure) for measure in self.shown_measures()]
            pairs += [(subset, f"f1@{self.ks[0]}") for subset in self.subsets if subset != lead]
            self._comparisons = [self._comparison(first, other, *pair) for other in others for pair in pairs]
        return [row for row in self._comparisons if row]

    def _comparison(self, first: str, other: str, subset: str, measure: str) -> dict[str, Any]:
        one, two = self.post_scores[first][subset], self.post_scores[other][subset]
        if not len(one.positions):
            return {}
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
        """Write every post's scores as JSONL: `id`, `system`, `scores` (subset -> measure -> value, for the subsets the
        post belongs to). Several decodes are averaged. By convention `cmkp`, F1 is no score of a post."""
        places = {
            name: {
                subset: {int(position): row for row, position in enumerate(scores.positions)}
                for subset, scores in subsets.items()
            }
            for name, subsets in self.post_scores.items()
        }

        def rows() -> Iterator[dict[str, Any]]:
            for index, post in enumerate(self.gold):
                for name, subsets in self.post_scores.items():
                    scores = {
                        subset: {column: float(values[place]) for column, values in one.columns.items()}
                        for subset, one in subsets.items()
                        if (place := places[name][subset].get(index)) is not None
                    }
                    yield {"id": post.id, "system": name, "scores": scores}

        write_json_lines(path, rows())

    # --- tables ---

    def tables(self) -> list[list[list[str]]]:
        """Rows of cells, the first row the heads, in percent: one table of one system's subsets; of several systems one
        of their measures on the first subset and one of their F1 on all subsets, with marks; and, of systems that saw
        different modalities of the posts, one of their measures by modality."""
        tables = [self._one_system()] if len(self.systems) == 1 else [self._measures_table(), self._subsets_table()]
        by_modality = len({system["modality"] for system in self.systems.values()}) > 1
        return [*tables, self.modality_table()] if by_modality else tables

    def modality_table(self) -> list[list[str]]:
        """Rows of cells: the systems grouped by what they saw of the posts, as Table 1 of AimKP (AAAI 2026) has them."""
        lead = self.subsets[0]
        measures = [*(f"f1@{k}" for k in self.ks), f"map@{max(self.ks)}"]
        rows = [["posts", "system", *map(_head, measures)]]
        for modality, head in (("image", "image only"), ("text", "text only"), ("both", "text and image")):
            for name, system in self.systems.items():
                if system["modality"] == modality:
                    rows.append([head, name, *(percent(system["subsets"][lead][measure]) for measure in measures)])
        return rows

    def _one_system(self) -> list[list[str]]:
        name, system = next(iter(self.systems.items()))
        k = self.ks[0]
        measures = [f"p@{k}", f"r@{k}", *self.shown_measures()]
        rows = [["subset", "posts", "phrases", *map(_head, measures)]]
        for subset, scores in system["subsets"].items():
            cells = [percent(scores[measure]) for measure in measures]
            bounds = system.get("intervals", {}).get("subsets", {}).get(subset, {}).get(f"f1@{k}")
            if bounds:
                cells[measures.index(f"f1@{k}")] += f" [{percent(bounds[0])}, {percent(bounds[1])}]"
            rows.append([subset, f"{scores['posts']:,}", f"{scores['phrases']:,}", *cells])
        return rows

    def _measures_table(self) -> list[list[str]]:
        lead = self.subsets[0]
        measures = self.shown_measures()
        rows = [["system", *(f"{_head(measure)} {lead}" for measure in measures), "reasoning", "output words", "no keyphrase"]]
        for name, system in self.systems.items():
            scores = [percent(system["subsets"][lead][measure]) + self._mark(name, lead, measure) for measure in measures]
            words = "-" if system.get("output_words") is None else f"{system['output_words']:.2f}"
            rows.append([name, *scores, percent(system.get("reasoning_share")), words, percent(system["empty_share"])])
        return rows

    def _subsets_table(self) -> list[list[str]]:
        measure = f"f1@{self.ks[0]}"
        counts = next(iter(self.systems.values()))["subsets"]
        rows = [["system", *(f"{_head(measure)} {subset} ({counts[subset]['posts']:,} posts)" for subset in self.subsets)]]
        for name, system in self.systems.items():
            rows.append([name, *(percent(system["subsets"][s][measure]) + self._mark(name, s, measure) for s in self.subsets)])
        return rows

    def _mark(self, name: str, subset: str, measure: str) -> str:
        for row in self.comparisons():
            if (row["second"], row["subset"], row["measure"]) == (name, subset, measure):
                return next((mark for limit, mark in MARKS if row["permutation_p"] < limit), "")
        return ""

    def caption(self) -> str:
        """What must be said beside the tables."""
        parts = [f"Percent, convention {self.convention}, {len(self.gold):,} posts."]
        for name, system in self.systems.items():
            who = f"{name}: " if len(self.systems) > 1 else ""
            if system["missing"]:
                parts.append(f"{who}{system['missing']:,} missing predictions are scored as empty.")
            if system["decodes"] > 1:
                parts.append(f"{who}Means over {system['decodes']} decodes.")
        if len(self.systems) == 1:
            (system,) = self.systems.values()
            if self.resamples:
                parts.append(f"In brackets {self.confidence:.0%} bootstrap intervals.")
            stated = [
                f"{percent(system[name])} % {text}"
                for name, text in (
                    ("reasoning_share", "reasoned"),
                    ("empty_share", "without keyphrase"),
                    ("unparsable_share", "unparsable"),
                    ("repeat_share", "of keyphrases repeated"),
                )
                if system.get(name) is not None
            ]
            stated += [
                f"{system[name]:.2f} {text}"
                for name, text in (
                    ("keyphrases_per_post", "keyphrases"),
                    ("output_words", "words"),
                    ("output_tokens", "tokens per output"),
                )
                if system.get(name) is not None
            ]
            parts.append(f"{'; '.join(stated)}.")
        elif self.resamples:
            parts.append(
                f"† p < 0.05, ‡ p < 0.01: different from {next(iter(self.systems))!r}, paired permutation test over posts, "
                "each comparison by itself (not corrected for their number)."
            )
        return " ".join(parts)


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


def output_means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means of the columns that all rows have (rows filled in for missing ones aside)."""
    given = [row for row in rows if len(row) > 2]
    statistics = {}
    for column, name in (
        ("reasoned", "reasoning_share"),
        ("output_words", "output_words"),
        ("output_tokens", "output_tokens"),
    ):
        if given and all(isinstance(row.get(column), int | float) for row in given):
            statistics[name] = sum(row[column] for row in given) / len(given)
    if given and all(isinstance(row.get("raw"), str) for row in given):
        unparsable = sum(bool(row["raw"].strip()) and not row["keyphrases"] for row in given)
        statistics["unparsable_share"] = unparsable / len(given)
    return statistics


def _head(measure: str) -> str:
    name, at, cut = measure.partition("@")
    return f"{name.upper()}{at}{cut.upper()}"
