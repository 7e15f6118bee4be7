"""A named model is loaded by the trainer, with TRL's options; without a name, a small one is built for the posts' texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset
from transformers import LlavaForConditionalGeneration

from dynkp.cli import train
from dynkp.data.sources import load_posts
from dynkp.training.models import load_model, texts_of

POSTS = [
    {"id": "0", "text": "a red fish", "keyphrases": ["fish", "sea"], "rationale": "It swims."},
    {"id": "1", "text": "", "keyphrases": ["night"], "rationale": None},
]


def options(*words: str) -> Any:
    return train.read_options(["--use_cpu", "true", "--train_file", "someone/posts", *words])


def test_a_named_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "check_available", lambda *args: None)
    asked = options("--model_name_or_path", "some/model", "--dtype", "bfloat16", "--model_revision", "v2", "--bf16", "false")
    assert load_model(asked, load_posts(POSTS)) == ("some/model", None)
    assert asked.args.model_init_kwargs == {"revision": "v2", "attn_implementation": None, "dtype": "bfloat16"}


@pytest.mark.parametrize(("method", "dropout"), [("dynamic_cot", 0.0), ("aimkp", 0.0)])
def test_a_model_from_scratch(method: str, dropout: float) -> None:
    model, processor = load_model(options("--method", method, "--tiny_hidden_size", "32"), load_posts(POSTS))
    assert isinstance(model, LlavaForConditionalGeneration) and model.config.text_config.hidden_size == 32
    assert model.config.text_config.attention_dropout == dropout
    for text in ("a red fish", "It swims.", "night"):
        assert processor.tokenizer.decode(processor.tokenizer(text, add_special_tokens=False)["input_ids"]).strip() == text
    plain = [{**post, "rationale": None} for post in POSTS]
    model, _ = load_model(options("--tiny_hidden_size", "32"), load_posts(plain))
    assert model.config.text_config.attention_dropout == 0.6, "posts without rationales are memorised less"


def test_what_no_model_can_be_built_for(tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(lambda: iter(POSTS))
    with pytest.raises(ValueError, match="A model from scratch reads all training texts first"):
        load_model(options(), stream)
    prompt, completion = ([{"role": role, "content": "a"}] for role in ("user", "assistant"))
    rows = load_posts([{"id": "0", "prompt": prompt, "completion": completion}])
    with pytest.raises(ValueError, match="A model from scratch needs posts"):
        texts_of(rows, options().args)
