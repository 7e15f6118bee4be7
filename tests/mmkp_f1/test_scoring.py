"""Invariants of the scores:

- on real predictions every figure of the 2020 script (all, present, absent; seen and unseen by reference values) in every
  printed digit, and AimKP's to the last bit;
- every convention and subset equals a plain twin written as the formulas read (plain_scoring.py);
- the definitions, on numbers computed by hand;
- scores do not depend on case, inflection, repeats, batches or the order of posts; a perfect prediction scores 1; a wrong last
  prediction can be removed; conventions agree where they must;
- invalid input is an error that names the argument and the post's index; everything else that a model writes has a score.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynkp.mmkp_f1 import scoring
from dynkp.mmkp_f1.scoring import CONVENTIONS, KeyphraseScorer, score_keyphrases, stem_phrase
from tests.support.plain_scoring import normal, plain_scores
from tests.support.spellings import SPELLINGS

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
        for ours, theirs in {
            "p": "macro_avg_p", "r": "macro_avg_r", "f1": "macro_avg_f1", "map": "MAP", "ndcg": "avg_NDCG"
        }.items():  # fmt: skip
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


@pytest.mark.parametrize("name", ["all", "present", "absent", "D1_seen", "D1_unseen"])
def test_unpadded_f1_is_the_mean_of_the_posts_f1(posts, train_keyphrases, predictions, reference, name):
    half = posts[: len(predictions)]
    subset = name.removeprefix("D1_")
    row = score_keyphrases(
        predictions,
        [post["keyphrases"] for post in half],
        texts=[post["text"] for post in half],
        train_keyphrases=train_keyphrases,
        convention="unpadded",
        subsets=[subset],
    )[subset]
    assert row["phrases"] == reference["subsets"][name]["targets"]
    for k in KS:
        assert row[f"f1@{k}"] == pytest.approx(reference["subsets"][name][f"meanF1@{k}"], abs=1e-12)


def test_aimkp_to_the_last_bit(posts, predictions, reference):
    row = score_keyphrases(predictions, [post["keyphrases"] for post in posts[: len(predictions)]], convention="aimkp")["all"]
    official = reference["official_aimkp_5_predictions"]
    assert {name: row[name.lower()] for name in official} == official


@pytest.mark.parametrize("longest", [1, 3, 5])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_shorter_lists_equal_the_plain_twin(posts, train_keyphrases, predictions, convention, longest):
    half = posts[:1000]
    gold, texts = [post["keyphrases"] for post in half], [post["text"] for post in half]
    ranked = [phrases[:longest] for phrases in predictions[: len(half)]]
    more = {"texts": texts, "train_keyphrases": train_keyphrases, "convention": convention}
    for subset, row in score_keyphrases(ranked, gold, **more, subsets=["all", "absent", "seen", "present&unseen"]).items():
        assert row == pytest.approx(plain_scores(ranked, gold, **more, subset=subset), abs=1e-12), subset


# Ways in which real lists differ from clean ones, each of which changes some script's figures.
DIRT = {
    "repeats": lambda phrases: [phrase for phrase in phrases for _ in range(2)],
    "plural forms": lambda phrases: [phrases[0] + "s", *phrases],
    "unknown words": lambda phrases: [phrases[0], "<unk>", phrases[0] + " <unk>", *phrases[1:]],
    "upper case": lambda phrases: [phrase.upper() for phrase in phrases],
    "double blanks": lambda phrases: [f"  {phrase.replace(' ', '   ')}\t" for phrase in phrases],
    "empty phrases": lambda phrases: ["", *phrases[:2], " ", *phrases[2:]],
    "empty lists": lambda phrases: phrases if len(phrases[0]) % 2 else [],
    "an empty line": lambda phrases: phrases if len(phrases[0]) % 2 else [""],
}


HARMLESS = {
    "repeats": ("cmkp", "padded", "unpadded"),
    "unknown words": ("cmkp",),
    "upper case": CONVENTIONS,
    "double blanks": CONVENTIONS,
    "empty phrases": ("padded", "unpadded"),
}


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("dirt", DIRT)
def test_dirty_lists_equal_the_plain_twin(posts, train_keyphrases, predictions, convention, dirt):
    half = posts[:600]
    gold, texts = [post["keyphrases"] for post in half], [post["text"] for post in half]
    ranked = [DIRT[dirt](phrases) for phrases in predictions[: len(half)]]
    more = {"texts": texts, "train_keyphrases": train_keyphrases, "convention": convention}
    for subset, row in score_keyphrases(ranked, gold, **more, subsets=["all", "present", "absent&unseen"]).items():
        assert row == pytest.approx(plain_scores(ranked, gold, **more, subset=subset), abs=1e-12), subset
    if convention in HARMLESS.get(dirt, ()):
        clean = score_keyphrases(predictions[: len(half)], gold, convention=convention)
        assert score_keyphrases(ranked, gold, convention=convention) == clean


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


PHRASE = st.sampled_from(["dog", "Dogs", "sun set", "sun  sets", "cat", "x .", ",", "<unk> dog", "set", "", " "])
PHRASES = st.lists(PHRASE, max_size=7)
GOLD = st.lists(PHRASE.filter(str.strip), min_size=1, max_size=4)
TEXT = st.lists(st.sampled_from(["the", "Dog", "sun", "sets", "x", ".", ","]), max_size=6).map(" ".join)
POSTS = st.lists(st.tuples(PHRASES, GOLD, TEXT), min_size=1, max_size=6).map(lambda rows: tuple(zip(*rows, strict=True)))
SINGLE = ["all", "present", "absent", "seen", "unseen"]
CROSSED = ["present&seen", "present&unseen", "absent&seen", "absent&unseen"]


@pytest.mark.parametrize("convention", CONVENTIONS)
@settings(max_examples=60)
@given(POSTS, st.lists(PHRASE, max_size=3), st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True))
def test_every_convention_is_its_plain_twin(convention, posts, train, ks):
    predictions, references, texts = posts
    more = {"texts": texts, "train_keyphrases": train, "ks": ks, "convention": convention}
    for subset, row in score_keyphrases(predictions, references, **more, subsets=SINGLE + CROSSED).items():
        assert row == pytest.approx(plain_scores(predictions, references, **more, subset=subset), abs=1e-12), subset


@pytest.mark.parametrize("convention", CONVENTIONS)
@given(posts=POSTS, seed=st.integers(0, 99), cut=st.integers(0, 6))
def test_order_and_batches_of_posts_change_nothing(convention, posts, seed, cut):
    scores = score_keyphrases(*posts[:2], texts=posts[2], convention=convention)
    rows = list(zip(*posts, strict=True))
    random.Random(seed).shuffle(rows)
    predictions, references, texts = zip(*rows, strict=True)
    for subset, row in score_keyphrases(predictions, references, texts=texts, convention=convention).items():
        assert row == pytest.approx(scores[subset], abs=1e-12)
    scorer = KeyphraseScorer(convention=convention, subsets=["all", "present", "absent"], keep_posts=True)
    for part in (slice(cut), slice(cut, None)):
        scorer.add_batch(*(column[part] for column in posts))
    assert scorer.compute() == scores  # to the last bit
    for subset, kept in scorer.post_scores().items():
        assert {name: kept.score(name) for name in kept.measures()} == pytest.approx(
            {name: value for name, value in scores[subset].items() if name not in ("posts", "phrases")}, abs=1e-12
        )
        assert len(kept.positions) == scores[subset]["posts"]


@pytest.mark.parametrize("convention", CONVENTIONS)
@given(posts=POSTS, cut=st.integers(0, 6))
def test_totals_of_two_scorers_are_those_of_one(convention, posts, cut):
    scorers = [KeyphraseScorer(convention=convention, subsets=["all", "present"]) for _ in range(3)]
    for scorer, part in zip(scorers, (slice(cut), slice(cut, None)), strict=False):
        scorer.add_batch(*(column[part] for column in posts))
        scorers[2].add_totals(scorer.totals())
    expected = score_keyphrases(*posts[:2], texts=posts[2], convention=convention, subsets=["all", "present"])
    for subset, row in scorers[2].compute().items():
        assert row == pytest.approx(expected[subset], abs=1e-12)


def test_totals_that_do_not_fit_are_refused():
    scorer, other = KeyphraseScorer(ks=[1]), KeyphraseScorer(ks=[2])
    for one in (scorer, other):
        one.add_batch([["a"]], [["a"]])
    with pytest.raises(ValueError, match="other cut-offs"):
        scorer.add_totals(other.totals())
    with pytest.raises(ValueError, match="do not fit"):
        scorer.add_totals(KeyphraseScorer(subsets=["all", "present"]).totals())
    with pytest.raises(ValueError, match="keep_posts"):
        KeyphraseScorer(keep_posts=True).add_totals(scorer.totals())
    assert scorer.compute()["all"]["posts"] == 1


@given(POSTS)
def test_case_and_repeats_change_nothing_by_cmkp(posts):
    predictions, references, _ = posts
    loud = [[phrase.upper().replace("<UNK>", "<unk>") for phrase in row for _ in range(2)] for row in predictions]
    scores = score_keyphrases(predictions, references)["all"]
    assert score_keyphrases(loud, [gold * 2 for gold in references])["all"] == scores
    for name, value in scores.items():
        assert name in ("posts", "phrases") or 0 <= value <= 1


@pytest.mark.parametrize("convention", CONVENTIONS)
@given(gold=st.lists(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=5, unique=True), min_size=1, max_size=5))
def test_a_perfect_prediction_scores_1(convention, gold):
    row = score_keyphrases(gold, gold, ks=[1, 5], convention=convention)["all"]
    # P@5 of a short list is below 1 where it is padded, R@1 of several gold phrases everywhere.
    ones = {"p@1", "ndcg@1", "r@5", "ndcg@5", "map@5"}
    ones |= {"cmkp": {"p@5", "f1@5", "micro_f1@5"}, "unpadded": {"p@5", "f1@5"}}.get(convention, set())
    ones |= {"f1@m", "f1@o", "r_precision"} if convention in ("padded", "unpadded") else set()
    assert {name: row[name] for name in ones} == pytest.approx(dict.fromkeys(ones, 1.0))


@given(POSTS, st.integers(1, 6))
def test_dropping_a_wrong_last_prediction_never_lowers_unpadded_p(posts, k):
    predictions, references, _ = posts
    before = score_keyphrases([[*row, "wrong"] for row in predictions], references, ks=[k], convention="unpadded")["all"]
    after = score_keyphrases(predictions, references, ks=[k], convention="unpadded")["all"]
    for name in (f"p@{k}", f"f1@{k}", "p@m", "f1@m"):
        assert after[name] >= before[name]


@given(POSTS)
def test_conventions_agree_where_they_must(posts):
    # On distinct gold phrases and full lists of distinct clean predictions only the mean of F1 tells them apart.
    references = [list(dict.fromkeys(map(stem_phrase, row))) for row in posts[1]]
    clean = [[p for p in dict.fromkeys(map(stem_phrase, row)) if p.isalpha()] for row in posts[0]]
    predictions = [row + [f"filler{letter}" for letter in "abcdefg"] for row in clean]
    rows = {name: score_keyphrases(predictions, references, convention=name)["all"] for name in CONVENTIONS}
    for k in KS:
        for measure in (f"p@{k}", f"r@{k}"):
            assert len({round(row[measure], 12) for row in rows.values()}) == 1
        assert rows["aimkp"][f"f1@{k}"] == pytest.approx(rows["padded"][f"f1@{k}"])
        assert rows["unpadded"][f"f1@{k}"] == pytest.approx(rows["padded"][f"f1@{k}"])
        assert rows["cmkp"][f"map@{k}"] == pytest.approx(rows["padded"][f"map@{k}"])
    one = [score_keyphrases(predictions[:1], references[:1], convention=name)["all"]["f1@3"] for name in CONVENTIONS]
    assert one == pytest.approx(one[:1] * 4)  # of a single post, the mean of F1 is the F1 of the means


def test_crossings_by_hand():
    scores = score_keyphrases(
        [["dog", "cat", "sun"]],
        [["cat", "sea"]],
        texts=["a dog and a cat"],
        train_keyphrases=["dog"],
        subsets=["present&unseen", "absent&unseen", "unseen&present", "all&present"],
        ks=[1],
    )
    assert (scores["present&unseen"]["p@1"], scores["present&unseen"]["phrases"]) == (1, 1)
    assert scores["unseen&present"] == scores["present&unseen"]
    assert scores["absent&unseen"]["p@1"] == 0
    assert scores["all&present"]["p@1"] == 0


def test_ndcg_by_hand():
    # One of two gold phrases at rank 1: the best order of the predictions, not the best possible.
    predictions, references = [["a", "x"]], [["a", "b"]]
    assert score_keyphrases(predictions, references, ks=[2])["all"]["ndcg@2"] == 1
    for convention in ("aimkp", "padded", "unpadded"):
        row = score_keyphrases(predictions, references, ks=[2], convention=convention)["all"]
        assert row["ndcg@2"] == pytest.approx(1 / (1 + 0.6309297535714574))  # 1 / (1/log2(2) + 1/log2(3))


def test_aimkp_by_hand():
    row = score_keyphrases([["a", "a", "x"]], [["a", "b", "b"]], ks=[1, 2, 5], convention="aimkp")["all"]
    assert (row["p@2"], row["r@2"], row["p@5"]) == (0.5, 1 / 3, 0.2)  # the gold phrases as listed, the cut padded
    assert row["map@5"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    # One phrase alone is optimal.
    assert score_keyphrases([["a"]], [["a", "b"]], convention="aimkp")["all"]["map@5"] == 1


WHATEVER = st.text(max_size=12)
WHATEVER_GOLD = st.lists(WHATEVER.filter(normal), min_size=1, max_size=3)
WHATEVER_POST = st.tuples(st.lists(WHATEVER, max_size=4), WHATEVER_GOLD, WHATEVER)


@pytest.mark.parametrize("convention", CONVENTIONS)
@given(st.lists(WHATEVER_POST, min_size=1, max_size=3))
def test_any_unicode_equals_the_plain_twin(convention, posts):
    predictions, references, texts = zip(*posts, strict=True)
    more = {"texts": texts, "train_keyphrases": predictions[0], "ks": [2], "convention": convention}
    for subset, row in score_keyphrases(predictions, references, **more, subsets=SINGLE).items():
        assert row == pytest.approx(plain_scores(predictions, references, **more, subset=subset), abs=1e-12), subset


def test_a_phrase_of_a_megabyte_has_a_score_and_is_not_kept():
    long_word, long_phrase = "running" * 150_000, "dogs ran " * 120_000
    began = time.process_time()
    predictions, references = [[long_word, long_phrase], ["dog"]], [[long_word], [long_phrase]]
    scores = score_keyphrases(predictions, references, texts=["a", long_phrase], train_keyphrases=[long_word])
    assert time.process_time() - began < 10
    assert scores["all"]["r@1"] == scores["seen"]["r@1"] * 0.5 == 0.5
    assert scores["present"]["posts"] == 1
    assert max(map(len, scoring._stems)) <= 64


def test_memory_does_not_grow_with_posts():
    def peak(batches: int) -> int:
        scorer = KeyphraseScorer(subsets=["all", "present", "absent"])
        tracemalloc.start()
        for batch in range(batches):
            rows = [[f"word{batch * 500 + i}", "dog"] for i in range(500)]
            scorer.add_batch(rows, [["dog"]] * 500, ["a dog"] * 500)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert scorer.compute()["all"]["posts"] == 500 * batches
        return size

    peak(1)
    # The cache of stems is bounded, but not full yet: some 200 bytes per new word.
    assert peak(12) < peak(2) + 12 * 500 * 300


def test_the_cache_of_stems_is_bounded():
    cache = scoring._StemCache({f"word{number}": "word" for number in range(1 << 17)})
    assert cache["running"] == "run"
    assert len(cache) == 1


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
        ([["a"]], [[]], {}, ValueError, r"references\[0\]=\[\] must contain at least one keyphrase"),
        ([["a"]], [["a", " "]], {}, ValueError, r"references\[0\]=.* no empty one"),
        ([["a"]], [["a"]], {"ks": [0]}, ValueError, r"ks=\[0\]"),
        ([["a"]], [["a"]], {"ks": [1.5]}, ValueError, r"ks=\[1.5\]"),
        ([["a"]], [["a"]], {"ks": [True]}, ValueError, r"ks=\[True\]"),
        ([["a"]], [["a"]], {"ks": 5}, TypeError, r"ks=5 must be a list of cut-offs"),
        ([[float("nan")]], [["a"]], {}, TypeError, r"predictions\[0\]\[0\] must be a string, got float: nan"),
        ([float("nan")], [["a"]], {}, TypeError, r"predictions\[0\] must be a list of strings, got float: nan"),
        ([["a"]], [["a"], []], {}, ValueError, "predictions has 1 posts and references has 2"),
        ([["a"]], [["a"]], {"texts": [float("nan")]}, TypeError, r"texts\[0\] must be a string, got float"),
        ([["a"]], [["a"]], {"train_keyphrases": [["a"]]}, TypeError, r"train_keyphrases\[0\] must be a string, got list"),
        ([["a"]], [["a"]], {"subsets": ["absent"]}, ValueError, "the subset 'absent' needs texts"),
        ([["a"]], [["a"]], {"subsets": ["present&unseen"], "texts": ["a"]}, ValueError, "'unseen' needs train_keyphrases"),
        ([["a"]], [["a"]], {"subsets": ["present&absent"], "texts": ["a"]}, ValueError, "both absent and present"),
        ([["a"]], [["a"]], {"subsets": ["rare"]}, ValueError, "'rare' is not known: use all, present"),
        ([["a"]], [["a"]], {"subsets": "all"}, TypeError, "subsets='all' is a string"),
        ([["a"]], [["a"]], {"convention": "CMKP"}, ValueError, "convention='CMKP' is not known: use one of cmkp, aimkp"),
    ],
)
def test_what_cannot_be_scored_is_refused(predictions, references, more, error, message):
    with pytest.raises(error, match=message):
        score_keyphrases(predictions, references, **more)


def test_a_refused_batch_leaves_the_scorer_as_it_was():
    scorer = KeyphraseScorer(ks=[1])
    scorer.add_batch([["a"]], [["a"]])
    with pytest.raises(ValueError, match=r"references\[1\]"):
        scorer.add_batch([["b"], ["b"]], [["a"], []])
    assert scorer.compute()["all"]["posts"] == 1
    with pytest.raises(ValueError, match="keep_posts=True"):
        scorer.post_scores()


def test_cmkp_s_test_set_takes_under_0_4_s_of_cpu_cold(shared):
    # In a process of its own, import included; the 2020 evaluator takes 3.9 s.
    code = """
import json, sys, time
posts = [json.loads(line) for line in open(sys.argv[1] + "/test.jsonl", encoding="utf-8")]
ranked = [line.rstrip("\\n").split("\\t")[1].split(";") for line in open(sys.argv[1] + "/best_pred.txt", encoding="utf-8")]
gold, texts = [post["keyphrases"] for post in posts], [post["text"] for post in posts]
began = time.process_time()
from dynkp.mmkp_f1.scoring import score_keyphrases
scores = score_keyphrases(ranked + ranked, gold, texts=texts)
print(time.process_time() - began, scores["all"]["posts"])
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", code, str(shared / "data/cmkp")], check=True, capture_output=True, text=True, timeout=60
        ).stdout.split()
        for _ in range(2)
    ]
    assert {posts for _, posts in runs} == {"5372"}
    assert min(float(seconds) for seconds, _ in runs) < 0.4


def test_scoring_needs_no_torch():
    code = (
        "import sys; from dynkp.mmkp_f1.scoring import score_keyphrases; score_keyphrases([['a']], [['a']]); "
        "assert not {'torch', 'nltk', 'evaluate', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- spellings ---


@pytest.mark.parametrize("convention", ["cmkp", "aimkp", "padded", "unpadded"])
@pytest.mark.parametrize("spellings", SPELLINGS, ids=lambda spellings: spellings[0])
def test_equivalent_spellings_score_alike_in_gold_predictions_texts_and_training_keyphrases(spellings, convention):
    plain, *others = spellings
    expected = score_keyphrases([[plain]], [[plain]], texts=[f"a {plain} b"], train_keyphrases=[plain], convention=convention)
    assert expected["all"]["f1@1"] == 1 and expected["present"]["posts"] == expected["seen"]["posts"] == 1
    for other in others:
        for predicted, gold, text, train in (
            (other, plain, plain, plain),
            (plain, other, plain, plain),
            (other, other, plain, plain),
            (plain, plain, plain, other),
            (plain, plain, other.replace("#", "").replace("\uff03", "").replace("\ufe5f", ""), plain),
        ):
            scores = score_keyphrases(
                [[predicted]], [[gold]], texts=[f"a {text} b"], train_keyphrases=[train], convention=convention
            )
            assert scores == expected
    repeated = score_keyphrases([list(spellings)], [[plain, *others]], convention=convention)
    assert repeated["all"]["phrases"] == (len(spellings) if convention == "aimkp" else 1)


def test_a_gold_phrase_of_number_signs_alone_is_empty():
    with pytest.raises(ValueError, match="no empty one"):
        score_keyphrases([["a"]], [["#"]])
