"""Prompts that begin alike, computed once, equal their plain twin and prompts rendered and run one by one.

Holds in float64 to 1e-10, in logits and gradients, for every family: unequal lengths, left padding, posts with and without
chain, one or several pictures or none, gradient checkpointing, LoRA, ends of unequal lengths.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dynkp.batches.two_task_collator import TwoTaskCollator
from dynkp.mechanics.branched_prompt import PlainBranches, SharedBranches, everywhere_mask
from tests.support.exact import TOLERANCE, double
from tests.support.reasoning_trainers import BRIEF, reasoning_rows
from tests.support.tiny_models import build, exact_float64

TASKS = ("label", "chain")


def ramp(logits: torch.Tensor) -> torch.Tensor:
    """Another weight for every number, so that an error in one cannot hide behind another."""
    return torch.linspace(0.5, 1.5, max(logits.numel(), 1), dtype=torch.float64)[: logits.numel()].view(logits.shape)


def gradients_of(model: torch.nn.Module, logits: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum((part.log_softmax(dim=-1) * ramp(part)).sum() / part.numel() for part in logits).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(model: torch.nn.Module, one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    for first, second in zip(one, other, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=TOLERANCE * 10)
    first_gradients, second_gradients = gradients_of(model, one), gradients_of(model, other)
    assert first_gradients.keys() == second_gradients.keys() and first_gradients
    largest = max(gradient.abs().max().item() for gradient in first_gradients.values())
    assert largest > 1e-3, "gradients that vanish would agree whatever is computed"
    for name, gradient in first_gradients.items():
        atol = TOLERANCE * max(1.0, largest)
        torch.testing.assert_close(second_gradients[name], gradient, rtol=0, atol=atol, msg=name)


def one_by_one(model: torch.nn.Module, collator: TwoTaskCollator, posts: list[dict[str, Any]], task: str) -> torch.Tensor:
    """Each post's own prompt as its processor makes it, alone in a batch, by the model's own forward and positions."""
    renderer, parts = collator.renderers[task], []
    for post in posts:
        pictures = renderer.images(post)
        if (target := renderer.target(post, len(pictures))) is None:
            continue
        kwargs = {"images": [pictures] if pictures else None} if renderer.takes_images else {}
        text = [renderer.prompt(post, len(pictures))]
        inputs = double(dict(renderer.processor(text=text, add_special_tokens=False, return_tensors="pt", **kwargs)))
        ids = torch.tensor([renderer.tokenizer(target, add_special_tokens=False)["input_ids"]])
        length = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for key in ("token_type_ids", "mm_token_type_ids"):
            if key in inputs:
                inputs[key] = torch.cat([inputs[key], torch.zeros_like(ids)], dim=1)
        if "cross_attention_mask" in inputs:
            last = inputs["cross_attention_mask"][:, -1:].expand(-1, ids.shape[1], -1, -1)
            inputs["cross_attention_mask"] = torch.cat([inputs["cross_attention_mask"], last], dim=1)
        parts.append(model(**inputs, use_cache=False).logits[0, length - 1 : -1])
    return torch.cat(parts)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "llava", "idefics3", "gemma3", "mllama", "qwen3"])
def test_equals_the_plain_twin_and_ordinary_forwards(family: str) -> None:
    model, processor = build(family)
    collator, posts = TwoTaskCollator(processor, BRIEF), reasoning_rows(family)
    batch = double(collator(posts))
    assert batch["prompts"]["shared"] > 30 and not batch["prompts"]["separate"]
    assert 0 in batch["chain"]["lengths"] and len(set(batch["chain"]["lengths"])) > 2
    assert batch["prompts"]["prompt"]["attention_mask"][:, 0].min() == 0, "must be left-padded"
    with exact_float64(model):
        shared, plain = SharedBranches(model, batch["prompts"]), PlainBranches(model, batch["prompts"])
        ours = [shared.logits(task, batch[task]) for task in TASKS]
        assert_equal(model, ours, [plain.logits(task, batch[task]) for task in TASKS])
        ours = [SharedBranches(model, batch["prompts"]).logits(task, batch[task]) for task in TASKS]
        assert_equal(model, ours, [one_by_one(model, collator, posts, task) for task in TASKS])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "mllama", "llama"])
def test_equals_the_plain_twin_with_checkpointing(family: str, lora: bool) -> None:
    model, processor = build(family)
    batch = double(TwoTaskCollator(processor, BRIEF)(reasoning_rows(family)))
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with exact_float64(model):
        model.train()
        results = [
            [branches.logits(task, batch[task]) for task in TASKS]
            for branches in (SharedBranches(model, batch["prompts"]), PlainBranches(model, batch["prompts"]))
        ]
        assert_equal(model, *results)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llama"])
def test_ends_of_unequal_lengths(family: str) -> None:
    """One post's end is longer: the others' is padded on its left, in the middle of the whole."""
    model, processor = build(family)
    batch = double(TwoTaskCollator(processor, BRIEF)(reasoning_rows(family)))
    end = batch["prompts"]["ends"]["chain"]
    end["attention_mask"] = end["attention_mask"].clone()
    end["attention_mask"][1:, :2] = 0
    prompt, shared, lengths = batch["prompts"]["prompt"], batch["prompts"]["shared"], batch["chain"]["lengths"]
    text_alone = prompt["attention_mask"][1, :shared].bool()  # this post has no picture
    answer = batch["chain"]["input_ids"][1, : lengths[1]]
    alone = torch.cat([prompt["input_ids"][1, :shared][text_alone], end["input_ids"][1, 2:], answer])
    with exact_float64(model):
        branches = SharedBranches(model, batch["prompts"]), PlainBranches(model, batch["prompts"])
        ours, theirs = ([way.logits(task, batch[task]) for task in TASKS] for way in branches)
        assert_equal(model, ours, theirs)
        expected = model(input_ids=alone[None], use_cache=False).logits[0, -len(answer) - 1 : -1]
        torch.testing.assert_close(ours[1][lengths[0] : lengths[0] + lengths[1]], expected, rtol=0, atol=10 * TOLERANCE)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_everywhere_gives_the_prompts_own_tokens_too(family: str) -> None:
    model, processor = build(family)
    batch = TwoTaskCollator(processor, BRIEF)(reasoning_rows(family))
    for task in TASKS:
        where = everywhere_mask(batch["prompts"], task, batch[task])
        logits = PlainBranches(model, batch["prompts"], everywhere=True).logits(task, batch[task])
        assert logits.shape[0] == int(where.sum()) > batch[task]["mask"].sum()
        has_answer = torch.tensor(batch[task]["lengths"]) > 0
        assert not where[~has_answer].any() and where[has_answer].any(dim=1).all()
        at_answers = torch.zeros_like(where)
        at_answers[:, where.shape[1] - batch[task]["mask"].shape[1] :] = batch[task]["mask"]
        answers = PlainBranches(model, batch["prompts"]).logits(task, batch[task])
        torch.testing.assert_close(logits[at_answers[where]], answers, rtol=0, atol=1e-5)


def test_no_post_has_a_chain() -> None:
    model, processor = build("llava")
    posts = [post | {"rationale": None} for post in reasoning_rows("llava")]
    batch = TwoTaskCollator(processor, BRIEF)(posts)
    assert SharedBranches(model, batch["prompts"]).logits("chain", batch["chain"]).numel() == 0
