"""Invariants of the scores, convention `cmkp`:

- on real predictions every figure of the 2020 script, to every printed digit, for all, present, absent, seen, unseen;
- the definitions, on numbers computed by hand;
- scores do not depend on case, inflection, repeats or the order of posts; a perfect prediction scores 1;
- what cannot be scored is refused with the argument's name and the post's index.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynkp.mmkp_f1.scoring import score_keyphrases, stem_phrase

KS = (1, 3, 5)


@pytest.fixture(scope="module")
def posts(shared: Path) -> list[dict]:
    return [json.loads(line) for line in (shared / "data/cmkp/test.jsonl").open(encoding="utf-8")]


@pytest.fixture(scope="module")
def train_keyphrases(shared: Path) -> list[str]:
    return (shared / "data/cmkp/train_keyphrases.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def predictions(shared: Path) -> list[list[str]]:
    lines = (shared / "data/cmkp/best_pred.txt").read_text(encoding="utf-8").splitlines()
    return [line.split("\t")[1].split(";") for line in lines]


@pytest.fixture(scope="module")
def reference(shared: Path) -> dict:
    return json.loads((shared / "data/cmkp/reference_first_half.json").read_text())


@pytest.fixture(scope="module")
def scores(posts, train_keyphrases, predictions) -> dict:
    half = posts[: len(predictions)]
    return score_keyphrases(
        predictions,
        [post["keyphrases"] for post in half],
        texts=[post["text"] for post in half],
        train_keyphrases=train_keyphrases,
    )


@pytest.mark.parametrize("subset", ["all", "present", "absent"])
def test_every_printed_digit_of_the_2020_script(scores, reference, subset):
    official = reference["official_cmkp"]
    for k in KS:
        for ours, theirs in (("p", "macro_avg_p"), ("r", "macro_avg_r"), ("f1", "macro_avg_f1"), ("map", "MAP"), ("ndcg", "avg_NDCG")):
            assert round(scores[subset][f"{ours}@{k}"], 5) == official[f"{theirs}@{k}_{subset}"], (ours, k)


@pytest.mark.parametrize(
    ("subset", "name"),
    [("all", "all"), ("present", "present"), ("absent", "absent"), ("seen", "D1_seen"), ("unseen", "D1_unseen")],
)
def test_subsets(scores, reference, subset, name):
    expected = reference["subsets"][name]
    assert scores[subset]["posts"] == expected["posts"]
    for k in KS:
        for score in ("P", "R", "F1", "MAP", "microF1"):
            ours = score.lower().replace("microf1", "micro_f1")
            assert scores[subset][f"{ours}@{k}"] == pytest.approx(expected[f"{score}@{k}"], abs=1e-12), (score, k)


def test_posts_per_subset_of_the_whole_test_set(posts, train_keyphrases):
    gold = [post["keyphrases"] for post in posts]
    scores = score_keyphrases(gold, gold, texts=[post["text"] for post in posts], train_keyphrases=train_keyphrases)
    assert {subset: row["posts"] for subset, row in scores.items()} == {
        "all": 5372,
        "present": 2320,
        "absent": 3441,
        "seen": 5318,
        "unseen": 74,
    }
    for row in scores.values():
        assert (row["p@5"], row["r@5"], row["f1@5"], row["map@5"]) == (1, 1, 1, 1)


def test_one_prediction_has_one_f1_at_every_k(posts, predictions):
    gold = [post["keyphrases"] for post in posts[: len(predictions)]]
    row = score_keyphrases([ranked[:1] for ranked in predictions], gold)["all"]
    assert row["f1@1"] == row["f1@3"] == row["f1@5"]
    assert round(100 * row["f1@1"], 3) == 46.675
    assert row["map@5"] == row["r@1"]


def test_by_hand():
    # Post 1: hits at ranks 2 and 3 of {a, b, c}; post 2: a miss.
    row = score_keyphrases([["x", "a", "b"], ["y"]], [["a", "b", "c"], ["z"]], ks=[1, 2, 5])["all"]
    assert row["p@1"] == row["r@1"] == row["f1@1"] == row["map@1"] == 0
    assert row["p@2"] == pytest.approx((1 / 2 + 0) / 2)
    assert row["r@2"] == pytest.approx((1 / 3 + 0) / 2)
    assert row["f1@2"] == pytest.approx(2 * (1 / 4) * (1 / 6) / (1 / 4 + 1 / 6))
    assert row["p@5"] == pytest.approx((2 / 3 + 0) / 2)  # not padded to 5
    assert row["map@5"] == pytest.approx((1 / 3) * (1 / 2 + 2 / 3) / 2)


def test_f1_is_the_harmonic_mean_of_the_means():
    row = score_keyphrases([["a"], ["b"]], [["a", "c"], ["b"]], ks=[1])["all"]
    assert row["f1@1"] == pytest.approx(2 * 1 * 0.75 / 1.75)
    assert row["f1@1"] != pytest.approx((2 / 3 + 1) / 2)  # the mean of the posts' F1


def test_repeats_and_unknown_words_are_dropped_before_the_cut():
    row = score_keyphrases([["dogs", "Dog", "a <unk>", "b , c", ".", "cat"]], [["cats"]], ks=[1, 2])["all"]
    assert (row["p@1"], row["p@2"]) == (0, 0.5)
    # Only whole tokens are: "st. louis" stays, and takes its place.
    assert score_keyphrases([["st. louis", "cat"]], [["cat"]], ks=[1])["all"]["p@1"] == 0


def test_present_is_a_run_of_whole_stemmed_words():
    scores = score_keyphrases(
        [["running dogs", "cat", "run"]],
        [["run dog", "cat", "dogs running", "do"]],
        texts=["the Runs dogs category"],
        ks=[5],
    )
    assert scores["present"]["r@5"] == 1  # "run dog" alone; "run" is present too, and wrong
    assert scores["present"]["p@5"] == 0.5
    assert scores["absent"]["r@5"] == pytest.approx(1 / 3)  # "cat" of cat, "dog run", "do"


def test_no_prediction_and_a_blank_one_score_nothing():
    for nothing in ([], [""], [" "]):
        scores = score_keyphrases([nothing], [["a"]], texts=["a b"], train_keyphrases=["b"])
        assert [scores[subset]["f1@5"] for subset in ("all", "present", "unseen")] == [0, 0, 0]
    # A blank one takes a place, as an empty field does in the 2020 script.
    assert score_keyphrases([["", "a"]], [["a"]], ks=[1])["all"]["p@1"] == 0


def test_a_subset_without_posts_has_no_score():
    scores = score_keyphrases([["a"]], [["a"]], train_keyphrases=["a"], ks=[1])
    assert scores["unseen"] == {"posts": 0, "phrases": 0} | dict.fromkeys(
        ["p@1", "r@1", "f1@1", "map@1", "ndcg@1", "micro_f1@1"]
    )
    assert score_keyphrases([], [], ks=[1])["all"]["f1@1"] is None


PHRASES = st.lists(st.sampled_from(["dog", "Dogs", "sun set", "sun sets", "cat", "x ."]), max_size=6)


@given(st.lists(st.tuples(PHRASES, PHRASES.filter(bool)), min_size=1, max_size=6), st.randoms())
def test_invariances(pairs, random):
    scores = score_keyphrases(*zip(*pairs, strict=True))["all"]
    loud = [([p.upper() for p in ranked for _ in range(2)], gold * 2) for ranked, gold in pairs]
    random.shuffle(loud)
    assert score_keyphrases(*zip(*loud, strict=True))["all"] == pytest.approx(scores)
    for name, value in scores.items():
        assert name in ("posts", "phrases") or 0 <= value <= 1


def test_stems_are_joined_by_one_blank():
    assert stem_phrase(" Wildflower\tHOURS ") == "wildflow hour"
    assert stem_phrase("a" * 100_000) == "a" * 100_000  # degenerate model output


@pytest.mark.parametrize(
    ("predictions", "references", "more", "error", "message"),
    [
        (["a;b"], [["a"]], {}, TypeError, r"predictions\[0\]='a;b' is a string"),
        ("a", [["a"]], {}, TypeError, "predictions must be a list with a list of keyphrases per post, got str"),
        ([["a"]], None, {}, TypeError, "references must be a list .* got NoneType"),
        ([["a", None]], [["a"]], {}, TypeError, r"predictions\[0\]\[1\] must be a string, got NoneType"),
        ([["a"], None], [["a"], ["b"]], {}, TypeError, r"predictions\[1\] must be a list of strings"),
        ([{"a": 1}], [["a"]], {}, TypeError, r"predictions\[0\] must be a list of strings, got dict"),
        ([["a"]], [[3]], {}, TypeError, r"references\[0\]\[0\] must be a string, got int"),
        ([["a"]], [["a"], ["b"]], {}, ValueError, "predictions has 1 posts and references has 2"),
        ([["a"]], [["a"]], {"texts": []}, ValueError, "texts has 0 posts and references has 1"),
        ([["a"]], [["a"]], {"texts": "a"}, TypeError, "texts must be a list of strings, got str"),
        ([["a"]], [["a"]], {"texts": [None]}, TypeError, r"texts\[0\] must be a string"),
        ([["a"]], [["a"]], {"train_keyphrases": "a"}, TypeError, "train_keyphrases must be a list of strings"),
        ([["a"]], [[]], {}, ValueError, r"references\[0\]=\[\] must hold at least one keyphrase"),
        ([["a"]], [["a", " "]], {}, ValueError, r"references\[0\]=.* no blank one"),
        ([["a"]], [["a"]], {"ks": [0]}, ValueError, r"ks=\[0\]"),
        ([["a"]], [["a"]], {"ks": [1.5]}, ValueError, r"ks=\[1.5\]"),
    ],
)
def test_what_cannot_be_scored_is_refused(predictions, references, more, error, message):
    with pytest.raises(error, match=message):
        score_keyphrases(predictions, references, **more)


def test_scoring_needs_no_torch():
    code = (
        "import sys; from dynkp.mmkp_f1.scoring import score_keyphrases; score_keyphrases([['a']], [['a']]); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
