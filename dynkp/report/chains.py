"""Scores of MulCoT-RD's response chains: their similarity to the reference chains, and how often they repeat themselves.

Given   a response chain per post, its reference, and optionally an embedding model.
Gives   per post BLEU-4 (sacrebleu), ROUGE-L (rouge-score), METEOR (NLTK), the cosine of embeddings (sentence-transformers),
        Distinct-1 and Distinct-2, each in [0, 1] (the cosine in [-1, 1]); and for each post another post with the same label,
        whose chain's score is a baseline: that of a chain which depends on the label alone.
Holds   a score equals its library's own, post by post; a score that cannot be computed is None, never zero.

The conventions are those of MulCoT-RD's published code, as far as the libraries above offer them: every score is the mean
over posts; BLEU is computed for each pair, tokens "13a", without smoothing; METEOR and Distinct use NLTK's Treebank tokens in
lower case; Distinct is the share of distinct n-grams among a chain's own. The published code takes ROUGE-L from another
package, and computes Distinct on the references; here it is computed on the predictions.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from dynkp.mmkp_f1.semantic import embed_texts

CHAIN_SCORES = ("bleu_4", "rouge_l", "meteor", "cosine", "distinct_1", "distinct_2")
METEOR_NEEDS = "METEOR needs NLTK's WordNet data (python -m nltk.downloader wordnet); without it there is no METEOR"


def chain_scores(
    chains: Sequence[str], references: Sequence[str], *, embedding_model: Any = None
) -> list[dict[str, float | None]]:
    """Score response chains, each against its reference.

    Args:
        chains: The generated chains, one per post; may be empty strings.
        references: The posts' own chains, in the same order.
        embedding_model: Name or folder of a sentence-transformers model, or an object with its `encode`; None for no cosine.

    Returns:
        Per post the scores `CHAIN_SCORES`; `meteor` is None without NLTK's WordNet data, `cosine` without a model.

    Raises:
        ImportError: If sacrebleu, rouge-score or NLTK is not installed; the error names the extra.
        ValueError: If the numbers of chains and references differ.

    Example:
        >>> scores = chain_scores(["the dog is happy today"], ["the dog is happy today"])[0]
        >>> round(scores["bleu_4"], 6), scores["rouge_l"], scores["distinct_1"]
        (1.0, 1.0, 1.0)
    """
    if len(chains) != len(references):
        raise ValueError(f"{len(chains)} chains and {len(references)} references: there must be one reference per chain")
    try:
        from nltk.tokenize import TreebankWordTokenizer
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise ImportError(f"scores of chains need the extra 'scores' ({error}): pip install 'dynkp[scores]'") from error

    bleu = BLEU(smooth_method="none")
    rouge = RougeScorer(["rougeL"])
    tokenize = TreebankWordTokenizer().tokenize
    wordnet = wordnet_reader()
    cosines: list[float | None] = [None] * len(chains)
    if embedding_model is not None and chains:
        texts = list(dict.fromkeys((*chains, *references)))
        vectors = dict(zip(texts, embed_texts(texts, embedding_model), strict=True))
        cosines = [float(vectors[chain] @ vectors[reference]) for chain, reference in zip(chains, references, strict=True)]
    scores: list[dict[str, float | None]] = []
    for chain, reference, cosine in zip(chains, references, cosines, strict=True):
        tokens = tokenize(chain.lower())
        scores.append(
            {
                "bleu_4": bleu.corpus_score([chain], [[reference]]).score / 100,
                "rouge_l": rouge.score(reference, chain)["rougeL"].fmeasure,
                "meteor": None if wordnet is None else _meteor(tokenize(reference.lower()), tokens, wordnet),
                "cosine": cosine,
                "distinct_1": _distinct(tokens, 1),
                "distinct_2": _distinct(tokens, 2),
            }
        )
    return scores


def mean_scores(scores: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """Average the scores over posts.

    Args:
        scores: Per post the scores that `chain_scores` returned.

    Returns:
        The means; None for a score that no post has, and for all scores without posts.

    Example:
        >>> nothing = dict.fromkeys(CHAIN_SCORES)
        >>> means = mean_scores([{**nothing, "bleu_4": 0.5}, {**nothing, "bleu_4": 0.25}])
        >>> means["bleu_4"], means["meteor"]
        (0.375, None)
    """
    means: dict[str, float | None] = {}
    for name in CHAIN_SCORES:
        values = [value for post in scores if (value := post[name]) is not None]
        means[name] = float(np.mean(values)) if values else None
    return means


def floor_partners(labels: Sequence[str], groups: Sequence[Hashable], seed: int = 0) -> list[int | None]:
    """Draw for each post another one with the same label, whose chain gives the baseline.

    Args:
        labels: The posts' labels.
        groups: A value per post; posts with the same value are never each other's partner. With the posts' texts as groups,
            a tweet that occurs once for each of its aspects is not compared with itself.
        seed: The seed of the draw.

    Returns:
        Per post the index of another post, None if there is none.

    Example:
        >>> floor_partners(["good", "good", "bad"], ["a", "b", "c"])
        [1, 0, None]
    """
    draw = random.Random(seed)
    members: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    partners: list[int | None] = []
    for label, group in zip(labels, groups, strict=True):
        same_label = members[label]
        partner = draw.choice(same_label)
        if groups[partner] == group:  # rare, unless a label has few posts: only then are all of them searched
            others = [index for index in same_label if groups[index] != group]
            partner = draw.choice(others) if others else -1
        partners.append(partner if partner >= 0 else None)
    return partners


class EmbeddingCache:
    """An embedding model that embeds each text once: every system is compared with the same references.

    Args:
        model: A model as `embedding_model` of `chain_scores`.

    Attributes:
        vectors: Text -> its embedding, (D,), at length 1.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.vectors: dict[str, Any] = {}

    def encode(self, texts: Sequence[str], **options: Any) -> Any:
        """Embed texts, those embedded before from the cache.

        Args:
            texts: The texts.
            **options: Ignored; accepted for compatibility with sentence-transformers.

        Returns:
            The embeddings, (N, D), at length 1.
        """
        if new := [text for text in dict.fromkeys(texts) if text not in self.vectors]:
            self.vectors.update(zip(new, embed_texts(new, self.model), strict=True))
        return np.stack([self.vectors[text] for text in texts])


def wordnet_reader() -> Any:
    """Return NLTK's WordNet, or None if its data is not installed."""
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:
        return None
    return wordnet


def _meteor(reference: list[str], chain: list[str], wordnet: Any) -> float:
    from nltk.translate.meteor_score import meteor_score

    return float(meteor_score([reference], chain, wordnet=wordnet))


def _distinct(tokens: list[str], n: int) -> float:
    from nltk.util import ngrams

    found = list(ngrams(tokens, n))
    return len(set(found)) / len(found) if found else 0.0
