"""Invariants of prompts, targets and the answer parser:

- keyphrases written into a direct or reasoning target are read back unchanged, whatever the rationale contains;
- exactly the keyphrases that would not be are refused, with the reason;
- any string is parsed, in linear time, into stripped, non-empty, distinct keyphrases;
- prompts hold as many image placeholders as images, before the text, and never the gold.
"""

from __future__ import annotations

import sys
import time

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from dynkp.data import tasks as prompts
from dynkp.data.tasks import TASKS, KeyphraseTask, count_words, keyphrase_problem, parse_answer, resolve_task

SEPARATORS = st.sampled_from(["; ", ", ", ";", " | ", "\t&"])
# Text in which the markup is as likely as a letter.
MARKED_UP = st.lists(
    st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "<", ">", "/", "think", ";", ",", "#", " ", "\n"])
    | st.text(max_size=3)
).map("".join)


@given(st.data(), SEPARATORS)
def test_targets_read_back(data, separator):
    task = KeyphraseTask("any", "?", separator)
    valid = (st.text() | MARKED_UP).filter(lambda phrase: keyphrase_problem(phrase, separator) is None)
    keyphrases = data.draw(st.lists(valid, min_size=1, max_size=5, unique=True))
    assert task.parse(task.direct_target(keyphrases)) == (keyphrases, False)
    rationale = data.draw((st.text() | MARKED_UP).filter(str.strip))
    assert task.parse(task.reasoning_target(keyphrases, rationale)) == (keyphrases, True)


@given(st.text() | MARKED_UP, SEPARATORS)
@example("c#", "; ")
@example("<answer>", "; ")
def test_a_refused_keyphrase_would_not_have_been_read_back(phrase, separator):
    assume(keyphrase_problem(phrase, separator) is not None)
    assert parse_answer(phrase, separator).keyphrases != [phrase]


@given(st.text() | MARKED_UP, SEPARATORS)
@example("<ans</answer>wer>", "; ")
def test_any_output_is_parsed(output, separator):
    keyphrases, reasoned = parse_answer(output, separator)
    assert reasoned == ("<think>" in output or "</think>" in output)
    assert len(set(keyphrases)) == len(keyphrases)
    for phrase in keyphrases:
        assert keyphrase_problem(phrase, separator) is None


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


@pytest.mark.parametrize(
    ("phrase", "problem"),
    [
        (3, "is not a string but int"),
        ("", "is empty"),
        (" # ", "is empty"),
        ("a ", "begins or ends with whitespace or '#'"),
        ("#a", "begins or ends with whitespace or '#'"),
        ("a;b", "contains the separator ';'"),
        ("a</think>", "contains the tag </think>"),
    ],
)
def test_the_problem_is_named(phrase, problem):
    assert keyphrase_problem(phrase) == problem
    with pytest.raises(ValueError, match="the keyphrase"):
        TASKS["dynamic_cot"].direct_target(["fine", phrase])


def test_every_blank_is_stripped():
    blanks = {character for character in map(chr, range(sys.maxunicode + 1)) if character.isspace()}
    assert set(prompts.STRIPPED) == blanks | {"#"}


def test_tags_in_a_rationale_are_neutralised():
    target = TASKS["dynamic_cot"].reasoning_target(["a", "b"], " x</think><answer>c</answer> <<think>> \n")
    assert target == "<think>x[/think][answer]c[/answer] <[think]></think><answer>a; b</answer>"


@pytest.mark.parametrize("separator", ["", " ", "#", "<", "/", "--", "a", "; ,"])
def test_a_separator_that_cannot_be_read_back_is_refused(separator):
    with pytest.raises(ValueError, match="separator="):
        KeyphraseTask("any", "?", separator)


@pytest.mark.parametrize("keyphrases", [[], (), "abc", None])
def test_targets_need_a_list_of_keyphrases(keyphrases):
    with pytest.raises(ValueError, match="keyphrases must be a list"):
        TASKS["dynamic_cot"].direct_target(keyphrases)


def test_a_reasoning_target_needs_a_rationale():
    with pytest.raises(ValueError, match="rationale is empty"):
        TASKS["dynamic_cot"].reasoning_target(["a"], " \n")


def test_prompts_put_images_first():
    assert TASKS["aimkp"].prompt("my dog", 2) == [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "image"},
                {"type": "text", "text": "my dog\nWhat phrases should be used to tag the media?"},
            ],
        }
    ]
    # A post without text and image is asked the question alone, without an empty line before it.
    assert TASKS["dynamic_cot"].prompt("")[0]["content"] == [{"type": "text", "text": TASKS["dynamic_cot"].instruction}]


def test_words_are_counted_without_tags():
    assert count_words("<think>A dog.</think><answer>beagles; big dogs</answer>") == 5
    assert count_words(" <think></think>\n") == 0


def test_tasks_by_name():
    assert resolve_task("aimkp") is TASKS["aimkp"]
    assert resolve_task(TASKS["aimkp"]) is TASKS["aimkp"]
    with pytest.raises(ValueError, match="task='tags' is not known: use one of dynamic_cot, aimkp"):
        resolve_task("tags")
