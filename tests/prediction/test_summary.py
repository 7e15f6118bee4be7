"""A run's closing line counts what its rows hold, for keyphrases and for answers to MulCoT-RD's prompts."""

from __future__ import annotations

from dynkp.prediction.summary import summarize_predictions


def test_keyphrases() -> None:
    rows = [
        {"keyphrases": ["a"], "reasoned": True, "output_words": 2},
        {"keyphrases": [], "reasoned": False, "output_words": 5},
        {"keyphrases": ["b"], "reasoned": False, "output_words": 2},
    ]
    assert summarize_predictions(rows) == "33.3% reasoned, 3.0 words each, 33.3% without keyphrase"


def test_answers_of_reasoning_tasks() -> None:
    rows = [{"prediction": "positive", "output_words": 2}, {"prediction": None, "output_words": 1, "keyphrases": []}]
    assert summarize_predictions(rows) == "1.5 words each, 50.0% unread"


def test_no_rows() -> None:
    assert summarize_predictions([]) == "0.0% reasoned, 0.0 words each, 0.0% without keyphrase"
