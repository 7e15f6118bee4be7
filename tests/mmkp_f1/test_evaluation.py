"""Invariants of the dictionary of all scores (the metric that returns it: tests/mmkp_f1/test_mmkp_f1.py): its parts are those
of the functions that compute them; subsets follow from the inputs; raw outputs give the scores of their parsed keyphrases.
"""

from __future__ import annotations

import pytest

from dynkp.mmkp_f1.evaluation import allowed_subsets, evaluate_keyphrases
from dynkp.mmkp_f1.outputs import list_statistics, output_statistics
from dynkp.mmkp_f1.scoring import SUBSETS, KeyphraseScorer, score_keyphrases
from dynkp.mmkp_f1.significance import bootstrap_intervals

PREDICTIONS, GOLD, TEXTS = [["dogs", "cats"], ["sun"], []], [["dog"], ["rain"], ["sea"]], ["my dog", "a cloud", "the sea"]
OUTPUTS = ["<think>A dog.</think><answer>dogs; cats</answer>", "sun", "<think>cut off"]


def test_the_parts_are_those_of_their_functions():
    inputs = {"texts": TEXTS, "train_keyphrases": ["dog"], "convention": "padded", "ks": [1, 2]}
    result = evaluate_keyphrases(PREDICTIONS, GOLD, **inputs, confidence=0.9, resamples=50, seed=3)
    assert (result["convention"], result["posts"]) == ("padded", 3)
    assert result["subsets"] == score_keyphrases(PREDICTIONS, GOLD, **inputs)
    assert list_statistics(PREDICTIONS).items() <= result.items()
    scorer = KeyphraseScorer(ks=[1, 2], convention="padded", keep_posts=True)
    scorer.add_batch(PREDICTIONS, GOLD)
    intervals = bootstrap_intervals(scorer.post_scores()["all"], confidence=0.9, resamples=50, seed=3)
    assert result["intervals"]["subsets"]["all"] == {name: [found.low, found.high] for name, found in intervals.items()}
    assert "intervals" not in evaluate_keyphrases(PREDICTIONS, GOLD)


def test_raw_outputs_are_parsed():
    result = evaluate_keyphrases(OUTPUTS, GOLD, texts=TEXTS, parse=True, count_tokens=len)
    assert result["subsets"] == score_keyphrases(PREDICTIONS, GOLD, texts=TEXTS)
    assert output_statistics(OUTPUTS, count_tokens=len).items() <= result.items()


def test_subsets_follow_from_the_inputs():
    assert allowed_subsets(texts=True, train_keyphrases=True) == list(SUBSETS)
    assert allowed_subsets(texts=False, train_keyphrases=False) == ["all"]
    assert list(evaluate_keyphrases(PREDICTIONS, GOLD, texts=TEXTS)["subsets"]) == ["all", "present", "absent"]
    assert list(evaluate_keyphrases(PREDICTIONS, GOLD, subsets=["all"], texts=TEXTS)["subsets"]) == ["all"]


@pytest.mark.parametrize("confidence", [0, 1, 95, -0.5])
def test_the_confidence_is_checked(confidence):
    with pytest.raises(ValueError, match=f"confidence={confidence} must be between 0 and 1"):
        evaluate_keyphrases(PREDICTIONS, GOLD, confidence=confidence)
