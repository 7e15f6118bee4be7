"""Invariants of the evaluation of systems (the command and published figures: tests/cli/test_evaluate.py):

- posts that cannot be scored are listed; two systems cannot have one name, nor one system two modalities;
- systems are compared with the first one, those added after a comparison too; without resamples there is no comparison;
- means of outputs are taken over the rows that exist, and only of columns that all of them have.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynkp import score_keyphrases
from dynkp.report.evaluation import Evaluation, check_ids, gold_posts, output_means

POSTS = [
    {"id": "a", "text": "my dog at the sea", "keyphrases": ["dog", "summer"]},
    {"id": "b", "text": "goal!", "keyphrases": ["mufc"]},
    {"id": "c", "text": "rain in the city", "keyphrases": ["storm hour"]},
]
ROWS: list[dict[str, Any]] = [
    {"id": "c", "keyphrases": ["sun", "storms hour"]},
    {"id": "a", "keyphrases": ["dogs"]},
    {"id": "b", "keyphrases": []},
]


@pytest.mark.parametrize(
    ("posts", "message"),
    [
        ([], "there are no posts to score"),
        ([POSTS[0], POSTS[1], POSTS[0]], "several posts have the same id: 'a'"),
        ([POSTS[0], {"id": "x", "keyphrases": []}, {"id": "y", "keyphrases": [" "]}], "without keyphrases, .*: 'x', 'y'"),
        ([POSTS[0], {"id": "x", "keyphrases": ["dog", " "]}], "posts with an empty keyphrase: 'x'. Remove"),
    ],
)
def test_posts_that_cannot_be_scored_are_listed(posts: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gold_posts(posts)


def test_ids_are_checked_as_they_are() -> None:
    check_ids(["a", "A", "a "])
    with pytest.raises(ValueError, match="there are no posts"):
        check_ids([])


def test_systems_need_names_of_their_own() -> None:
    evaluation = Evaluation(gold_posts(POSTS), resamples=0)
    evaluation.add("x", ROWS)
    with pytest.raises(ValueError, match="two systems are called 'x'"):
        evaluation.add("x", ROWS)


def test_scores_are_the_metric_s_whatever_the_order_of_the_rows() -> None:
    evaluation = Evaluation(gold_posts(POSTS), resamples=0)
    evaluation.add("x", ROWS)
    lists, gold = [["dogs"], [], ["sun", "storms hour"]], [post["keyphrases"] for post in POSTS]
    scores = score_keyphrases(lists, gold, texts=[post["text"] for post in POSTS])
    assert evaluation.report()["subsets"] == scores and "intervals" not in evaluation.report()


@pytest.mark.parametrize("predicted", ["#storm hour", "\uff03storm hour", "\u200fstorm  hour\u200b", "storm hour"])
def test_predictions_of_a_file_are_normalised_as_gold_is(predicted: str) -> None:
    evaluation = Evaluation(gold_posts([{"id": "a", "text": "", "keyphrases": ["#storm hour"]}]), resamples=0)
    evaluation.add("x", [{"id": "a", "keyphrases": [predicted]}])
    assert evaluation.report()["subsets"]["all"]["f1@1"] == 1


def test_a_system_has_one_modality() -> None:
    evaluation = Evaluation(gold_posts(POSTS), resamples=0)
    rows = [{**row, "modality": modality} for row, modality in zip(ROWS, ("text", "image", "text"), strict=True)]
    with pytest.raises(ValueError, match="system 'x' has predictions from 'image' and 'text'"):
        evaluation.add("x", rows)
    assert evaluation.systems == {}


def test_systems_are_compared_with_the_first() -> None:
    evaluation = Evaluation(gold_posts(POSTS), resamples=20, ks=[1], subsets=["all", "absent"])
    evaluation.add("first", ROWS)
    assert evaluation.comparisons() == []
    evaluation.add("second", [{**row, "keyphrases": []} for row in ROWS])
    measures = [("all", "f1@1"), ("all", "map@1"), ("all", "ndcg@1"), ("absent", "f1@1")]
    assert [(row["second"], row["subset"], row["measure"]) for row in evaluation.comparisons()] == [
        ("second", *pair) for pair in measures
    ]
    evaluation.add("third", ROWS)
    assert [row["second"] for row in evaluation.comparisons()] == ["second"] * 4 + ["third"] * 4
    assert {row["difference"] for row in evaluation.comparisons()[4:]} == {0.0}
    without = Evaluation(gold_posts(POSTS), resamples=0)
    without.add("first", ROWS)
    without.add("second", ROWS)
    assert without.comparisons() == [] and without.report()["comparisons"] == []


def test_every_post_s_scores_are_written(tmp_path: Path) -> None:
    evaluation = Evaluation(gold_posts(POSTS), resamples=0, subsets=["all", "present"])
    evaluation.add("x", ROWS)
    evaluation.write_posts(tmp_path / "new" / "posts.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "new" / "posts.jsonl").read_text().splitlines()]
    assert [(row["id"], row["system"], list(row["scores"])) for row in rows] == [
        ("a", "x", ["all", "present"]),
        ("b", "x", ["all"]),
        ("c", "x", ["all"]),
    ]
    assert [row["scores"]["all"]["p@1"] for row in rows] == [1, 0, 0]


def test_means_of_outputs() -> None:
    filled_in: dict[str, Any] = {"id": "d", "keyphrases": []}
    rows = [
        {"id": "a", "keyphrases": ["x"], "reasoned": True, "output_words": 4, "raw": "x"},
        {"id": "b", "keyphrases": [], "reasoned": False, "output_words": 1, "output_tokens": 2, "raw": " "},
    ]
    means = {"reasoning_share": 0.5, "output_words": 2.5, "unparsable_share": 0.0}
    assert output_means([*rows, filled_in]) == means  # not every row has output_tokens
    assert output_means([filled_in]) == output_means([]) == {}
