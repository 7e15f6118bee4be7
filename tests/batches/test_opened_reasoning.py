"""Invariants of templates that write <think> behind the prompt themselves (thinking models), in both spellings:

- prompts are the template's; a direct target closes the reasoning first, a reasoning target continues it, and prompt plus
  target have one <think>, are parsed to what they were written from, and end with the end of turn;
- every forced prefix has the tokens that targets begin with; MulCoT-RD's targets close the reasoning too;
- a model trained on either target gives its keyphrases back in every mode, and `reasoned` is true where it reasoned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dynkp import DynamicCoTConfig, DynamicCoTTrainer, generate_keyphrases, parse_answer
from dynkp.batches.collators import PairedTargetCollator
from dynkp.batches.keyphrase_renderer import KeyphraseRenderer
from dynkp.batches.reasoning_renderer import ReasoningRenderer
from dynkp.prediction.generation_tasks import KeyphraseGenerationTask, ReasoningGenerationTask
from tests.support.chat_formats import END_OF_TURN, post, tokenizer_of
from tests.support.tiny_models import FAMILIES, build

OPENINGS = ("<think>", "<think>\n")


def thinking(family: str, opening: str) -> tuple[Any, Any]:
    model, processor = build(family)
    processor.chat_template += "{%- if add_generation_prompt -%}{{ " + repr(opening) + " }}{%- endif -%}"
    return model, processor


@pytest.mark.parametrize("opening", OPENINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_targets_continue_what_the_template_has_opened(family: str, opening: str) -> None:
    _, processor = thinking(family, opening)
    renderer = KeyphraseRenderer(processor)
    prompt = renderer.prompt(post(), 0)
    assert prompt.endswith(opening) and renderer.opens_reasoning
    ends = END_OF_TURN[family]
    assert renderer.direct_target(post(), 0) == "</think>dog" + ends
    assert renderer.reasoning_target(post(), 0) == "A dog.</think><answer>dog</answer>" + ends
    for kind in ("direct", "reasoning"):
        target = renderer.target(post(), 0, kind)
        assert target is not None
        assert parse_answer("<think>" + target.removesuffix(ends)).keyphrases == ["dog"]
    rows = [
        {"id": "p", "prompt": [{"role": "user", "content": "?"}], "completion": text, "images": []}
        for text in ("dog", "\n</think>dog")
    ]
    assert [renderer.direct_target(row, 0) for row in rows] == ["</think>dog" + ends, "\n</think>dog" + ends]
    labels = ReasoningRenderer(processor, "msc")
    written = labels.target({"id": "p", "text": "a", "label": "positive"}, 0)
    assert written is not None and written.startswith("</think>") and "<think>" not in written


@pytest.mark.parametrize("opening", OPENINGS)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_vl", "llava"])
def test_forced_prefixes_are_the_beginnings_of_targets(family: str, opening: str) -> None:
    _, processor = thinking(family, opening)
    batch = PairedTargetCollator(processor)([post()])
    prompt, direct = batch["prompt"]["input_ids"].tolist(), batch["direct"]["input_ids"].tolist()
    tasks = {mode: KeyphraseGenerationTask(processor, mode=mode) for mode in ("auto", "think", "direct")}
    prompts = {mode: task.collator.collate_prompts([post()], [[]])["input_ids"].tolist() for mode, task in tasks.items()}
    assert prompts["auto"] == prompts["think"] == prompt
    closed = tasks["direct"].renderer.opening_ids
    assert closed and direct[0][: len(closed)] == closed and prompts["direct"] == [[*prompt[0], *closed]]
    assert ReasoningGenerationTask(processor, "msc").renderer.opening_ids == closed
    assert tasks["direct"].forbidden_tokens() is not None


@pytest.mark.parametrize("opening", OPENINGS)
def test_an_output_that_closes_the_reasoning_at_once_is_a_direct_answer(opening: str) -> None:
    _, tokenizer = thinking("qwen3", opening)
    for output, reasoned in (("\n</think>\n\ndog", False), ("</think>dog", False), ("A dog.</think>dog", True)):
        tokens = tokenizer_of(tokenizer)(output, add_special_tokens=False)["input_ids"]
        for mode in ("auto", "think"):
            found = KeyphraseGenerationTask(tokenizer, mode=mode).prediction("p", 9, tokens, {tokenizer.eos_token_id})
            assert (found["keyphrases"], found["reasoned"]) == (["dog"], reasoned)
    cut_off = KeyphraseGenerationTask(tokenizer).prediction("p", 9, tokenizer("dog")["input_ids"], set())
    assert (cut_off["keyphrases"], cut_off["reasoned"]) == ([], True)


@pytest.mark.parametrize("opening", OPENINGS)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_vl"])
def test_what_was_trained_is_predicted_in_every_mode(family: str, opening: str, tmp_path: Path) -> None:
    rows = [
        post(id="a", text="goal", keyphrases=["cup", "mufc"], rationale="A cup."),
        post(id="b", text="sea", rationale="Sun."),
    ]
    options = {
        "output_dir": str(tmp_path), "max_steps": 50, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        "lr_scheduler_type": "constant", "eval_generation_posts": 0,
    }  # fmt: skip
    for strategy, modes, reasoned in (("direct", ("auto", "direct"), False), ("cot", ("auto", "think"), True)):
        model, processor = thinking(family, opening)
        args = DynamicCoTConfig(strategy=strategy, **options)
        trainer = DynamicCoTTrainer(model=model, args=args, train_dataset=rows, processing_class=processor)
        trainer.train()
        for mode in modes:
            found = list(generate_keyphrases(trainer.model, processor, rows, mode=mode, max_new_tokens=48, progress=False))
            assert [row["keyphrases"] for row in found] == [row["keyphrases"] for row in rows], (strategy, mode, found)
            assert [row["reasoned"] for row in found] == [reasoned] * 2
