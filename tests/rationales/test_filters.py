"""Invariants of the filters: each rejects what it is for, and not the same words in a valid rationale; a rationale is counted
under the first filter that rejects it; a filter that is off rejects nothing; real response chains pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynkp.data.reasoning_tasks import REASONING_TASKS
from dynkp.data.sources import load_masc_posts
from dynkp.rationales.filters import DEFAULT_FILTERS, FILTERS, RationaleFilter, mentions_any

GOOD = "The picture shows a beagle that runs after a ball, so people who like dogs and beagles would look for it."


def first_rejection(text: str, *names: str, **options: object) -> str | None:
    rationale_filter = RationaleFilter(names or tuple(FILTERS), field_names=["Keyphrases", "Post text", "Image"], max_words=100)
    return rationale_filter(text, keyphrases=["beagle"], **options)


def test_a_valid_rationale_passes() -> None:
    assert first_rejection(GOOD, finish_reason="stop") is None


@pytest.mark.parametrize("text", ["", "  \n", "<think></think>"])
def test_empty(text: str) -> None:
    assert first_rejection(text) == "empty"


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, I cannot assist with this request.",
        "Sorry, but I am not able to analyze images of people.",
        "I cannot identify the people in this image.",
        "I can't provide an explanation for these hashtags.",
        "I am unable to view images.",
        "As an AI language model, I do not have opinions.",
        "I apologize, but this content is not something I can discuss.",
        "I won't create content of this kind.",
        "I don't feel comfortable explaining this.",
    ],
)
def test_refusals(text: str) -> None:
    assert first_rejection(text) == "refusal"


@pytest.mark.parametrize(
    "text",
    [
        "The author says: I'm sorry, but I can't help loving this beagle, and people who feel alike look for such posts.",
        "I can see a beagle in the image, which is why social media users would use this hashtag for the post.",
        "Sorry seems to be the hardest word: the beagle post quotes a song that its readers know and would look for.",
        "I think the author would use beagle since the dog in the picture is one, and its owners look for it.",
    ],
)
def test_the_words_of_a_refusal_are_not_one(text: str) -> None:
    assert first_rejection(text) is None


def test_lengths() -> None:
    assert first_rejection("A beagle plays.") == "too_short"
    assert first_rejection("beagle " * 101) == "too_long"
    assert first_rejection("beagle " * 100) is None
    for reason in ("length", "max_tokens", "content_filter", "tool_calls", "abort", "error", "a new one", "", None):
        assert first_rejection(GOOD, finish_reason=reason) == "cut_off", reason
    for reason in ("stop", "STOP", "end_turn", "eos_token"):
        assert first_rejection(GOOD, finish_reason=reason) is None, reason


@pytest.mark.parametrize(
    "text",
    [
        f'The "Post text" speaks of a dog. {GOOD}',
        f"{GOOD} “Keyphrases” are apt.",
        f"Keyphrases: beagle\n{GOOD}",
        f"**Image** {GOOD}",
    ],
)
def test_field_names(text: str) -> None:
    assert first_rejection(text) == "field_names"


def test_the_words_of_a_field_name_are_not_one() -> None:
    assert first_rejection(f"The image and its post text fit. {GOOD}") is None


def test_gold_phrases() -> None:
    assert first_rejection(GOOD.replace("beagle", "dog")) == "no_gold_phrase"
    assert first_rejection(GOOD.replace("beagle", "dog"), *DEFAULT_FILTERS) is None


@pytest.mark.parametrize(
    ("text", "phrase", "found"),
    [
        ("Happy Friday to all", "happy friday", True),
        ("#HappyFriday!", "happy friday", True),
        ("a happy-friday mood", "Happy Friday", True),
        ("happy fridays", "happy friday", False),
        ("the aisle", "ai", False),
        ("The AI.", "ai", True),
        ("C++ (fun)", "c++", True),
        ("Größe zählt", "GRÖSSE", True),
        ("anything", "+++", False),
    ],
)
def test_mentions(text: str, phrase: str, found: bool) -> None:
    assert mentions_any(text, ["something else", phrase]) is found


def test_wrong_predictions() -> None:
    rationale_filter = RationaleFilter(["wrong_prediction"], reasoning_task=REASONING_TASKS["masc"])
    assert rationale_filter('"Prediction": positive', answer="positive") is None
    assert rationale_filter('"Prediction": positive', answer="neutral") == "wrong_prediction"
    assert rationale_filter("no prediction", answer="neutral") == "wrong_prediction"


def test_real_chains_pass(shared: Path) -> None:
    rationales = [row["rationale"] for row in load_masc_posts(shared / "data/masc_t15/test.jsonl") if row["rationale"]]
    rationale_filter = RationaleFilter(["empty", "refusal", "too_short", "too_long"])
    assert len(rationales) > 500
    assert [text for text in rationales if rationale_filter(text)] == []


def test_a_filter_that_is_off_rejects_nothing() -> None:
    for text in ("", "I'm sorry, but I can't.", "x", '"Post text"'):
        rationale_filter = RationaleFilter([], field_names=["Post text"])
        assert rationale_filter(text, keyphrases=["dog"], finish_reason="length") is None


def test_options() -> None:
    with pytest.raises(ValueError, match=r"filters=\['emty'\] are not known"):
        RationaleFilter(["emty"])
    with pytest.raises(ValueError, match="min_words=5 must be from 0 to max_words=4"):
        RationaleFilter(min_words=5, max_words=4)
