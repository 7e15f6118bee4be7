"""Invariants of the baselines:

- the most frequent keyphrase counts posts, and ties are resolved by order;
- the nearest neighbour has the greatest cosine: the batched sparse product equals a dense TF-IDF written out here;
- a post's prediction does not depend on the other posts; without a shared word there is no prediction;
- on the real tweets the hit rates are the known ones.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path

import pytest
from nltk.stem import PorterStemmer

from dynkp.data import baselines
from dynkp.data.baselines import most_frequent_keyphrase, nearest_neighbour_keyphrases


def test_most_frequent_counts_posts_not_repeats() -> None:
    posts = [{"keyphrases": ["a", "a", "a"]}, {"keyphrases": ["b"]}, {"keyphrases": ["b", "c"]}]
    assert most_frequent_keyphrase(posts) == "b"


def test_most_frequent_tie_goes_to_the_first_met() -> None:
    assert most_frequent_keyphrase([{"keyphrases": ["z", "a"]}, {"keyphrases": ["a", "z"]}]) == "z"


@pytest.mark.parametrize("posts", [[], [{"keyphrases": []}]])
def test_most_frequent_refuses_posts_without_keyphrases(posts: list[dict]) -> None:
    with pytest.raises(ValueError, match="no post with a keyphrase"):
        most_frequent_keyphrase(posts)


def test_neighbour_is_the_one_sharing_the_rare_word() -> None:
    texts = ["the game in the rain", "the game in madrid", "the game tonight"]
    keyphrases = [["storm"], ["ucl", "real"], ["nba"]]
    assert nearest_neighbour_keyphrases(texts, keyphrases, ["the rain", "Madrid!", "the game tonight"]) == [
        ["storm"],
        ["ucl", "real"],
        ["nba"],
    ]


def test_no_shared_word_gives_no_prediction() -> None:
    assert nearest_neighbour_keyphrases(["goal"], [["mufc"]], ["", "rain", "goal"]) == [[], [], ["mufc"]]
    assert nearest_neighbour_keyphrases(["", " "], [["a"], ["b"]], ["rain"]) == [[]]
    assert nearest_neighbour_keyphrases(["goal"], [["mufc"]], []) == []


def test_equally_similar_posts_give_the_first_and_results_are_copies() -> None:
    keyphrases = [["x"], ["first"], ["second"]]
    [prediction] = nearest_neighbour_keyphrases(["other", "same words", "words same"], keyphrases, ["same words"])
    assert prediction == ["first"]
    prediction.append("changed")
    assert keyphrases[1] == ["first"]


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="train_texts has 2 entries and train_keyphrases 1"):
        nearest_neighbour_keyphrases(["a", "b"], [["k"]], ["a"])


def test_missing_scikit_learn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(ImportError, match=r"needs scikit-learn.*pip install 'dynkp\[demo\]'"):
        nearest_neighbour_keyphrases(["a"], [["k"]], ["a"])


def _dense_nearest(train_texts: list[str], text: str) -> list[float]:
    """Cosines of `text` with every training text: TF 1 + ln(count), IDF ln((1 + N) / (1 + df)) + 1, written out."""
    documents = [Counter(t.split()) for t in train_texts]
    frequency = Counter(word for document in documents for word in document)

    def vector(counts: Counter[str]) -> dict[str, float]:
        weights = {
            word: (1 + math.log(count)) * (math.log((1 + len(documents)) / (1 + frequency[word])) + 1)
            for word, count in counts.items()
            if word in frequency
        }
        length = math.sqrt(sum(weight**2 for weight in weights.values())) or 1.0
        return {word: weight / length for word, weight in weights.items()}

    query = vector(Counter(text.split()))
    return [sum(query.get(word, 0.0) * weight for word, weight in vector(d).items()) for d in documents]


def test_batched_product_equals_the_dense_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_BATCH", 7)
    words = [f"w{i}" for i in range(13)]
    train_texts = [" ".join(words[(i * j * j + i) % 13] for j in range(1, 3 + i % 5)) for i in range(40)]
    texts = [" ".join(words[(i * 5 + j * j) % 13] for j in range(1 + i % 4)) for i in range(30)]
    predictions = nearest_neighbour_keyphrases(train_texts, [[str(i)] for i in range(40)], texts)
    for text, [prediction] in zip(texts, predictions, strict=True):
        cosines = _dense_nearest(train_texts, text)
        assert cosines[int(prediction)] == pytest.approx(max(cosines), abs=1e-12)
    assert predictions[11:12] == nearest_neighbour_keyphrases(train_texts, [[str(i)] for i in range(40)], texts[11:12])


def test_known_hit_rates_on_the_real_tweets(shared: Path) -> None:
    def posts(name: str) -> list[dict]:
        with (shared / "data" / "cmkp" / name).open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    train, test = posts("valid.jsonl"), posts("test.jsonl")
    stem = PorterStemmer().stem

    def stemmed(phrase: str) -> str:
        return " ".join(stem(word) for word in phrase.split())

    def precision_and_f1_at_1(predictions: list[list[str]]) -> tuple[float, float]:
        precision = recall = 0.0
        for prediction, post in zip(predictions, test, strict=True):
            gold = {stemmed(phrase) for phrase in post["keyphrases"]}
            if prediction and stemmed(prediction[0]) in gold:
                precision += 1 / len(test)
                recall += 1 / len(gold) / len(test)
        return 100 * precision, 100 * 2 * precision * recall / (precision + recall)

    assert most_frequent_keyphrase(train) == "mufc"
    assert precision_and_f1_at_1([["mufc"]] * len(test)) == pytest.approx((1.042, 0.966), abs=1e-3)
    neighbours = nearest_neighbour_keyphrases(
        [post["text"] for post in train], [post["keyphrases"] for post in train], [post["text"] for post in test]
    )
    precision, f1 = precision_and_f1_at_1(neighbours)
    assert precision == pytest.approx(20.4, abs=0.5)
    assert f1 == pytest.approx(18.5, abs=0.5)
