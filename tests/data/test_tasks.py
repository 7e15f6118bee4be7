"""Invariants of prompts, targets and the answer parser:

- keyphrases written into a direct or reasoning target are read back unchanged, whatever the rationale contains;
- exactly the keyphrases that would not be read back are refused, with the reason;
- any string is parsed, in linear time, into stripped, non-empty, distinct keyphrases;
- prompts have as many image placeholders as images, before the text, and never the gold keyphrases.
"""

from __future__ import annotations

import sys

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from dynkp.data.tasks import TASKS, KeyphraseTask, keyphrase_problem, parse_answer, resolve_task
from dynkp.mmkp_f1.answers import STRIPPED

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
    ("phrase", "problem"),
    [
        (3, "is not a string but int"),
        ("", "is empty"),
        (" # ", "is empty"),
        ("a ", "begins or ends with whitespace, '#' or an invisible character, or is not in Unicode's composed form (NFC)"),
        ("#a", "begins or ends with whitespace, '#' or an invisible character, or is not in Unicode's composed form (NFC)"),
        ("a;b", "contains the separator ';'"),
        ("a</think>", "contains the tag </think>"),
    ],
)
def test_the_problem_is_named(phrase, problem):
    assert keyphrase_problem(phrase) == problem
    with pytest.raises(ValueError, match="the keyphrase"):
        TASKS["dynamic_cot"].direct_target(["fine", phrase])


def test_every_empty_is_stripped():
    blanks = {character for character in map(chr, range(sys.maxunicode + 1)) if character.isspace()}
    assert {character for character in set(STRIPPED) - blanks if character.isprintable()} == {"#", "\ufe5f", "\uff03"}
    assert blanks < set(STRIPPED)


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


def test_tasks_by_name():
    assert resolve_task("aimkp") is TASKS["aimkp"]
    assert resolve_task(TASKS["aimkp"]) is TASKS["aimkp"]
    with pytest.raises(ValueError, match="task='tags' is not known: use one of dynamic_cot, aimkp"):
        resolve_task("tags")
