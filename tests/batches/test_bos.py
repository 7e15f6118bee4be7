"""Invariants of the beginning of prompts:

- in every family the tokens of a prompt are those of `apply_chat_template(tokenize=True)`, in every collator, in generation and
  for vLLM;
- where the tokenizer would put a BOS token and the template writes none, a prompt begins with it, once, and is tokenized as the
  tokenizer would; an EOS token that a tokenizer adds is not added to a prompt.
"""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import pre_tokenizers, processors

from dynkp.batches.collators import PairedTargetCollator
from dynkp.batches.keyphrase_renderer import KeyphraseRenderer
from dynkp.batches.lengths import post_lengths
from dynkp.batches.masking_collator import MaskingCollator
from dynkp.batches.two_task_collator import TwoTaskCollator
from dynkp.prediction.generation_tasks import KeyphraseGenerationTask, ReasoningGenerationTask
from tests.support.chat_formats import post, tokenizer_of
from tests.support.posts import picture
from tests.support.tiny_models import FAMILIES, VISION_FAMILIES, build


def _templated(processor: Any, messages: list[dict[str, Any]], images: list[Any]) -> list[int]:
    if images:
        messages = [dict(message, content=list(message["content"])) for message in messages]
        queue = list(images)
        for message in messages:
            message["content"] = [
                {"type": "image", "image": queue.pop(0)} if part["type"] == "image" else part for part in message["content"]
            ]
    output = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = output["input_ids"]
    return list(ids[0] if isinstance(ids[0], list) else ids)


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_the_tokens_of_apply_chat_template(family: str, images: int) -> None:
    if family not in VISION_FAMILIES:
        images = 0
    _, processor = build(family)
    pictures = [picture(1)] * images
    row = post(images=pictures, label="positive")
    renderer = KeyphraseRenderer(processor)
    expected = _templated(processor, renderer.prompt_messages(row, images), pictures)
    batches = [
        PairedTargetCollator(processor)([row])["prompt"],
        KeyphraseGenerationTask(processor).collator.collate_prompts([row], [pictures]),
    ]
    if family != "mllama":
        batches.append(MaskingCollator(processor, modalities=("text",))([row])["prompt"])
    for batch in batches:
        assert batch["input_ids"].tolist() == [expected]
    (length,) = post_lengths(PairedTargetCollator(processor), [row])
    assert length.prompt == len(expected)
    branches = TwoTaskCollator(processor, "msc")([row])["prompts"]
    label = ReasoningGenerationTask(processor, "msc").renderer
    assert branches["prompt"]["input_ids"].tolist() == [_templated(processor, label.prompt_messages(row, images), pictures)]
    bos = tokenizer_of(processor).bos_token_id
    adds = tokenizer_of(processor)("a")["input_ids"][:1] == [bos] or "bos_token" in processor.chat_template
    assert (expected[0] == bos) == adds and expected.count(bos) == int(adds)


def _without_bos(tokenizer: Any) -> Any:
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}\n", "")
    return tokenizer


def test_a_word_behind_the_bos_token_is_tokenized_as_the_tokenizer_does() -> None:
    """SentencePiece puts a blank in front of the first word only where it adds the BOS token itself."""
    tokenizer = _without_bos(build("llama")[1])
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    renderer = KeyphraseRenderer(tokenizer)
    assert not renderer.add_special_tokens and renderer.prompt(post(), 0).startswith(tokenizer.bos_token)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("s", prepend_scheme="first", split=False)
    renderer = KeyphraseRenderer(tokenizer)
    assert renderer.add_special_tokens
    (ids,) = PairedTargetCollator(tokenizer)([post()])["prompt"]["input_ids"].tolist()
    assert ids == tokenizer(renderer.prompt(post(), 0))["input_ids"] and ids.count(tokenizer.bos_token_id) == 1


def test_an_eos_token_that_the_tokenizer_adds_is_not_part_of_a_prompt() -> None:
    tokenizer = _without_bos(build("llama")[1])
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)]
    )
    renderer = KeyphraseRenderer(tokenizer)
    (ids,) = PairedTargetCollator(tokenizer)([post()])["prompt"]["input_ids"].tolist()
    written = tokenizer(renderer.prompt(post(), 0), add_special_tokens=False)["input_ids"]
    assert ids == written and ids[0] == tokenizer.bos_token_id and ids[1] != tokenizer.bos_token_id
    assert ids[-1] != tokenizer.eos_token_id
