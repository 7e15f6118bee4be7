"""Evaluation of sentiment predictions, and of the response chains that go with them.

Given   prediction rows of the label prompt (`id`, `prediction`) of one system or several, optionally rows of the chain prompt
        (`id`, `raw`), and the posts with their labels and rationales.
Gives   accuracy, macro F1 and weighted F1 (scikit-learn); the scores of the response chains beside a baseline; tables, and
        the scores of every post.
Holds   rows and posts are matched by id, as in `dynkp.report.evaluation`; a prediction that could not be parsed is wrong, and
        is counted; classification is scored on the answers to the label prompt only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dynkp.data.reasoning_tasks import SENTIMENTS, ReasoningTask, resolve_reasoning_task
from dynkp.files.json_lines import write_json_lines
from dynkp.prediction.prediction_files import listed, match_predictions
from dynkp.report.chains import CHAIN_SCORES, METEOR_NEEDS, EmbeddingCache, chain_scores, floor_partners, mean_scores
from dynkp.report.evaluation import check_ids
from dynkp.report.tables import percent

# What scikit-learn is given for an output without a prediction: none of the labels.
_UNREAD = "(unread)"
_HEADS = {"bleu_4": "BLEU-4", "rouge_l": "ROUGE-L", "meteor": "METEOR", "distinct_1": "Distinct-1", "distinct_2": "Distinct-2"}


class LabelledPost(NamedTuple):
    """The columns of a post that scoring needs.

    Attributes:
        id: The post's id.
        label: Its gold label.
        rationale: Its rationale, the reference of response chains; None if it has none.
        text: Its text.
    """

    id: str
    label: str
    rationale: str | None
    text: str


def labelled_posts(posts: Iterable[Mapping[str, Any]], labels: Sequence[str] = SENTIMENTS) -> list[LabelledPost]:
    """Extract from posts what scoring needs.

    Args:
        posts: Rows with `id` and `label` and, optionally, `rationale` and `text`.
        labels: The task's labels.

    Returns:
        The posts, in their order.

    Raises:
        ValueError: If there are no posts, if a post has none of the labels, or if posts share an id. The error lists the ids.

    Example:
        >>> labelled_posts([{"id": 1, "label": "neutral", "text": "cubs play"}])
        [LabelledPost(id='1', label='neutral', rationale=None, text='cubs play')]
    """
    gold = [LabelledPost(str(row["id"]), row.get("label") or "", row.get("rationale"), row.get("text") or "") for row in posts]
    check_ids(post.id for post in gold)
    if unlabelled := [post.id for post in gold if post.label not in labels]:
        raise ValueError(f"posts whose label is none of {', '.join(labels)}: {listed(unlabelled)}. Remove these posts")
    return gold


def classification_scores(
    predictions: Sequence[str | None], labels: Sequence[str], classes: Sequence[str] = SENTIMENTS
) -> dict[str, Any]:
    """Compute accuracy and F1, by scikit-learn.

    Args:
        predictions: Per post a class, or None if the output could not be parsed, which is wrong in every score.
        labels: The posts' gold labels.
        classes: The classes over which F1 is averaged, whether or not they occur.

    Returns:
        `accuracy`, `macro_f1`, `weighted_f1`, `f1` (class -> F1), all in [0, 1]; `posts` and `unread`, counts.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If there are no posts.

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
        gold: The posts.
        task: The task, or its name; its labels are the classes.
        embedding_model: A sentence-transformers model for the cosine of response chains; None for no cosine.
        seed: The seed of the draw of other posts' chains, which give the baseline.

    Attributes:
        systems: Name -> the system's figures, in the order in which they were added.
        post_scores: Name -> the scores of each post.

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
        self.task = resolve_reasoning_task(task)
        self.classes = self.task.labels
        self.embedding_model = None if embedding_model is None else EmbeddingCache(embedding_model)
        self.seed = seed
        self.systems: dict[str, dict[str, Any]] = {}
        self.post_scores: dict[str, list[dict[str, Any]]] = {}
        # Indices of the posts with a reference for chains.
        self._with_rationale = [index for index, post in enumerate(gold) if (post.rationale or "").strip()]
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
            name: The system's name in the report.
            rows: Its answers to the label prompt: `id`, `prediction` (None if it could not be parsed) and, optionally,
                `output_words`.
            chains: Its answers to the chain prompt: `id`, `raw`; None if there are none.
            allow_missing: Whether a post without a row is scored as unread, and one without a chain as an empty chain.

        Raises:
            ValueError: If another system has the name; if the ids of rows and posts do not match; or if posts were decoded
                several times.
        """
        if name in self.systems:
            raise ValueError(f"two systems are called {name!r}: give each system its own name")
        answers, missing = self._match(rows, allow_missing)
        predictions = [row.get("prediction") for row in answers]
        labels = [post.label for post in self.gold]
        system = {**classification_scores(predictions, labels, self.classes), "missing": missing}
        scores: list[dict[str, Any]] = [
            {"id": post.id, "label": post.label, "prediction": prediction, "right": prediction == post.label}
            for post, prediction in zip(self.gold, predictions, strict=True)
        ]
        if chains is not None:
            written, system["missing_chains"] = self._match(chains, allow_missing)
            outputs = [row.get("raw") or "" for row in written]
            read = [self.task.parse(output).prediction for output in outputs]
            by_post = self._chain_scores([outputs[index] for index in self._with_rationale], self._with_rationale)
            system["chains"] = {
                **mean_scores(by_post),
                "posts": len(self._with_rationale),
                "accuracy": classification_scores(read, labels, self.classes)["accuracy"],
                "agreement": float(np.mean([one == other for one, other in zip(read, predictions, strict=True)])),
                "words": float(np.mean([len(output.split()) for output in outputs])),
            }
            for index, post_scores in zip(self._with_rationale, by_post, strict=True):
                scores[index]["chain"] = post_scores
        self.systems[name], self.post_scores[name] = system, scores

    def _match(self, rows: Iterable[Mapping[str, Any]], allow_missing: bool) -> tuple[list[Mapping[str, Any]], int]:
        decodes, missing = match_predictions(rows, self.gold, allow_missing=allow_missing)
        if len(decodes) > 1:
            raise ValueError(
                f"the predictions hold {len(decodes)} decodes of a post, and sentiment is scored on one: split the file"
            )
        return decodes[0], missing

    def _chain_scores(self, chains: Sequence[str], indices: Sequence[int]) -> list[dict[str, float | None]]:
        """Score chains against the rationales of the posts with these indices."""
        references = [(self.gold[index].rationale or "").strip() for index in indices]
        return chain_scores([chain.strip() for chain in chains], references, embedding_model=self.embedding_model)

    def floor(self) -> dict[str, Any]:
        """Compute the baseline of the chain scores: those of another post's chain with the same label.

        Returns:
            The means of `CHAIN_SCORES`, `posts` (a post is left out if no post with another text has its label) and `seed`.
        """
        if self._floor is None:
            posts = [self.gold[index] for index in self._with_rationale]
            partners = floor_partners([post.label for post in posts], [post.text for post in posts], self.seed)
            pairs = [(own, other) for own, other in zip(self._with_rationale, partners, strict=True) if other is not None]
            chains = [posts[other].rationale or "" for _, other in pairs]
            scores = self._chain_scores(chains, [own for own, _ in pairs])
            self._floor = {**mean_scores(scores), "posts": len(pairs), "seed": self.seed}
        return self._floor

    def report(self) -> dict[str, Any]:
        """Return all figures as JSON values: fractions, unrounded.

        Returns:
            `task`, `posts`, `systems` (name -> figures), `floor` if response chains were scored, and `notes` on scores that
            could not be computed.
        """
        floor = {"floor": self.floor()} if self._has_chains() else {}
        notes = [METEOR_NEEDS] if floor and self.floor()["meteor"] is None and self._with_rationale else []
        return {"task": self.task.name, "posts": len(self.gold), "systems": self.systems, **floor, "notes": notes}

    def write_posts(self, path: str | os.PathLike[str]) -> None:
        """Write the scores of every post as JSON Lines: `id`, `system`, `label`, `prediction`, `right` and, if any, `chain`.

        Args:
            path: The file; missing folders are created.
        """
        rows = (
            {"system": name, **scores[index]} for index in range(len(self.gold)) for name, scores in self.post_scores.items()
        )
        write_json_lines(path, rows)

    def tables(self) -> list[list[list[str]]]:
        """Return the tables, each as rows of cells with the column heads first, in percent.

        Returns:
            A table of classification, and one of response chains and their baseline if chains were scored.
        """
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
        """Return what must be stated beside the tables."""
        parts = [f"Percent, {len(self.gold):,} posts. An output without a prediction that can be parsed counts as wrong."]
        for name, system in self.systems.items():
            for count, what in ((system["missing"], "predictions"), (system.get("missing_chains", 0), "chains")):
                if count:
                    parts.append(f"{name}: {count:,} missing {what} count as unread or empty.")
        if self._has_chains() and not self._with_rationale:
            parts.append("No post has a rationale to compare chains with: only the accuracy of the chains is reported.")
        elif self._has_chains():
            floor = self.floor()
            parts.append(
                f"Chains: means over {len(self._with_rationale):,} posts with a rationale; in the last row the baseline, the "
                f"rationale of another post with the same label ({floor['posts']:,} posts, seed {floor['seed']})."
            )
            parts += [f"{METEOR_NEEDS}."] if floor["meteor"] is None and floor["posts"] else []
            parts += ["The cosine needs an embedding model (--semantic-model)."] if self.embedding_model is None else []
        return " ".join(parts)
