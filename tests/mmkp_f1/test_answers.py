"""Invariants of the parser of outputs (of targets and any string: tests/data/test_tasks.py): outputs are parsed as documented,
in linear time; `answer_phrases` gives the same keyphrases with repeats; words are counted without tags. Normalisation makes
equivalent spellings of a keyphrase equal, in linear time, and changes nothing when it is applied again.
"""

from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynkp.mmkp_f1.answers import answer_phrases, canonical_text, count_words, normalise_phrase, parse_answer
from tests.support.spellings import SPELLINGS


@pytest.mark.parametrize(
    ("output", "keyphrases"),
    [
        ("a; b", ["a", "b"]),
        ("#a;  #b ;; # ; a;A", ["a", "b", "A"]),
        ("\u3000a\xa0;\tb\n", ["a", "b"]),
        ("", []),
        ("<think>why</think><answer>a; b</answer>", ["a", "b"]),
        ("<think>why</think>a; b", ["a", "b"]),
        ("so <answer>a</answer><answer>b</answer>", ["a"]),
        ("<answer>a<think>c</think>; b</answer>", ["a", "b"]),
        ("<think>no <answer>a</answer>", ["a"]),  # "the first <answer>…</answer> if there is one"
        ("a<think>x</think>; b<think>y</think>; c", ["a", "b", "c"]),
        ("<think>not <answer>x</answer> but</think><answer>a; b</answer>", ["a", "b"]),
        ("not <answer>x</answer> but</think><answer>a</answer>", ["a"]),  # opened by the template
        ("<think>not <answer>x</answer></think>a", ["a"]),
        ("<answer>x</answer><think>why</think><answer>a</answer>", ["a"]),
        ("<answer>a</answer><think>why</think>", ["a"]),  # none behind </think>
        ("<think>x</think>so <think>not <answer>y</answer></think><answer>a</answer>", ["a"]),
        ("<think>why</think><answer>a</answer></think>", ["a"]),
        ("<think>why</think><answer>a</answer><think>or <answer>b", ["a"]),
        ("<think>why <answer>x</answer></think>", []),
        ("a; <think>cut off; b", ["a"]),
        ("<think>cut off", []),
        ("opened by the template</think>a", ["a"]),
        ("<think>why</think><answer>a; b", ["a", "b"]),
        ("<think>why</think></think>a</answer>", ["a"]),
        ("<ans</answer>wer>", ["<ans", "wer>"]),
        ("\uff03a;\u200f#b\u200b", ["a", "b"]),
        ("cafe\u0301; caf\u00e9", ["caf\u00e9"]),
        ("a\u037eb", ["a", "b"]),  # the Greek question mark is ";" in NFC
    ],
)
def test_parsed_as_documented(output, keyphrases):
    assert parse_answer(output).keyphrases == keyphrases


def test_another_separator():
    assert parse_answer("a; b, c", separator=", ").keyphrases == ["a; b", "c"]


@pytest.mark.parametrize(
    "unit",
    [
        "e\u0301\u0316",
        "\u0301\u0316",
        "\u200d#",
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "<think></think>",
        "<answer></think>",
        "#",
        "# ",
        "x# ",
        ";",
    ],
)
def test_a_megabyte_of_markup_takes_no_second(unit):
    output = unit * (1_000_000 // len(unit)) + "a" + unit * 1000
    start = time.process_time()
    parse_answer(output)
    assert time.process_time() - start < 1


def test_output_must_be_text():
    with pytest.raises(TypeError, match="output must be a string, got list"):
        parse_answer(["a"])


def test_repeats_are_kept_on_request():
    output = "<think>a dog</think>dogs; #dogs; cats;; dogs"
    assert answer_phrases(output) == ["dogs", "dogs", "cats", "dogs"]
    assert parse_answer(output).keyphrases == ["dogs", "cats"]


def test_words_are_counted_without_tags():
    assert count_words("<think>A dog.</think><answer>beagles; big dogs</answer>") == 5
    assert count_words(" <think></think>\n") == 0


@pytest.mark.parametrize("spellings", SPELLINGS, ids=lambda spellings: spellings[0])
def test_equivalent_spellings_are_one_keyphrase(spellings):
    assert {normalise_phrase(spelling) for spelling in spellings} == {spellings[0]}
    assert parse_answer("; ".join(spellings)).keyphrases == [spellings[0]]


@pytest.mark.parametrize(
    "phrase", ["c#", "C #1", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u0646\u200c\u0627", "#\u20e3".strip("#") + "a"]
)
def test_characters_inside_a_keyphrase_are_kept(phrase):
    inside = f"a{phrase}b"
    assert normalise_phrase(inside) == inside


@given(st.text(alphabet=st.sampled_from("a #\uff03\u0301\u0316\u0958\u1100\u1161\u200d\u200f;<>\u0338\u212b"), max_size=80))
def test_normalising_again_changes_nothing(text):
    phrase = normalise_phrase(text)
    assert normalise_phrase(phrase) == phrase
    assert canonical_text(canonical_text(text)) == canonical_text(text)
    if len(text) < 32:
        assert canonical_text(text) == unicodedata.normalize("NFC", text)
