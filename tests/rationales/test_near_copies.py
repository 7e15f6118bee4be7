"""Invariants of near-copies: the copies found are those of comparing all pairs, where similarities are far from the threshold;
the first of several similar texts is the original; case, punctuation and whitespace are ignored; empty and short texts are
accepted; a bucket full of boilerplate does not take quadratic time.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from dynkp.data.sources import load_masc_posts
from dynkp.rationales.near_copies import NearCopies, shingles, similarity


def find(texts: list[str], threshold: float = 0.8) -> dict[int, int]:
    copies = NearCopies(threshold)
    for text in texts:
        copies.add(text)
    return copies.find(texts.__getitem__)


def text(seed: int, words: int = 120) -> str:
    generator = random.Random(seed)
    return " ".join(f"word{generator.randrange(3000)}" for _ in range(words))


def changed(original: str, count: int, seed: int = 0) -> str:
    words = original.split()
    for place in random.Random(seed).sample(range(len(words)), count):
        words[place] = f"other{place}"
    return " ".join(words)


def test_near_copies_are_found_and_others_are_not() -> None:
    texts = [text(seed) for seed in range(300)]
    near = [changed(texts[number], 2) for number in range(0, 300, 3)]  # at least 0.9 alike
    far = [changed(texts[number], 40) for number in range(1, 300, 3)]  # at most 0.4
    assert all(similarity(shingles(a), shingles(b)) > 0.88 for a, b in zip(texts[::3], near, strict=True))
    assert all(similarity(shingles(a), shingles(b)) < 0.5 for a, b in zip(texts[1::3], far, strict=True))
    assert find([*texts, *near, *far]) == {300 + number: 3 * number for number in range(100)}


def test_of_several_alike_the_first_is_the_original() -> None:
    first = text(1)
    texts = [text(0), first, changed(first, 1), text(2), changed(first, 1, 5), first.upper() + "!"]
    assert find(texts) == {2: 1, 4: 1, 5: 1}


def test_shingles_and_similarity_by_hand() -> None:
    assert len(shingles("a b c d")) == 2  # abc, bcd
    assert len(shingles("a b")) == 1 and len(shingles(" .,")) == 0
    assert similarity(shingles("a b c d"), shingles("A, b; c - d!")) == 1.0
    assert similarity(shingles("a b c d"), shingles("b c d e")) == pytest.approx(1 / 3)
    assert similarity(shingles(""), shingles("")) == 0.0


def test_empty_and_short_texts() -> None:
    assert find([]) == {}
    assert find(["", "", "dog", "Dog.", "cat", ""]) == {3: 2}


def test_the_threshold() -> None:
    pair = ["a b c d e f g h i j", "a b c d e f g h i x"]  # 7 of 9 runs
    assert find(pair, 0.7) == {1: 0} and find(pair, 0.8) == {}
    for threshold in (0, 1.1):
        with pytest.raises(ValueError, match="threshold="):
            NearCopies(threshold)


def test_boilerplate_costs_no_square() -> None:
    # Half of each text's runs are the same in all, so that nearly all share a bucket, and none is a near-copy.
    texts = [f"number {n} {n} is why they might use this tag" for n in range(20_000)]
    read = []
    copies = NearCopies()
    for one in texts:
        copies.add(one)
    start = time.process_time()
    assert copies.find(lambda number: read.append(number) or texts[number]) == {}
    assert len(read) < 5 * len(texts)
    assert time.process_time() - start < 20


def test_texts_may_come_after_a_search() -> None:
    texts = [text(seed) for seed in range(5000)]
    copies = NearCopies()
    for one in texts:
        copies.add(one)
    assert copies.find(texts.__getitem__) == {}
    for one in (texts[7], text(9999), texts[4999]):
        texts.append(one)
        copies.add(one)
    assert copies.find(texts.__getitem__) == {5000: 7, 5002: 4999}


def test_real_chains(shared: Path) -> None:
    texts = [row["rationale"] for row in load_masc_posts(shared / "data/masc_t15/test.jsonl") if row["rationale"]]
    exact = {}
    runs = [shingles(one) for one in texts]
    for number, one in enumerate(runs):
        original = next((other for other in range(number) if other not in exact and similarity(runs[other], one) >= 0.8), None)
        if original is not None:
            exact[number] = original
    assert find(texts) == exact
