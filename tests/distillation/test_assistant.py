"""Invariants of the assistant:

- its logits are the model's own, in its own type, also within the student's autocast and with dropout;
- a task without tokens in the batch is omitted;
- tokenizers whose ids stand for different tokens are refused, different vocabulary sizes are not.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dynkp.batches.two_task_collator import TwoTaskCollator
from dynkp.distillation.assistant import Assistant, check_vocabularies
from dynkp.mechanics.branched_prompt import PlainBranches
from tests.support.reasoning_trainers import BRIEF, reasoning_rows
from tests.support.tiny_models import build

TASKS = ("label", "chain")


def batch_of(family: str = "llava", **changes: object) -> dict:
    _, processor = build(family)
    return TwoTaskCollator(processor, BRIEF)([post | changes for post in reasoning_rows(family)])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llama"])
def test_logits_are_the_model_s(family: str) -> None:
    model, _ = build(family)
    batch = batch_of(family)
    answers = {task: batch[task] for task in TASKS}
    for shares in (True, False):
        logits = Assistant(model, shares_prompt=shares).logits(batch["prompts"], answers)
        for task in TASKS:
            assert not logits[task].requires_grad
            expected = PlainBranches(model, batch["prompts"]).logits(task, batch[task])
            torch.testing.assert_close(logits[task], expected, rtol=0, atol=1e-5)


def test_dropout_and_autocast_do_not_reach_it() -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.9, init_lora_weights=False)
    model = get_peft_model(build("llava")[0], lora)
    batch = batch_of()
    answers = {"label": batch["label"]}
    assistant = Assistant(model.train())
    expected = assistant.logits(batch["prompts"], answers)["label"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = assistant.logits(batch["prompts"], answers)["label"]
    assert actual.dtype is torch.float32 and torch.equal(actual, expected)


def test_a_task_without_tokens_is_omitted() -> None:
    batch = batch_of(rationale=None)
    assert set(Assistant(build("llava")[0]).logits(batch["prompts"], {task: batch[task] for task in TASKS})) == {"label"}


def test_the_vocabulary_is_that_of_the_head() -> None:
    model, _ = build("llava")
    rows = model.get_output_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows + 7)
    assert Assistant(model).vocabulary == rows + 7
    assert Assistant(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))).vocabulary == rows + 7


def test_vocabularies() -> None:
    _, one = build("llama")
    _, same = build("llama")
    _, other = build("qwen2")
    check_vocabularies(one, same)
    same.add_tokens(["<more>"])
    check_vocabularies(one, same)
    check_vocabularies(same, one)
    with pytest.raises(ValueError, match=r"disagree on \d+ of \d+ shared token ids \(\d+ is '.*' and '.*'"):
        check_vocabularies(one, other)
