"""Invariants of generation tasks (more of them in tests/prediction/test_generation.py):

- an output ends at the first stop token, and outputs without one are counted as cut off;
- a prompt is made of the columns of its modality, and of no gold column;
- only mode "direct" forbids tokens: those that <think> could begin with, and the tags of reasoning.
"""

from __future__ import annotations

import pytest

from dynkp.prediction.generation_tasks import KeyphraseGenerationTask, ReasoningGenerationTask, prompt_columns
from tests.support.tiny_models import build


def test_a_reasoning_output_is_read():
    _, processor = build("llava")
    tokenizer = processor.tokenizer
    task = ReasoningGenerationTask(processor, "masc", prompt="chain", modality="text")
    output = '"Text_analysis": "a cheer"\n\n"Prediction": positive'
    tokens = tokenizer(output, add_special_tokens=False)["input_ids"]
    stops = task.stop_ids(None)
    assert stops == KeyphraseGenerationTask(processor).stop_ids(None)
    found = task.prediction("7", 11, [*tokens, min(stops), 5, 6], stops)
    assert found == {
        "id": "7",
        "prediction": "positive",
        "raw": output,
        "output_tokens": len(tokens),
        "prompt_tokens": 11,
        "output_words": len(output.split()),
        "prompt": "chain",
        "modality": "text",
    }
    assert task.num_cut_off == 0
    assert task.prediction("7", 11, tokens[:8], stops)["prediction"] is None and task.num_cut_off == 1
    keyphrases = ReasoningGenerationTask(processor, "keyphrases").read("7", '"Prediction": "dog; sea"', 9, 11)
    assert (keyphrases["keyphrases"], keyphrases["prediction"]) == (["dog", "sea"], "dog; sea")


def test_prompt_columns() -> None:
    post = {"text": "goal", "images": ["a.jpg"], "keyphrases": ["mufc"], "rationale": "why", "label": "positive"}
    assert prompt_columns(post, 3) == {"id": "3", "text": "goal", "images": ["a.jpg"]}
    assert prompt_columns(post, modality="image")["text"] == ""
    assert prompt_columns(post, modality="text")["images"] == []
    with pytest.raises(ValueError, match="post 'p': modality='text' needs posts with `text` and `images`"):
        prompt_columns({"id": "p", "prompt": [{"role": "user", "content": "?"}]}, modality="text")


def test_forbidden_tokens() -> None:
    _, tokenizer = build("llama")
    assert KeyphraseGenerationTask(tokenizer).forbidden_tokens() is None
    assert ReasoningGenerationTask(tokenizer, "msc").forbidden_tokens() is None
    forbidden = KeyphraseGenerationTask(tokenizer, mode="direct").forbidden_tokens()
    assert forbidden is not None
    assert all("<think>".startswith(tokenizer.decode([index]).strip()) for index in forbidden.at_start)
    assert tokenizer.convert_tokens_to_ids("<") in forbidden.at_start
    assert tokenizer.eos_token_id in forbidden.whitespace and not forbidden.whitespace & forbidden.at_start
