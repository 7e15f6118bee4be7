"""Invariants of rendering keyphrase tasks:

- text that only looks like markup is kept as it is; TRL's messages get the image placeholders that TRL gives them;
- the tags of reasoning and answer stay whole in a target, even where they are special tokens;
- an opening changes neither prompts nor targets as texts.

Whole prompts and targets are compared in tests/batches/test_collators.py.
"""

from __future__ import annotations

import pytest
from trl.data_utils import prepare_multimodal_messages

from dynkp.batches.keyphrase_renderer import KeyphraseRenderer
from tests.support.chat_formats import post
from tests.support.posts import picture
from tests.support.tiny_models import FAMILIES, build


@pytest.mark.parametrize("text", ["a < b > c", "<3 <html> </b>", "<|", "1 <2> 3"])
def test_text_that_only_looks_a_little_like_markup_is_kept(text: str) -> None:
    _, processor = build("qwen2_5_vl")
    assert text in KeyphraseRenderer(processor).prompt(post(text=text), 0)


def test_messages_with_images_are_trls() -> None:
    _, processor = build("llava")
    row = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "images": [picture(1)]}
    expected = prepare_multimodal_messages(row["prompt"], images=[None])
    assert KeyphraseRenderer(processor).prompt_messages(row, 1) == expected


def test_tags_that_are_special_tokens_stay_whole_in_targets_and_end_no_turn() -> None:
    """A vocabulary that holds <think> and </answer> as special tokens: they are what is taught, not control tokens."""
    _, tokenizer = build("llama")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<answer>", "</answer>"]})
    renderer = KeyphraseRenderer(tokenizer)
    post = {"id": "1", "text": "goal", "keyphrases": ["mufc"], "rationale": "They <|eot_id|> scored."}
    target = renderer.reasoning_target(post, 0)
    assert target.startswith("<think>They ") and "</think><answer>mufc</answer>" in target
    ends = renderer.direct_target(post, 0).removeprefix("mufc")
    assert ends and target.endswith("</answer>" + ends)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_opening_changes_neither_prompts_nor_targets(family: str) -> None:
    _, processor = build(family)
    plain, opened = KeyphraseRenderer(processor), KeyphraseRenderer(processor, opening="<think>")
    assert opened.prompt(post(), 0) == plain.prompt(post(), 0)
    assert opened.opening_ids == opened.tokenize_target("<think>").input_ids and not plain.opening_ids
    for kind in ("direct", "reasoning"):
        assert opened.target(post(), 0, kind) == plain.target(post(), 0, kind)
    assert plain.target(post(rationale=None), 0, "reasoning") is None
