"""Systems scored on sentiment: predictions, and chains if there are any, in, one report out.

Given   prediction rows of the label prompt (`id`, `prediction`) of one system or several, rows of the chain prompt (`id`,
        `raw`), and the posts with their labels and rationales.
Gives   accuracy, macro F1 and weighted F1 (scikit-learn), the scores of chains beside their floor, tables, and every post's.
Holds   rows and posts are matched by id, as in `dynkp.report.evaluation`; a prediction that could not be read is wrong, and
        counted; classification is scored from the label prompt alone.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dynkp.data.reasoning_tasks import SENTIMENTS, ReasoningTask, resolve_reasoning_task
from dynkp.files.json_lines import write_json_lines
from dynkp.prediction.prediction_files import listed, match_predictions
from dynkp.report.chains import CHAIN_SCORES, METEOR_NEEDS, EmbeddedOnce, chain_scores, floor_partners, mean_scores
from dynkp.report.tables import percent

# What scikit-learn is told of an output that predicts nothing: none of the labels.
_UNREAD = "(unread)"
_HEADS = {"bleu_4": "BLEU-4", "rouge_l": "ROUGE-L", "meteor": "METEOR", "distinct_1": "Distinct-1", "distinct_2": "Distinct-2"}


class LabelledPost(NamedTuple):
    """What of a post is needed to score its predictions."""

    id: str
    label: str
    rationale: str | None
    text: str


def labelled_posts(posts: Iterable[Mapping[str, Any]], labels: Sequence[str] = SENTIMENTS) -> list[LabelledPost]:
    """Take from posts what scoring needs.

    Raises:
        ValueError: listing the posts without a label of the task's, or with an id that others have.
    """
    gold = [LabelledPost(str(row["id"]), row.get("label") or "", row.get("rationale"), row.get("text") or "") for row in posts]
    if not gold:
        raise ValueError("there are no posts to score")
    if repeated := [post_id for post_id, count in Counter(post.id for post in gold).items() if count > 1]:
        raise ValueError(f"ids that several posts have: {listed(repeated)}")
    if unlabelled := [post.id for post in gold if post.label not in labels]:
        raise ValueError(f"posts whose label is none of {', '.join(labels)}: {listed(unlabelled)}. Leave them out")
    return gold


def classification_scores(
    predictions: Sequence[str | None], labels: Sequence[str], classes: Sequence[str] = SENTIMENTS
) -> dict[str, Any]:
    """Accuracy and F1, by scikit-learn.

    Args:
        predictions: per post a class, or None where the output could not be read, which is wrong in every score.
        labels: the posts' own.
        classes: over which F1 is averaged, whether or not they occur.

    Returns:
        `accuracy`, `macro_f1`, `weighted_f1`, `f1` (class -> F1), all in [0, 1]; `posts` and `unread`, counts.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: without posts.

    Example:
        >>> scores = classification_scores(["positive", None], ["positive", "neutral"])
        >>> scores["accuracy"], scores["unread"]
        (0.5, 1)
    """
    try:
        from sklearn.metrics import accuracy_score, f1_score
    except ImportError as error:
        raise ImportError("scores of sentiment need scikit-learn: pip install 'dynkp[scores]'") from error
    if not labels:
        raise ValueError("there are no posts to score")
    read = [_UNREAD if prediction is None else prediction for prediction in predictions]
    options = {"labels": list(classes), "zero_division": 0.0}
    by_class = f1_score(labels, read, average=None, **options)
    return {
        "accuracy": float(accuracy_score(labels, read)),
        "macro_f1": float(f1_score(labels, read, average="macro", **options)),
        "weighted_f1": float(f1_score(labels, read, average="weighted", **options)),
        "f1": {name: float(value) for name, value in zip(classes, by_class, strict=True)},
        "posts": len(labels),
        "unread": read.count(_UNREAD),
    }


class SentimentEvaluation:
    """Systems scored on the same posts.

    Args:
        gold: the posts.
        task: what is predicted; its labels are the classes.
        embedding_model: a sentence-transformers model for the cosine of chains; None for none.
        seed: of the draw of other posts' chains, the floor.

    Example:
        >>> evaluation = SentimentEvaluation([LabelledPost("1", "positive", None, "Go Cubs")])
        >>> evaluation.add("mine", [{"id": "1", "prediction": "positive"}])
        >>> evaluation.report()["systems"]["mine"]["accuracy"]
        1.0
    """

    def __init__(
        self,
        gold: Sequence[LabelledPost],
        *,
        task: ReasoningTask | str = "msc",
        embedding_model: Any = None,
        seed: int = 0,
    ):
        self.gold = gold
        self.classes = resolve_reasoning_task(task).labels
        self.task = resolve_reasoning_task(task)
        self.embedding_model = None if embedding_model is None else EmbeddedOnce(embedding_model)
        self.seed = seed
        self.systems: dict[str, dict[str, Any]] = {}
        self.post_scores: dict[str, list[dict[str, Any]]] = {}
        # Chains are compared where there is something to compare them with.
        self.explained = [index for index, post in enumerate(gold) if (post.rationale or "").strip()]
        self._floor: dict[str, Any] | None = None

    def add(
        self,
        name: str,
        rows: Iterable[Mapping[str, Any]],
        chains: Iterable[Mapping[str, Any]] | None = None,
        *,
        allow_missing: bool = False,
    ) -> None:
        """Score a system.

        Args:
            name: how the report calls it.
            rows: answers to the label prompt: `id`, `prediction` (None if unread), and `output_words` if there.
            chains: answers to the chain prompt: `id`, `raw`.
            allow_missing: score posts without a row as unread, and without a chain as an empty one.

        Raises:
            ValueError: as in `match_predictions`; if another system has the name; if posts were decoded several times.
        """
        if name in self.systems:
            raise ValueError(f"two systems are called {name!r}: give them names of their own")
        answers, missing = self._matched(rows, allow_missing)
        predictions = [row.get("prediction") for row in answers]
        labels = [post.label for post in self.gold]
        system = {**classification_scores(predictions, labels, self.classes), "missing": missing}
        scores: list[dict[str, Any]] = [
            {"id": post.id, "label": post.label, "prediction": prediction, "right": prediction == post.label}
            for post, prediction in zip(self.gold, predictions, strict=True)
        ]
        if chains is not None:
            written, system["missing_chains"] = self._matched(chains, allow_missing)
            outputs = [row.get("raw") or "" for row in written]
            read = [self.task.parse(output).prediction for output in outputs]
            by_post = self._chain_scores([outputs[index] for index in self.explained])
            system["chains"] = {
                **mean_scores(by_post),
                "posts": len(self.explained),
                "accuracy": classification_scores(read, labels, self.classes)["accuracy"],
                "agreement": float(np.mean([one == other for one, other in zip(read, predictions, strict=True)])),
                "words": float(np.mean([len(output.split()) for output in outputs])),
            }
            for index, post_scores in zip(self.explained, by_post, strict=True):
                scores[index]["chain"] = post_scores
        self.systems[name], self.post_scores[name] = system, scores

    def _matched(self, rows: Iterable[Mapping[str, Any]], allow_missing: bool) -> tuple[list[Mapping[str, Any]], int]:
        decodes, missing = match_predictions(rows, self.gold, allow_missing=allow_missing)
        if len(decodes) > 1:
            raise ValueError(
                f"the predictions hold {len(decodes)} decodes of a post; sentiment is scored of one: split the file"
            )
        return decodes[0], missing

    def _chain_scores(self, chains: Sequence[str], posts: Sequence[int] | None = None) -> list[dict[str, float | None]]:
        references = [(self.gold[index].rationale or "").strip() for index in (self.explained if posts is None else posts)]
        return chain_scores([chain.strip() for chain in chains], references, embedding_model=self.embedding_model)

    def floor(self) -> dict[str, Any]:
        """What another post's chain with the same label scores: the means, and of how many posts.

        A post whose label no post with another text has is left out.
        """
        if self._floor is None:
            posts = [self.gold[index] for index in self.explained]
            partners = floor_partners([post.label for post in posts], [post.text for post in posts], self.seed)
            pairs = [(own, other) for own, other in zip(self.explained, partners, strict=True) if other is not None]
            chains = [posts[other].rationale or "" for _, other in pairs]
            scores = self._chain_scores(chains, [own for own, _ in pairs])
            self._floor = {**mean_scores(scores), "posts": len(pairs), "seed": self.seed}
        return self._floor

    def report(self) -> dict[str, Any]:
        """All figures: fractions, unrounded; `floor` where chains were scored."""
        floor = {"floor": self.floor()} if self._has_chains() else {}
        notes = [METEOR_NEEDS] if floor and self.floor()["meteor"] is None and self.explained else []
        return {"task": self.task.name, "posts": len(self.gold), "systems": self.systems, **floor, "notes": notes}

    def write_posts(self, path: str | os.PathLike[str]) -> None:
        """Write every post's scores as JSONL: `id`, `system`, `label`, `prediction`, `right` and, with chains, `chain`."""
        rows = (
            {"system": name, **scores[index]} for index in range(len(self.gold)) for name, scores in self.post_scores.items()
        )
        write_json_lines(path, rows)

    # --- tables ---

    def tables(self) -> list[list[list[str]]]:
        """Rows of cells, the first row the heads, in percent: classification, and chains with their floor."""
        heads = ["system", "accuracy", "macro F1", "weighted F1", *(f"F1 {name}" for name in self.classes), "unread"]
        classification = [heads]
        for name, system in self.systems.items():
            f1 = [percent(system["f1"][label]) for label in self.classes]
            shares = [percent(system[measure]) for measure in ("accuracy", "macro_f1", "weighted_f1")]
            classification.append([name, *shares, *f1, f"{system['unread']:,}"])
        if not self._has_chains():
            return [classification]
        chains = [["chains of", *(_HEADS.get(name, name) for name in CHAIN_SCORES), "accuracy", "words"]]
        for name, system in self.systems.items():
            if scores := system.get("chains"):
                cells = [percent(scores[measure]) for measure in (*CHAIN_SCORES, "accuracy")]
                chains.append([name, *cells, f"{scores['words']:.1f}"])
        chains.append(["another post, same label", *(percent(self.floor()[measure]) for measure in CHAIN_SCORES), "-", "-"])
        return [classification, chains]

    def _has_chains(self) -> bool:
        return any("chains" in system for system in self.systems.values())

    def caption(self) -> str:
        """What must be said beside the tables."""
        parts = [f"Percent, {len(self.gold):,} posts. Outputs that predict nothing that can be read count as wrong."]
        for name, system in self.systems.items():
            for count, what in ((system["missing"], "predictions"), (system.get("missing_chains", 0), "chains")):
                if count:
                    parts.append(f"{name}: {count:,} missing {what} count as unread or empty.")
        if self._has_chains() and not self.explained:
            parts.append("No post has a rationale to compare chains with: their accuracy is all that can be said of them.")
        elif self._has_chains():
            floor = self.floor()
            parts.append(
                f"Chains: means over {len(self.explained):,} posts with a rationale; last the floor, the rationale of "
                f"another post with the same label ({floor['posts']:,} posts, seed {floor['seed']})."
            )
            parts += [f"{METEOR_NEEDS}."] if floor["meteor"] is None and floor["posts"] else []
            parts += ["The cosine needs an embedding model (--semantic-model)."] if self.embedding_model is None else []
        return " ".join(parts)
