"""Invariants of the tokens of targets:

- a forced `<think>` has the tokens that every reasoning target begins with, in every family and with a vocabulary that merges
  ">" with what follows; every tag has tokens of its own;
- targets without tags, and all targets where the tags of reasoning are tokens, have the tokens of the tokenizer;
- the opening behind a batch of prompts is the beginning of the targets, and the other inputs grow with it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from dynkp.batches.collators import ChatCollator, PairedTargetCollator
from dynkp.batches.keyphrase_renderer import KeyphraseRenderer
from dynkp.batches.target_tokens import TargetTokenizer
from dynkp.prediction.generation_tasks import KeyphraseGenerationTask
from tests.support.chat_formats import post, texts, tokenizer_of
from tests.support.posts import picture
from tests.support.tiny_models import FAMILIES, VISION_FAMILIES, build

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TARGET = "<think>The dog runs.</think><answer>dog; park</answer>"


def merging_tokenizer(metaspace: bool = False) -> Any:
    """A vocabulary that merges ">" with the next word and the next tag, as Qwen2.5's does (">The", "><")."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = (
        pre_tokenizers.Metaspace(prepend_scheme="first")
        if metaspace
        else pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    )
    backend.decoder = decoders.Metaspace(prepend_scheme="first") if metaspace else decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TARGET] * 3 + ["a>The", "th</th", "><", "<think> ; why, dogs"], trainer)
    template = build("qwen2")[1].chat_template.replace("<|im_end|>", "<end>")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", chat_template=template
    )  # fmt: skip


@pytest.mark.parametrize("metaspace", [False, True])
def test_tags_are_apart_where_the_vocabulary_merges_them_with_their_neighbours(metaspace: bool) -> None:
    tokenizer = merging_tokenizer(metaspace)
    assert len(tokenizer(TARGET, add_special_tokens=False)["input_ids"]) < 8  # it does merge
    tokens = TargetTokenizer(tokenizer)(TARGET)
    assert tokenizer.decode(tokens.input_ids) == TARGET
    ends, text = [], ""
    for index in range(len(tokens.input_ids)):
        text = tokenizer.decode(tokens.input_ids[: index + 1])
        ends.append(len(text))
    for tag in TAGS:
        start = TARGET.find(tag)
        assert start in [0, *ends] and start + len(tag) in ends


@pytest.mark.parametrize("metaspace", [False, True])
def test_the_forced_prefix_is_the_beginning_of_every_reasoning_target(metaspace: bool) -> None:
    tokenizer = merging_tokenizer(metaspace)
    _check_prefix(tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_forced_prefix_is_the_beginning_of_reasoning_targets_in_every_family(family: str) -> None:
    _check_prefix(build(family)[1])


def _check_prefix(processor: Any) -> None:
    task = KeyphraseGenerationTask(processor, mode="think")
    rows = [post(rationale=rationale) for rationale in ("The dog.", "></", "think", "<b>", "dog", "\u00e9", "; ")]
    batch = PairedTargetCollator(processor)(rows)
    forced = task.collator.collate_prompts(rows, [[]] * len(rows))["input_ids"].tolist()
    opening = task.renderer.opening_ids
    assert opening
    for index, prompt in enumerate(batch["prompt"]["input_ids"].tolist()):
        assert batch["reasoning"]["input_ids"][index, : len(opening)].tolist() == opening
        assert forced[index] == [*prompt, *opening]
    assert all("<think>" in text for text in texts(processor, batch["reasoning"]))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_their_own_are_not_moved(family: str) -> None:
    _, processor = build(family)
    tokenizer = tokenizer_of(processor)
    renderer = KeyphraseRenderer(processor)
    target = renderer.direct_target(post(), 0)
    assert renderer.tokenize_target(target).input_ids == tokenizer(target, add_special_tokens=False)["input_ids"]
    tokenizer.add_tokens(["<think>", "</think>"])
    renderer = KeyphraseRenderer(processor)
    target = renderer.reasoning_target(post(), 0)
    assert target is not None
    assert renderer.tokenize_target(target).input_ids == tokenizer(target, add_special_tokens=False)["input_ids"]
    assert not renderer.tokenize_target.splits


def test_weights_change_at_the_answer_tag() -> None:
    tokenizer = merging_tokenizer()
    collator = PairedTargetCollator(tokenizer, answer_weight=3.0)
    targets = collator([post()])["reasoning"]
    thought = collator.renderer.tokenize_target("<think>A dog.</think>").input_ids
    weights = targets["weights"][0].tolist()
    assert weights == [1.0] * len(thought) + [3.0] * (len(weights) - len(thought))


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_the_other_inputs_grow_with_the_opening(family: str) -> None:
    _, processor = build(family)
    rows, images = [post(images=[picture(1)]), post(id="q", images=[picture(2)])], [[picture(1)], [picture(2)]]
    opened = ChatCollator(KeyphraseRenderer(processor, opening="zebra")).collate_prompts(rows, images)
    processor.chat_template += "{% if add_generation_prompt %}zebra{% endif %}"
    written = ChatCollator(KeyphraseRenderer(processor)).collate_prompts(rows, images)
    assert opened.keys() == written.keys()
    for name, value in opened.items():
        assert torch.equal(value, written[name]) if isinstance(value, torch.Tensor) else value == written[name], name
