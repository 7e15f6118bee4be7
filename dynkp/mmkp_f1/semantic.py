"""Semantic P, R and F1: keyphrases are compared by the similarity of their embeddings.

Given   ranked predictions, gold keyphrases and a sentence-transformers model (extra `semantic`).
Gives   soft P, R and F1 at k: KPEval's SemP, SemR and SemF1 (Wu et al. 2024) of the first k predictions.
Holds   each phrase is embedded once; predictions equal to the gold phrases score 1.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .answers import normalise_phrase
from .scoring import check_gold, check_lengths, checked_cuts, checked_phrase_lists

_Array = np.ndarray[Any, Any]


def semantic_scores(
    predictions: Iterable[Sequence[str]],
    references: Iterable[Sequence[str]],
    model: Any,
    *,
    ks: Sequence[int] = (1, 3, 5),
    batch_size: int = 256,
) -> dict[str, float | None]:
    """Score keyphrases by the similarity of their embeddings.

    With cos the cosine of two phrases' embeddings, negative values replaced by 0: P of a post is the mean over its first k
    predictions (repeats and empty ones dropped) of the largest cos with a gold phrase; R is the mean over its gold phrases of
    the largest cos with one of those predictions; both are 0 without predictions; F1 = 2PR/(P+R). Means over posts are
    reported. Phrases are embedded as `normalise_phrase` returns them, with
    single spaces. With most models, unrelated phrases have cos well
    above 0, so scores are meaningful only in comparisons of systems by the same model.

    Args:
        predictions: Per post the predicted keyphrases, best first.
        references: Per post the gold keyphrases, at least one.
        model: Name or folder of a sentence-transformers model, or an object with its `encode`.
        ks: The cut-offs.
        batch_size: The number of phrases embedded at a time.

    Returns:
        `semantic_p@k`, `semantic_r@k`, `semantic_f1@k` for every k, in [0, 1]; `None` without posts.

    Raises:
        ImportError: If a name is given and sentence-transformers is not installed.
        TypeError: As in `score_keyphrases`.
        ValueError: As in `score_keyphrases`.

    Example:
        >>> class Axes:
        ...     def encode(self, phrases, **_):
        ...         return [[1.0, phrase != "dog"] for phrase in phrases]
        >>> round(semantic_scores([["puppy"]], [["dog"]], Axes(), ks=[1])["semantic_f1@1"], 3)
        0.707
    """
    cuts = checked_cuts(ks)
    predicted = [_distinct(row) for row in checked_phrase_lists("predictions", predictions)]
    gold = checked_phrase_lists("references", references)
    check_lengths(gold, predictions=predicted)
    check_gold(gold)
    gold = [_distinct(row) for row in gold]
    names = [f"semantic_{name}@{k}" for k in cuts for name in ("p", "r", "f1")]
    if not gold:
        return dict.fromkeys(names)
    predicted = [row[: max(cuts)] for row in predicted]
    phrases = list(dict.fromkeys(phrase for row in (*gold, *predicted) for phrase in row))
    vectors = embed_texts(phrases, model, batch_size)
    number = {phrase: index for index, phrase in enumerate(phrases)}

    totals = dict.fromkeys(names, 0.0)
    for ranked, wanted in zip(predicted, gold, strict=True):
        if not ranked:
            continue
        cosines = vectors[[number[phrase] for phrase in ranked]] @ vectors[[number[phrase] for phrase in wanted]].T
        cosines = np.clip(cosines, 0, 1)
        for k in cuts:
            precision, recall = cosines[:k].max(axis=1).mean(), cosines[:k].max(axis=0).mean()
            harmonic = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
            for name, value in (("p", precision), ("r", recall), ("f1", harmonic)):
                totals[f"semantic_{name}@{k}"] += float(value)
    return {name: total / len(gold) for name, total in totals.items()}


def _distinct(phrases: Sequence[str]) -> list[str]:
    written = (" ".join(normalise_phrase(phrase).split()) for phrase in phrases)
    return list(dict.fromkeys(phrase for phrase in written if phrase))


def embed_texts(texts: Sequence[str], model: Any, batch_size: int = 256) -> _Array:
    """Embed texts.

    Args:
        texts: The texts; a model truncates long ones (all-MiniLM-L6-v2 at 256 tokens).
        model: Name or folder of a sentence-transformers model, or an object with its `encode`.
        batch_size: The number of texts embedded at a time.

    Returns:
        The embeddings, (texts, dimensions), scaled to length 1; zeros if the model returns zeros.

    Raises:
        ImportError: If a name is given and sentence-transformers is not installed.
    """
    if isinstance(model, (str, os.PathLike)):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError("semantic scores need sentence-transformers: pip install 'dynkp[semantic]'") from error
        model = SentenceTransformer(str(model))
    vectors = np.asarray(model.encode(list(texts), batch_size=batch_size, show_progress_bar=False), np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(float).tiny)
