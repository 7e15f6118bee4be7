"""Invariants of the requests to a teacher:

- Dynamic CoT (Table 1): one request with keyphrases, text and images, that asks why people would use the keyphrases; images are
  at their placeholder;
- response chains: the first request asks for five fields without the answer; only if the prediction is wrong a second one gives
  the answer, and the stage records it;
- a user's template replaces each of these; braces in a post's text are not replaced; a missing column is named;
- `describe` returns what requests depend on, and changes with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynkp.chat.request import ChatAnswer, ChatRequest
from dynkp.data.reasoning_tasks import ANALYSES, REASONING_TASKS
from dynkp.rationales.prompts import TASKS, RationaleConversation, Template, load_templates
from tests.support.posts import picture

SETTINGS = {"model": "m", "max_tokens": 50}


def post(folder: Path | None = None, **more: Any) -> dict[str, Any]:
    images = []
    if folder is not None:
        picture(1).save(folder / "1.png")
        images = [{"bytes": None, "path": str(folder / "1.png")}]
    return {"id": "7", "text": "my {text} dog", "keyphrases": ["beagles", "dogs"], "images": images, "image_urls": [], **more}


def shown(request: ChatRequest) -> str:
    """All texts of a request, <image> where a picture stands."""
    parts = []
    for message in request.messages:
        content = message["content"]
        parts += [content] if isinstance(content, str) else [part.get("text", "<image>") for part in content]
    return "\n".join(parts)


def play(conversation: RationaleConversation, row: dict[str, Any], answers: list[str]) -> list[ChatRequest]:
    """The requests, given these answers; all answers must be asked for."""
    steps = conversation(row)
    requests = [next(steps)]
    for answer in answers:
        try:
            requests.append(steps.send(ChatAnswer(answer)))
        except StopIteration:
            assert answer == answers[-1]
            return requests
    pytest.fail("the conversation asks for more")


def test_table_1(tmp_path: Path) -> None:
    (request,) = play(RationaleConversation("dynamic_cot", SETTINGS), post(tmp_path), ["Because."])
    system, user = request.messages
    assert system["role"] == "system" and "why social media users would use these hashtags" in system["content"]
    assert [part["type"] for part in user["content"]] == ["text", "image"]
    assert shown(request).endswith('"Keyphrases": beagles; dogs\n"Post text": my {text} dog\n"Image": \n<image>')
    assert request.stage == "explain" and request.settings == SETTINGS
    assert request.body()["messages"][1]["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")


def test_a_picture_twice_is_sent_once_and_addresses_are_handed_on(tmp_path: Path) -> None:
    row = post(tmp_path, image_urls=["http://host/2.png"])
    row["images"] *= 2
    (request,) = play(RationaleConversation("dynamic_cot", SETTINGS), row, ["x"])
    assert shown(request).count("<image>") == 2


@pytest.mark.parametrize(
    ("row", "error"),
    [({"keyphrases": []}, "post '7' has no keyphrases"), ({"text": " "}, "post '7' has neither text nor image")],
)
def test_posts_that_cannot_be_asked_about(row: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        next(RationaleConversation("dynamic_cot", SETTINGS)(post(**row)))


@pytest.mark.parametrize("task", REASONING_TASKS)
def test_a_right_chain_asks_nothing_more(task: str, tmp_path: Path) -> None:
    row = post(tmp_path, aspect="dog", label="positive")
    answer = REASONING_TASKS[task].label_target(row)
    (request,) = play(RationaleConversation(task, SETTINGS), row, [answer])
    text = shown(request)
    assert request.stage == "predict" and "<image>" in text and "my {text} dog" in text
    assert all(f'"{name}"' in text for name in (*ANALYSES, "Prediction"))
    assert "The right answer" not in text and "beagles" not in text


@pytest.mark.parametrize("answer", ['"Prediction": "negative"', "no idea", ""])
def test_a_wrong_chain_is_explained_with_the_answer_told(answer: str) -> None:
    row = post(aspect="dog", label="positive")
    first, second = play(RationaleConversation("masc", SETTINGS), row, [answer, "whatever"])
    assert (first.stage, second.stage) == ("predict", "explain")
    assert "The right answer is known: positive" in shown(second)
    assert first.key != second.key


def test_a_chain_needs_a_gold_answer() -> None:
    with pytest.raises(ValueError, match="label=None is none of positive, neutral, negative"):
        next(RationaleConversation("msc", SETTINGS)(post()))


def test_templates_of_the_user_s_own(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text("system: Be {mood}.\nuser: 'Tags: {keyphrases}. {images} {text} {ocr}'\n")
    conversation = RationaleConversation("dynamic_cot", SETTINGS, templates=load_templates(file, "dynamic_cot"))
    (request,) = play(conversation, post(tmp_path, mood="kind", ocr="SALE"), ["x"])
    assert shown(request) == "Be kind.\nTags: beagles; dogs. \n<image>\n my {text} dog SALE"
    with pytest.raises(ValueError, match=r"asks for \{ocr\}, and the post has no such column"):
        next(conversation(post(tmp_path)))


def test_templates_of_two_stages(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text("predict: {user: 'What of {aspect} in {text}?'}\nexplain: {system: S, user: 'Why is it {answer}?'}\n")
    conversation = RationaleConversation("masc", SETTINGS, templates=load_templates(file, "masc"))
    first, second = play(conversation, post(aspect="dog", label="neutral"), ["positive", "x"])
    assert shown(first) == "What of dog in my {text} dog?"
    assert shown(second) == "S\nWhy is it neutral?"


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("user: [1]", "dynamic_cot"),
        ("system: x", "dynamic_cot"),
        ("user: x\nsytem: y", "dynamic_cot"),
        ("- x", "dynamic_cot"),
        ("user: x", "masc"),
        ("predict: {user: x}", "masc"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, text: str, task: str) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"a template for task '{task}'"):
        load_templates(tmp_path / "t.yaml", task)


def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("a: b: c")
    with pytest.raises(ValueError, match="not YAML"):
        load_templates(tmp_path / "t.yaml", "masc")


def test_field_names() -> None:
    assert RationaleConversation("dynamic_cot", SETTINGS).field_names() == ["Keyphrases", "Post text", "Image"]
    assert RationaleConversation("masc", SETTINGS).field_names() == []
    assert Template("", "Look: {text}\nwhy {keyphrases}: hm\n  **OCR text**: {ocr}").field_names() == ["Look", "OCR text"]


def test_what_requests_depend_on_is_described() -> None:
    own = {"explain": Template("", "{text}")}
    described = [
        json.dumps(conversation.describe())
        for conversation in (
            *(RationaleConversation(task, SETTINGS) for task in TASKS),
            RationaleConversation("dynamic_cot", SETTINGS, templates=own),
            RationaleConversation("masc", SETTINGS, templates=own),
            RationaleConversation("masc", {**SETTINGS, "seed": 1}),
            RationaleConversation("masc", SETTINGS, max_side=64),
        )
    ]
    assert len(set(described)) == len(described)


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="task='mask' is not known: use one of dynamic_cot, msc, masc, keyphrases"):
        RationaleConversation("mask", SETTINGS)
