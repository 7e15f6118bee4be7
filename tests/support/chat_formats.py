"""What the tests of rendering and collating share: the families' ends of turn, control tokens, a post, decoded targets."""

from __future__ import annotations

from typing import Any

CONTROL_TOKENS = ["<image>", "<|image_pad|>", "<|vision_start|>", "<|im_end|>", "<|im_start|>assistant", "</s>", "<s>"]
CONTROL_TOKENS += ["<start_of_image>", "<image_soft_token>", "<end_of_turn>", "<|image|>", "<|eot_id|>", "<IMG_CONTEXT>"]
CONTROL_TOKENS += ["<end_of_utterance>", "<fake_token_around_image>", "<row_1_col_1>", "<|endoftext|>", "<pad>", "<video>"]
# What a target ends with in each family.
END_OF_TURN = {
    "qwen2_vl": "<|im_end|>\n",
    "qwen2_5_vl": "<|im_end|>\n",
    "qwen3_vl": "<|im_end|>\n",
    "internvl": "<|im_end|>\n",
    "llava": " </s>",
    "idefics3": "<end_of_utterance>\n",
    "smolvlm": "<end_of_utterance>\n",
    "gemma3": "<end_of_turn>\n",
    "mllama": "<|eot_id|>",
    "llama": "<|eot_id|>",
    "qwen2": "<|im_end|>\n",
    "qwen3": "<|im_end|>\n",
}


def tokenizer_of(processor: Any) -> Any:
    return getattr(processor, "tokenizer", processor)


def texts(processor: Any, targets: Any) -> list[str]:
    """Targets as the model writes them, control tokens included."""
    tokenizer = tokenizer_of(processor)
    return [tokenizer.decode(ids[:length]) for ids, length in zip(targets["input_ids"], targets["lengths"], strict=True)]


def post(**changes: Any) -> dict[str, Any]:
    return {"id": "p", "text": "goal", "keyphrases": ["dog"], "images": [], "rationale": "A dog."} | changes
