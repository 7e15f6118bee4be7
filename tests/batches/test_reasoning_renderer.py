"""Invariants of rendering reasoning tasks:

- the prompt is the task's messages in the model's chat format, with as many placeholders as images, for every family; text
  models get no images;
- the target is the task's, then the end of turn; a row without rationale has no response-chain target;
- control tokens in a tweet, an aspect or a rationale stay text;
- gold columns do not reach a prompt.
"""

from __future__ import annotations

from typing import Any

import pytest

from dynkp.batches.reasoning_renderer import ReasoningRenderer
from dynkp.data.reasoning_tasks import REASONING_TASKS, ReasoningTask
from tests.support.chat_formats import CONTROL_TOKENS, END_OF_TURN
from tests.support.posts import picture
from tests.support.tiny_models import FAMILIES, TEXT_FAMILIES, build

MASC = REASONING_TASKS["masc"]
KINDS = ("label", "chain")


def row(**changes: Any) -> dict[str, Any]:
    given = {"id": "7", "text": "go cubs", "aspect": "cubs", "label": "positive", "images": [picture(1, (28, 28))]}
    return {**given, "rationale": '"Text_analysis": "a cheer"\n\n"Prediction": "positive"', **changes}


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_target(family: str) -> None:
    _, processor = build(family)
    images = 0 if family in TEXT_FAMILIES else 1
    rendered = {}
    for kind, ask, target in zip(
        KINDS, (MASC.label_prompt, MASC.chain_prompt), (MASC.label_target, MASC.chain_target), strict=True
    ):
        renderer = ReasoningRenderer(processor, "masc", kind)
        assert len(renderer.images(row())) == images
        rendered[kind] = renderer.prompt(row(), images)
        (message,) = ask(row())
        # Templates may strip the last line break of a turn.
        assert message["content"][-1]["text"].strip() in rendered[kind]
        if images:
            expected = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
            # LLaVA's template writes no BOS.
            assert rendered[kind] == ("<s>" if family == "llava" else "") + expected
        blank = " " if family in ("llava", "idefics3", "smolvlm") else ""
        assert renderer.target(row(), images) == blank + target(row()) + END_OF_TURN[family]
        # The gold is not part of what is asked.
        bare = {name: value for name, value in row().items() if name not in ("label", "rationale")}
        assert renderer.prompt(bare, images) == rendered[kind]
    assert rendered["label"] != rendered["chain"]


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_stay_text(family: str) -> None:
    _, processor = build(family)
    tokenizer = getattr(processor, "tokenizer", processor)
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}

    def control(text: str) -> list[int]:
        return sorted(index for index in tokenizer(text, add_special_tokens=False)["input_ids"] if index in special)

    for kind in KINDS:
        renderer = ReasoningRenderer(processor, MASC, kind)
        images = 0 if family in TEXT_FAMILIES else 1
        prompt, target = control(renderer.prompt(row(), images)), control(renderer.target(row(), images))
        for token in (*CONTROL_TOKENS, tokenizer.eos_token, tokenizer.pad_token):
            hostile = f"a{token}b{token[: len(token) // 2]}{token}{token[len(token) // 2 :]}"
            post = row(text=hostile, aspect=hostile, rationale=f"{hostile} is good")
            assert control(renderer.prompt(post, images)) == prompt, token
            assert control(renderer.target(post, images)) == target, token


def test_what_is_missing() -> None:
    _, processor = build("llama")
    chain = ReasoningRenderer(processor, "masc", "chain")
    assert chain.target(row(rationale=None), 0) is None
    assert ReasoningRenderer(processor, "msc").prompt(row(aspect=None, text=None), 0)
    with pytest.raises(ValueError, match=r"post '7': aspect=''"):
        chain.prompt(row(aspect=None), 0)
    with pytest.raises(ValueError, match=r"kind='answer' is not a prompt: use 'label' or 'chain'"):
        ReasoningRenderer(processor, "masc", "answer")
    with pytest.raises(ValueError, match=r"task='absa' is not known"):
        ReasoningRenderer(processor, "absa")


def test_a_task_of_one_s_own() -> None:
    _, processor = build("llava")
    task = ReasoningTask("irony", "Is it meant?", {"Text_analysis": "the tone"}, labels=("meant", "ironic"))
    renderer = ReasoningRenderer(processor, task, "chain")
    assert "Is it meant?" in renderer.prompt(row(), 1) and "meant/ironic" in renderer.prompt(row(), 1)
    assert task.parse(str(renderer.target(row(label="ironic"), 1))).prediction == "ironic"
