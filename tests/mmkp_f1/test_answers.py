"""Invariants of the parser of outputs (of targets and any string: tests/data/test_tasks.py): outputs are parsed as documented,
in linear time; `answer_phrases` gives the same keyphrases with repeats; words are counted without tags.
"""

from __future__ import annotations

import time

import pytest

from dynkp.mmkp_f1.answers import answer_phrases, count_words, parse_answer


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
        ("a; <think>cut off; b", ["a"]),
        ("<think>cut off", []),
        ("opened by the template</think>a", ["a"]),
        ("<think>why</think><answer>a; b", ["a", "b"]),
        ("<think>why</think></think>a</answer>", ["a"]),
        ("<ans</answer>wer>", ["<ans", "wer>"]),
    ],
)
def test_parsed_as_documented(output, keyphrases):
    assert parse_answer(output).keyphrases == keyphrases


def test_another_separator():
    assert parse_answer("a; b, c", separator=", ").keyphrases == ["a; b", "c"]


@pytest.mark.parametrize(
    "unit",
    ["<think>", "</think>", "<answer>", "</answer>", "<think></think>", "<answer></think>", "#", "# ", "x# ", ";"],
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
