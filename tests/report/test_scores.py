"""Invariants of a training run's scores: they are those of `Evaluation` on the same rows, by any convention; predictions and
posts are matched by id; the table has a row per system and skips subsets that no system has."""

from __future__ import annotations

from typing import Any

import pytest

from dynkp.mmkp_f1.scoring import CONVENTIONS
from dynkp.report.evaluation import Evaluation, gold_posts
from dynkp.report.scores import comparison_table, score_predictions

POSTS = [
    {"id": "a", "text": "my dog at the sea", "keyphrases": ["dog", "summer"]},
    {"id": "b", "text": "goal!", "keyphrases": ["mufc"]},
]
ROWS: list[dict[str, Any]] = [
    {"id": "b", "keyphrases": ["mufc", "goal"], "reasoned": True, "output_words": 9},
    {"id": "a", "keyphrases": ["dogs"], "reasoned": False, "output_words": 2},
]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_scores_are_those_of_the_evaluation(convention: str) -> None:
    evaluation = Evaluation(gold_posts(POSTS), train_keyphrases=["dog"], convention=convention, resamples=0)
    evaluation.add("mine", ROWS)
    scores = score_predictions(ROWS, POSTS, ["dog"], convention=convention)
    assert scores.items() <= evaluation.report().items()
    assert (scores["convention"], scores["posts"], scores["reasoning_share"], scores["output_words"]) == (
        convention,
        2,
        0.5,
        5.5,
    )
    assert list(scores["subsets"]) == ["all", "present", "absent", "seen", "unseen"]
    assert "seen" not in score_predictions(ROWS, POSTS, None)["subsets"]


def test_the_default_convention_is_cmkp() -> None:
    assert score_predictions(ROWS, POSTS, None) == score_predictions(ROWS, POSTS, None, convention="cmkp")


@pytest.mark.parametrize(("rows", "message"), [(ROWS[:1], "missing ids: 'a'"), ([*ROWS, ROWS[0]], "repeated ids: 'b'")])
def test_rows_that_do_not_match_are_listed(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_predictions(rows, POSTS, None)


def test_the_table() -> None:
    systems = {"mine": score_predictions(ROWS, POSTS, ["dog"]), "none": score_predictions(ROWS, POSTS, ["dog"])}
    del systems["none"]["output_words"], systems["none"]["reasoning_share"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in comparison_table(systems).splitlines()]
    assert rows[0] == [
        *("system", "F1@1 all (2 posts)", "F1@1 seen (1 posts)", "F1@1 unseen (2 posts)", "P@1 all"),
        *("reasoning", "output words", "no keyphrase"),
    ]
    f1 = f"{100 * systems['mine']['subsets']['all']['f1@1']:.2f}"
    assert rows[2][:2] == ["mine", f1] and rows[2][-3:] == ["50.00", "5.5", "0.00"]
    assert rows[3][:2] == ["none", f1] and rows[3][-3:] == ["-", "-", "0.00"]
    assert "seen" not in comparison_table({"mine": score_predictions(ROWS, POSTS, None)})
