"""Invariants of reasoning tasks:

- both prompts of a post begin with the same images, text and question, and do not depend on gold columns;
- both targets are read back as the gold answer, for any rationale in any format; a post without rationale has no
  response-chain target;
- any string is parsed, in linear time; every format of the released response chains of Twitter-2015 is read;
- an output that names no label or several labels, or was cut off within a response chain, predicts nothing;
- missing aspects and impossible answers are errors that name the post.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dynkp.data.reasoning_tasks import (
    ANALYSES,
    PREDICTION,
    REASONING_TASKS,
    SENTIMENTS,
    ReasoningTask,
    ResponseChain,
    resolve_reasoning_task,
)
from dynkp.data.tasks import keyphrase_problem

MASC, KEYPHRASES = REASONING_TASKS["masc"], REASONING_TASKS["keyphrases"]
ROW = {
    "id": "7",
    "text": "Go Cubs",
    "images": [{"path": "a.png"}, {"path": "b.png"}],
    "aspect": "Cubs",
    "label": "positive",
    "keyphrases": ["cubs", "mlb"],
    "rationale": None,
}
FIELDS = dict.fromkeys(ANALYSES, "It says so.")
# Text in which what marks a field is as likely as a letter.
MARKS = [
    *ANALYSES,
    PREDICTION,
    "Text analysis",
    *SENTIMENTS,
    '"',
    "'",
    ":",
    "#",
    "*",
    "{",
    "}",
    "```",
    "json",
    ",",
    "\n",
    " ",
    ">",
    "-",
]
MARKED_UP = st.lists(st.sampled_from(MARKS) | st.text(max_size=2)).map("".join)


@pytest.mark.parametrize("task", REASONING_TASKS.values(), ids=lambda task: task.name)
def test_prompts_begin_alike_and_hold_no_gold(task: ReasoningTask) -> None:
    chain, label, explain = task.chain_prompt(ROW), task.label_prompt(ROW), task.explain_prompt(ROW)
    for messages in (chain, label, explain):
        (message,) = messages
        assert message["role"] == "user"
        assert [part["type"] for part in message["content"]] == ["image", "image", "text"]
    texts = [messages[0]["content"][-1]["text"] for messages in (chain, label, explain)]
    shared = os.path.commonprefix(texts)
    assert shared.index("Go Cubs") < shared.index(task.question)
    assert ("Aspect: Cubs" in shared) == (task.name == "masc")
    asked = [[name in text for name in (*ANALYSES, PREDICTION)] for text in texts]
    assert asked == [[True] * 5, [False] * 4 + [True], [True] * 5]
    other = {**ROW, "label": "negative", "keyphrases": ["x"], "rationale": "because"}
    assert [task.chain_prompt(other), task.label_prompt(other)] == [chain, label]
    assert task.answer(ROW) in texts[2] and task.explain_prompt(other) != explain
    assert task.chain_target(ROW) is None


@pytest.mark.parametrize("task", REASONING_TASKS.values(), ids=lambda task: task.name)
def test_a_post_without_text_or_images(task: ReasoningTask) -> None:
    (message,) = task.label_prompt({"id": "1", "text": None, "images": None, "aspect": "x"})
    assert [part["type"] for part in message["content"]] == ["text"]


@given(st.text() | MARKED_UP, st.sampled_from(SENTIMENTS))
@example("Text_analysis: Prediction: x\nPrediction: neutral", "positive")
@example("Prediction: negative\nText_analysis: y\nPrediction: neutral", "positive")
@example('{"Text_analysis": "a\\nPrediction: neutral"}', "positive")
@example('Text_analysis: x\nPrediction",\n:', "positive")
@example("Prediction: neutral", "positive")
def test_targets_are_read_back(rationale: str, label: str) -> None:
    row = {**ROW, "rationale": rationale, "label": label}
    assert MASC.parse(MASC.label_target(row)) == ResponseChain({}, label)
    target = MASC.chain_target(row)
    assert (target is None) == (not rationale.strip())
    if target is not None:
        assert MASC.parse(target).prediction == label
        # A target is in its final form: another pass changes nothing.
        again = MASC.chain_target({**row, "rationale": target})
        assert MASC.parse(again).prediction == label


@given(st.lists(st.text() | MARKED_UP, min_size=1, max_size=4), st.text() | MARKED_UP)
def test_keyphrases_are_read_back(phrases: list[str], rationale: str) -> None:
    phrases = [" ".join(phrase.split()) for phrase in phrases]
    phrases = list(dict.fromkeys(phrase for phrase in phrases if keyphrase_problem(phrase) is None))
    row = {"id": "1", "keyphrases": phrases, "rationale": rationale}
    if not phrases:
        with pytest.raises(ValueError, match="post '1': keyphrases must be a list of at least one"):
            KEYPHRASES.label_target(row)
        return
    assert KEYPHRASES.keyphrases(KEYPHRASES.label_target(row)) == phrases
    if (target := KEYPHRASES.chain_target(row)) is not None:
        assert KEYPHRASES.keyphrases(target) == phrases
        assert KEYPHRASES.is_right(row, target)


@given(st.text() | MARKED_UP)
def test_any_string_is_parsed(output: str) -> None:
    fields, prediction = MASC.parse(output)
    assert prediction is None or prediction in SENTIMENTS
    assert list(fields) == [name for name in ANALYSES if name in fields] and all(fields.values())
    assert KEYPHRASES.parse(output).prediction != ""


def chain(last: str, quote: str = '"') -> str:
    return "\n\n".join([*(f'"{name}": {quote}{value}{quote}' for name, value in FIELDS.items()), last])


@pytest.mark.parametrize(
    ("output", "prediction"),
    [
        (chain('"Prediction": "neutral"'), "neutral"),
        (chain('"Prediction": neutral'), "neutral"),
        (chain("neutral"), "neutral"),
        (chain('"Prediction": "neutral"\n```'), "neutral"),
        (chain('"Prediction": "neutral"\n\nIt is neutral, not positive.'), "neutral"),
        ("```json\n" + json.dumps({**FIELDS, PREDICTION: "Neutral"}, indent=2) + "\n```", "neutral"),
        ("```json\n{\n" + chain('"Prediction": "neutral"').replace('\n\n"', ',\n  "') + "\n}\n```", "neutral"),
        (
            "## Analysis\n\n"
            + "\n\n".join(f"### {name}\n{value}" for name, value in FIELDS.items())
            + "\n\n### Prediction\nneutral",
            "neutral",
        ),
        ("\n".join(f"**{name}:** {value}" for name, value in FIELDS.items()) + "\n**Prediction**: neutral.", "neutral"),
        (
            "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in FIELDS.items()) + "\n- Prediction: neutral",
            "neutral",
        ),
        (chain('"Prediction": "positive/neutral/negative"'), None),
        (chain('"Prediction": "mixed"'), None),
        (chain('"Prediction":'), None),
        (chain("")[:-5] + " seems neutral", None),
    ],
    ids=range(14),
)
def test_forms_of_chains(output: str, prediction: str | None) -> None:
    parsed = MASC.parse(output)
    assert parsed.prediction == prediction
    assert list(parsed.fields) == list(ANALYSES)
    if prediction is not None:
        assert parsed.fields == FIELDS
        assert MASC.is_right({**ROW, "label": prediction}, output) and not MASC.is_right(ROW, output)
        assert MASC.chain_target({**ROW, "rationale": output}) == chain('"Prediction": positive')


@pytest.mark.parametrize(
    ("output", "prediction"),
    [
        ('"Prediction": positive', "positive"),
        ('"Prediction": "Positive"', "positive"),
        ("positive", "positive"),
        ("Positive.\n```", "positive"),
        ('{"Prediction": "positive"}', "positive"),
        ("The sentiment is positive.", "positive"),
        ("positive or negative", None),
        ("nonpositive", None),
        ("", None),
        ("{" * 2000, None),
        ('{"a":' * 100_000, None),
    ],
    ids=range(11),
)
def test_answers_to_the_label_prompt(output: str, prediction: str | None) -> None:
    assert MASC.parse(output) == ResponseChain({}, prediction)


@pytest.mark.parametrize(
    ("prediction", "keyphrases"),
    [('["nba", "finals"]', ["nba", "finals"]), ("null", []), ("[]", []), ('"nba; finals"', ["nba", "finals"])],
)
def test_values_of_json_are_written_as_words(prediction: str, keyphrases: list[str]) -> None:
    output = f'{{"Text_analysis": ["one", "two"], "Image_analysis": null, "Prediction": {prediction}}}'
    assert KEYPHRASES.keyphrases(output) == keyphrases
    assert KEYPHRASES.parse(output).fields == {"Text_analysis": "one; two"}


def test_a_rationale_without_fields_is_the_conclusion() -> None:
    row = {**ROW, "rationale": "They are a team.\nPeople tag teams."}
    assert (
        KEYPHRASES.chain_target(row) == '"Final_conclusion": "They are a team.\nPeople tag teams."\n\n"Prediction": "cubs; mlb"'
    )
    assert MASC.chain_target({**ROW, "rationale": "Prediction: neutral"}) == '"Prediction": positive'


def test_right_keyphrases() -> None:
    assert KEYPHRASES.is_right(ROW, '"Prediction": "MLB"')
    assert not KEYPHRASES.is_right(ROW, '"Prediction": "MLB; nba"')
    assert not KEYPHRASES.is_right(ROW, "")


def test_released_chains_are_read(shared) -> None:
    lines = (shared / "data/masc_t15/test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{**row, "rationale": row["cot"]} for row in map(json.loads, lines)]
    counts: Counter[str] = Counter()
    for row in rows:
        parsed = MASC.parse(row["rationale"])
        counts["whole"] += list(parsed.fields) == list(ANALYSES) and parsed.prediction is not None
        counts["right"] += MASC.is_right(row, row["rationale"])
        target = MASC.chain_target(row)
        assert MASC.parse(target) == ResponseChain(parsed.fields, row["label"])
        # Only form changes: no word of an analysis is lost, or the order would differ.
        assert "".join(parsed.fields.values()).split() == "".join(MASC.parse(target).fields.values()).split()
    assert counts == {"whole": 937, "right": 919}


def test_parsing_takes_linear_time() -> None:
    def seconds(size: int) -> float:
        start = time.process_time()
        for unit in ('"Text_analysis": x\n', "{", "# ", " ", '"', "```", "Prediction", "}\n", ",", "\n\n"):
            MASC.parse(unit * (size // len(unit)))
        return time.process_time() - start

    seconds(1000)
    assert seconds(400_000) < 30 * seconds(40_000) + 0.2


def test_what_cannot_be_asked_or_taught_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"post '7': aspect=' ', but task 'masc' asks about an aspect"):
        MASC.chain_prompt({**ROW, "aspect": " "})
    with pytest.raises(ValueError, match=r"post '7': label='good' is none of positive, neutral, negative"):
        MASC.label_target({**ROW, "label": "good"})
    with pytest.raises(ValueError, match=r"post '7': label=None is none of"):
        MASC.explain_prompt({**ROW, "label": None})
    with pytest.raises(ValueError, match=r"post '7': the keyphrase 'a; b' contains the separator"):
        KEYPHRASES.label_target({**ROW, "keyphrases": ["a; b"]})
    with pytest.raises(TypeError, match="output must be a string, got NoneType"):
        MASC.parse(None)
    with pytest.raises(ValueError, match=r"task='mas' is not known: use one of msc, masc, keyphrases"):
        resolve_reasoning_task("mas")
    assert resolve_reasoning_task(MASC) is MASC is resolve_reasoning_task("masc")
