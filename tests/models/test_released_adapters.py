"""Invariants of released adapters:

- a file as MulCoT-RD's code writes it (the whole PEFT state, embeddings cut to the tokenizer's length, in bfloat16 or not,
  with the names of older transformers) gives the model that it was saved from, with the same outputs;
- so does a file of the LoRA weights only, and the command's `--adapter FILE.pt`;
- names or shapes that do not match, another base model, and files that would execute something are errors that name the
  problem and the remedy; nothing in a file is executed.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dynkp.models.checkpoints import Checkpoint, find_checkpoint, load_model
from dynkp.models.fingerprints import weights_fingerprint
from dynkp.models.released_adapters import load_released_adapter, read_state
from tests.support.tiny_models import build

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CUT = 7  # rows that belong to no token


def padded_base(seed: int = 0) -> Any:
    """A tiny Qwen2.5-VL with rows of embeddings beyond its tokenizer, as published ones have."""
    model, processor = build("qwen2_5_vl", seed=seed)
    torch.manual_seed(seed)
    model.resize_token_embeddings(len(processor.tokenizer) + CUT, mean_resizing=False)
    return model, len(processor.tokenizer)


def released(path: Path, *, rank: int = 4, cut: bool = True, lora_only: bool = False, old_names: bool = False) -> Any:
    """Write a file as the authors do, and return the model it was saved from."""
    model, tokens = padded_base()
    if cut:
        model.resize_token_embeddings(tokens)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=MODULES, task_type="CAUSAL_LM")
    torch.manual_seed(5)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    state = dict(adapted.state_dict())
    if lora_only:
        state = {name: tensor for name, tensor in state.items() if "lora_" in name}
    if old_names:  # before transformers 4.52
        state = {
            name.replace("model.model.language_model.", "model.model.").replace("model.model.visual.", "model.visual."): tensor
            for name, tensor in state.items()
        }
        assert not any("language_model" in name for name in state)
    torch.save(state, path)
    return adapted.eval()


def logits(model: Any, tokens: int) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 20)[None]).logits[..., :tokens]


@pytest.mark.parametrize("form", [{}, {"old_names": True}, {"lora_only": True}, {"cut": False}, {"rank": 2}], ids=str)
def test_gives_the_model_it_was_saved_from(tmp_path: Path, form: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    saved = released(tmp_path / "a.pt", **form)
    base, tokens = padded_base()
    plain = logits(base, tokens)
    with caplog.at_level(logging.INFO, "dynkp"):
        model = load_released_adapter(base, tmp_path / "a.pt")
    assert not model.training
    assert torch.equal(logits(model, tokens), logits(saved, tokens))
    assert not torch.allclose(logits(model, tokens), plain, atol=1e-3)
    assert len(model.get_input_embeddings().weight) == tokens + CUT
    explained = [record.message for record in caplog.records if "tokenizer's length" in record.message]
    assert bool(explained) == (form.get("cut", True) and not form.get("lora_only", False))
    assert all(f"has {tokens} rows, and the model {tokens + CUT}" in message for message in explained)


def test_a_base_in_bfloat16_is_the_same_base(tmp_path: Path) -> None:
    released(tmp_path / "a.pt")
    state = {name: tensor if "lora_" in name else tensor.bfloat16() for name, tensor in torch.load(tmp_path / "a.pt").items()}
    torch.save({"state_dict": state}, tmp_path / "half.pt")
    assert load_released_adapter(padded_base()[0], tmp_path / "half.pt") is not None


def test_loads_by_name_and_as_a_folder(tmp_path: Path) -> None:
    saved = released(tmp_path / "a.pt")
    base, tokens = padded_base()
    base.save_pretrained(tmp_path / "base")
    checkpoint = find_checkpoint(str(tmp_path / "base"), str(tmp_path / "a.pt"))
    model = load_model(checkpoint)
    assert torch.equal(logits(model, tokens), logits(saved, tokens))
    model.save_pretrained(tmp_path / "folder")
    again = load_model(Checkpoint(str(tmp_path / "base"), str(tmp_path / "folder")), merge_adapter=True)
    assert torch.allclose(logits(again, tokens), logits(saved, tokens), atol=1e-5)
    with pytest.raises(FileNotFoundError, match=r"b\.pt'?: there is no such file"):
        find_checkpoint("base", str(tmp_path / "b.pt"))
    # A run with another file of the same name must not go on with the first one's predictions.
    first = weights_fingerprint(str(tmp_path / "a.pt"))
    released(tmp_path / "a.pt", rank=2)
    assert weights_fingerprint(str(tmp_path / "a.pt")) != first


def test_another_base_is_refused_unless_told(tmp_path: Path) -> None:
    released(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"differs from the model's, so the file was trained on another model"):
        load_released_adapter(padded_base(seed=1)[0], tmp_path / "a.pt")
    assert load_released_adapter(padded_base(seed=1)[0], tmp_path / "a.pt", check_base=False) is not None
    smaller, processor = build("qwen2_5_vl")
    smaller.resize_token_embeddings(len(processor.tokenizer) - 1)
    with pytest.raises(ValueError, match=r"embed_tokens.weight is \(\d+, \d+\), in the model"):
        load_released_adapter(smaller, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="weights that the model does not have"):
        load_released_adapter(build("llama")[0], tmp_path / "a.pt")


def test_names_and_shapes_are_checked(tmp_path: Path) -> None:
    released(tmp_path / "a.pt", lora_only=True)
    state = torch.load(tmp_path / "a.pt")
    first = next(name for name in state if "layers.0.self_attn.q_proj.lora_A" in name)
    torch.save({name: tensor for name, tensor in state.items() if name != first}, tmp_path / "less.pt")
    with pytest.raises(ValueError, match=r"lacks 1 LoRA weights: .*q_proj\.lora_A.*Load it onto the model"):
        load_released_adapter(padded_base()[0], tmp_path / "less.pt")
    config = LoraConfig(r=4, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"has, but the model does not have, \d+ LoRA weights"):
        load_released_adapter(padded_base()[0], tmp_path / "a.pt", config=config)
    with pytest.raises(ValueError, match=r"have other shapes than the model's: .*\(4, \d+\), in the model \(8, \d+\)"):
        load_released_adapter(padded_base()[0], tmp_path / "a.pt", config=LoraConfig(r=8, target_modules=MODULES))
    torch.save({**state, first: state[first][:2]}, tmp_path / "ranks.pt")
    with pytest.raises(ValueError, match=r"have ranks \[2, 4\]"):
        load_released_adapter(padded_base()[0], tmp_path / "ranks.pt")
    torch.save({**state, first.replace("model.model.", "model."): state[first]}, tmp_path / "twice.pt")
    with pytest.raises(ValueError, match="two weights have the name"):
        load_released_adapter(padded_base()[0], tmp_path / "twice.pt")


class _Executes:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_is_executed(tmp_path: Path) -> None:
    torch.save({"base_model.model.lora_A.default.weight": _Executes(tmp_path / "executed")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="not a plain file of tensors, and other contents are not executed"):
        read_state(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a plain file of tensors"),
        (b"PK\x03\x04 torn", "not a plain file of tensors"),
        (b"not a checkpoint", "not a plain file of tensors"),
        ({"a": 1.0}, "contents that are not named tensors"),
        ([torch.ones(1)], "contents that are not named tensors"),
        ({"lm_head.weight": torch.ones(2, 2)}, "no LoRA weights"),
    ],
    ids=str,
)
def test_other_files_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "other.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        load_released_adapter(build("llama")[0], path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_state(tmp_path / "none.pt")
