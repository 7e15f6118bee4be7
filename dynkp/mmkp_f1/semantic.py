"""Semantic F1: keyphrases that mean the same count, however they are written.

Given   ranked predictions, gold keyphrases and a sentence-transformers model (extra `semantic`).
Gives   soft P, R and F1 at k, as KPEval's SemP, SemR and SemF1 (Wu et al. 2024) cut at k.
Holds   each phrase is embedded once; predictions that equal the gold phrases score 1.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

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
    """Score keyphrases by what they mean.

    With cos the cosine of two phrases' embeddings, negative ones counted as 0: P of a post is the mean over its first k
    predictions (repeats and blanks dropped) of the largest cos with a gold phrase, R the mean over its gold phrases of
    the largest cos with one of those predictions, 0 without predictions; F1 = 2PR/(P+R). Reported are means over posts.
    Phrases are embedded as they are written, blanks aside; unrelated phrases have cos well above 0 with most models, so
    compare systems, with the same model, and nothing else.

    Args:
        predictions: per post its keyphrases, best first.
        references: per post its gold keyphrases, at least one.
        model: the name or folder of a sentence-transformers model, or anything with its `encode`.
        ks: the cut-offs.
        batch_size: phrases embedded at a time.

    Returns:
        `semantic_p@k`, `semantic_r@k`, `semantic_f1@k` for every k, in [0, 1]; `None` without posts.

    Raises:
        ImportError: if a name is given and sentence-transformers is not installed.
        TypeError, ValueError: as in `score_keyphrases`.

    Example: `semantic_scores([["puppy"]], [["dog"]], "sentence-transformers/all-MiniLM-L6-v2")`
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
    written = (" ".join(phrase.split()) for phrase in phrases)
    return list(dict.fromkeys(phrase for phrase in written if phrase))


def embed_texts(texts: Sequence[str], model: Any, batch_size: int = 256) -> _Array:
    """The embeddings of texts, scaled to length 1.

    Args:
        texts: what to embed; a model cuts long ones off (all-MiniLM-L6-v2 at 256 tokens).
        model: as in `semantic_scores`.
        batch_size: texts embedded at a time.

    Returns:
        (N, D), one row per text; zeros where the model gives zeros.

    Raises:
        ImportError: if a name is given and sentence-transformers is not installed.
    """
    if isinstance(model, (str, os.PathLike)):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError("semantic scores need sentence-transformers: pip install 'dynkp[semantic]'") from error
        model = SentenceTransformer(str(model))
    vectors = np.asarray(model.encode(list(texts), batch_size=batch_size, show_progress_bar=False), np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(float).tiny)
