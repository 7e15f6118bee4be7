"""Invariants of `resample`, for any posts, target and seed:

- every training post stays or moves, none does both, and ids stay distinct;
- no training post that stays has a keyphrase that only training had; every one that moves has;
- posts without a keyphrase that training still has stay in the test set;
- the overlap is at most the target, was above it before the last drop, and equals a plain count;
- a smaller target gives a subset; the posts' order, and the case and whitespace of keyphrases, do not change the result;
- target 0 leaves only keyphrases that training does not have;
- with CMKP's validation posts in place of training, the figures are exactly those of the design notes.
"""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynkp.data.resampling import overlap_table, resample
from dynkp.data.statistics import split_statistics

phrase_lists = st.lists(st.lists(st.sampled_from("abcdefghijkl"), max_size=3), max_size=14)
targets = st.sampled_from([0, 0.2, 1 / 3, 0.5, 0.75, 1])
seeds = st.integers(0, 5)


def posts(name: str, lists: list[list[str]]) -> list[dict]:
    return [{"id": f"{name}{row}", "keyphrases": phrases} for row, phrases in enumerate(lists)]


def phrases_of(rows) -> set[str]:
    return {phrase for row in rows for phrase in row["keyphrases"]}


def sets(train, test, new):
    """The new training and test posts."""
    return [train[row] for row in new.train], [test[row] for row in new.test] + [train[row] for row in new.moved_kept]


def overlap(train, test) -> float:
    known = phrases_of(test)
    return len(known & phrases_of(train)) / len(known) if known else 0.0


@settings(max_examples=200, deadline=None)
@given(phrase_lists, phrase_lists, targets, seeds)
def test_invariants(train_lists, test_lists, target, seed):
    train, test = posts("train", train_lists), posts("test", test_lists)
    new = resample(train, test, target, seed)
    train2, test2 = sets(train, test, new)

    assert sorted([*new.train, *new.moved]) == list(range(len(train))) and set(new.moved_kept) <= set(new.moved)
    ids = [row["id"] for row in train2 + test2]
    assert len(ids) == len(set(ids))
    assert new.exclusive == phrases_of(train) - phrases_of(test)
    assert not phrases_of(train2) & new.exclusive
    assert all(new.exclusive & set(train[row]["keyphrases"]) for row in new.moved)

    merged = test + [train[row] for row in new.moved]
    observed = phrases_of(train2)
    unobserved = [row for row in merged if not observed & set(row["keyphrases"])]
    assert [row for row in test2 if not observed & set(row["keyphrases"])] == unobserved

    assert new.overlap_before == pytest.approx(overlap(train, test))
    assert new.overlap_moved == pytest.approx(overlap(train2, merged))
    assert new.overlap == pytest.approx(overlap(train2, test2)) and new.overlap <= target
    assert test2 == [row for row in merged if not set(new.dropped) & set(row["keyphrases"])]
    if new.dropped:
        before = [row for row in merged if not set(new.dropped[:-1]) & set(row["keyphrases"])]
        assert overlap(train2, before) > target
    order = [hashlib.sha256(f"{seed}\t{phrase}".encode()).hexdigest() for phrase in new.dropped]
    assert order == sorted(order)
    if target == 0:
        assert not observed & phrases_of(test2)


@settings(max_examples=100, deadline=None)
@given(phrase_lists, phrase_lists, targets, targets, seeds)
def test_a_smaller_target_gives_a_subset(train_lists, test_lists, one, other, seed):
    train, test = posts("train", train_lists), posts("test", test_lists)
    small, large = resample(train, test, min(one, other), seed), resample(train, test, max(one, other), seed)
    assert small.train == large.train
    assert set(small.test) <= set(large.test) and set(small.moved_kept) <= set(large.moved_kept)


@settings(max_examples=100, deadline=None)
@given(phrase_lists, phrase_lists, targets, seeds, st.randoms(use_true_random=False))
def test_neither_order_nor_spelling_matters(train_lists, test_lists, target, seed, random):
    train, test = posts("train", train_lists), posts("test", test_lists)
    chosen = [{row["id"] for row in side} for side in sets(train, test, resample(train, test, target, seed))]
    for rows in (train, test):
        random.shuffle(rows)
        for row in rows:
            row["keyphrases"] = [random.choice([phrase, f" #{phrase.upper()} "]) for phrase in row["keyphrases"]]
    assert [{row["id"] for row in side} for side in sets(train, test, resample(train, test, target, seed))] == chosen


def test_cmkp(shared):
    """With validation posts standing in for training: counts of step 1, and the paper's overlap."""
    valid, test = (
        [json.loads(line) for line in (shared / f"data/cmkp/{name}.jsonl").read_text().splitlines()]
        for name in ("valid", "test")
    )
    new = resample(valid, test, 1, seed=0)
    train2, test2 = sets(valid, test, new)
    assert (len(new.exclusive), len(new.moved)) == (770, 1087)
    assert (len(train2), len(phrases_of(train2)), len(test2)) == (4283, 1687, 6459)
    assert len(phrases_of(test2)) == 3304 and new.overlap_moved == 1687 / 3304 == new.overlap and not new.dropped
    target = resample(valid, test, 0.4492, seed=0)
    assert target.train == new.train and 0.448 < target.overlap <= 0.4492
    unseen = sets(valid, test, resample(valid, test, 0, seed=0))[1]
    assert 0 < len(unseen) and not phrases_of(unseen) & phrases_of(train2)
    # Another seed is another order.
    assert resample(valid, test, 0.4492, seed=1).dropped != target.dropped


def test_by_hand():
    train = [{"id": 1, "keyphrases": ["dog"]}, {"id": 2, "keyphrases": ["dog", "nba"]}, {"id": 3, "keyphrases": []}]
    test = [{"id": 4, "keyphrases": ["Dog"]}, {"id": 5, "keyphrases": ["sun", "sun"]}, {"id": 6, "keyphrases": None}]
    new = resample(train, test, 0)
    assert (new.train, new.moved, new.test, new.moved_kept) == ([0, 2], [1], [1, 2], [])
    assert (new.overlap_before, new.overlap_moved, new.overlap) == (0.5, 1 / 3, 0) and new.dropped == ["dog"]
    empty = resample([], [], 0.5)
    assert (empty.train, empty.test, empty.overlap) == ([], [], 0)


def test_errors():
    with pytest.raises(ValueError, match="target_overlap=1.5"):
        resample([], [], 1.5)
    post = {"id": "p", "keyphrases": ["a"]}
    with pytest.raises(ValueError, match=r"post 'p' \(row 0 of the test posts\) has the id of another post"):
        resample([post], [post], 0.5)


def test_table():
    sides = [split_statistics([{"keyphrases": ["a", "b"]}]), split_statistics([{"keyphrases": ["a"]}] * 1100)]
    assert overlap_table({"x": (*sides, 0.97316)}) == [
        ["Datasets", "# Train Posts", "# Test Posts", "# KP / Post", "Train KP ∩ Test KP"],
        ["x", "1", "1,100", "1.00", "97.32%"],
    ]
    assert overlap_table({"none": (split_statistics([]), split_statistics([]), 0)})[1][3] == "0.00"
