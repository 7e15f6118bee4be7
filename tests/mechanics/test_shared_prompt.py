"""The shared prompt equals its plain twin, in values and gradients, for every family.

Holds for left-padded prompts and targets of unequal lengths, any choice of rows, posts with and without pictures or
rationale, one or several pictures, gradient checkpointing, LoRA, sdpa and eager attention.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM

from dynkp.batches.collators import PairedTargetCollator
from dynkp.batches.targets import Targets, select
from dynkp.mechanics.shared_prompt import PlainPrompt, SharedPrompt, why_prompts_cannot_be_shared
from tests.support.exact import double
from tests.support.posts import rows
from tests.support.tiny_models import FAMILIES, build, exact_float64

TOLERANCE = 1e-10


def loss_and_gradients(model: torch.nn.Module, prompt_class: type, batch: dict[str, Any], chosen: list[int] | None):
    """A loss in which every token has another weight, so that an error in one cannot hide behind another."""
    model.zero_grad()
    prompt = prompt_class(model, batch["prompt"])
    loss = torch.zeros((), dtype=torch.float64)
    for kind, indices in (("direct", None), ("reasoning", chosen)):
        log_probs = prompt.log_probs(batch[kind], indices)
        weights = select(batch[kind]["weights"], indices)[:, : log_probs.shape[1]]
        ramp = torch.linspace(0.5, 1.5, max(weights.numel(), 1), dtype=torch.float64)[: weights.numel()]
        loss = loss - (log_probs * weights * ramp.view(weights.shape)).sum()
    loss.backward()
    return loss.item(), {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def assert_twins_agree(model: torch.nn.Module, batch: dict[str, Any], chosen: list[int] | None) -> None:
    plain_loss, plain = loss_and_gradients(model, PlainPrompt, batch, chosen)
    shared_loss, shared = loss_and_gradients(model, SharedPrompt, batch, chosen)
    assert plain_loss == pytest.approx(shared_loss, abs=TOLERANCE * max(1.0, abs(plain_loss)))
    assert plain.keys() == shared.keys() and plain
    largest = max(gradient.abs().max().item() for gradient in plain.values())
    assert largest > 1e-3, "gradients that vanish would agree whatever is computed"
    for name, gradient in plain.items():
        torch.testing.assert_close(shared[name], gradient, rtol=0, atol=TOLERANCE * max(1.0, largest), msg=name)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_two_passes(family: str, checkpointing: bool) -> None:
    model, processor = build(family)
    batch = double(PairedTargetCollator(processor)(rows(family)))
    lengths = batch["prompt"]["attention_mask"].sum(dim=1)
    assert lengths.unique().numel() > 1 and batch["prompt"]["attention_mask"][:, 0].min() == 0, "must be left-padded"
    assert why_prompts_cannot_be_shared(model) is None
    with exact_float64(model):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        for chosen in (None, [0, 3], [1], []):
            assert_twins_agree(model, batch, chosen)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "mllama", "qwen3"])
def test_equals_two_passes_with_lora(family: str, checkpointing: bool) -> None:
    model, processor = build(family)
    batch = double(PairedTargetCollator(processor)(rows(family)))
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    with exact_float64(model):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        assert_twins_agree(model, batch, [0, 1])


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "llama"])
def test_equals_two_passes_with_eager_attention(family: str) -> None:
    model, processor = build(family)
    model.set_attn_implementation("eager")
    batch = double(PairedTargetCollator(processor)(rows(family)))
    with exact_float64(model):
        assert_twins_agree(model, batch, [1, 3])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "idefics3"])
def test_batch_without_any_picture(family: str) -> None:
    model, processor = build(family)
    batch = double(PairedTargetCollator(processor)(rows(family, images=False)))
    with exact_float64(model):
        assert_twins_agree(model, batch, [0, 2])


def test_a_post_computes_what_it_computes_alone() -> None:
    """Padding changes nothing: the batch's log-probabilities are those of its posts one at a time."""
    model, processor = build("qwen2_5_vl")
    collator = PairedTargetCollator(processor)
    posts = rows("qwen2_5_vl")
    with exact_float64(model), torch.no_grad():
        batch = double(collator(posts))
        together = SharedPrompt(model, batch["prompt"]).log_probs(batch["reasoning"])
        for index, post in enumerate(posts):
            single = double(collator([post]))
            alone = SharedPrompt(model, single["prompt"]).log_probs(single["reasoning"])
            if not (length := single["reasoning"]["lengths"][0]):
                continue
            torch.testing.assert_close(together[index, :length], alone[0, :length], rtol=0, atol=TOLERANCE)
            assert not together[index, length:].any()


def test_the_prompt_pass_leaves_no_trace_on_the_model() -> None:
    """Checkpointed layers get the right to keep a cache for our calls only, so that generation keeps its own rules."""
    model, processor = build("llava")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    batch = PairedTargetCollator(processor)(rows("llava"))
    SharedPrompt(model, batch["prompt"]).log_probs(batch["direct"])
    assert not any(layer._can_checkpoint_with_cache for layer in model.model.language_model.layers)


def test_reentrant_checkpointing_is_refused_with_the_reason() -> None:
    model, _ = build("llava")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert "use_reentrant=False" in (why_prompts_cannot_be_shared(model) or "")


def test_a_model_that_ignores_the_cache_is_an_error() -> None:
    model, processor = build("llama")
    batch = PairedTargetCollator(processor)(rows("llama"))

    def without_cache(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    original = model.model.forward
    with contextlib.ExitStack() as stack:
        model.model.forward = without_cache
        stack.callback(delattr, model.model, "forward")
        with pytest.raises(RuntimeError, match="prompt_backend='plain'"):
            SharedPrompt(model, batch["prompt"])


def test_logits_that_the_model_transforms_are_scored_as_transformed() -> None:
    """Gemma 2 caps its logits behind the LM head: scores are those of its own logits."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    config = Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=0.5)
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).double()
    prompt = {"input_ids": torch.randint(64, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    ids = torch.randint(64, (2, 3))
    targets = Targets(input_ids=ids, mask=torch.ones(2, 3).bool(), weights=torch.ones(2, 3), lengths=[3, 3])
    with torch.no_grad():
        logits = model(torch.cat([prompt["input_ids"], ids], dim=1)).logits[:, 4:-1]
        assert logits.abs().max() <= 0.5
        expected = logits.log_softmax(dim=-1).gather(2, ids[..., None])[..., 0]
        for prompt_class in (SharedPrompt, PlainPrompt):
            scored = prompt_class(model, prompt).log_probs(targets)
            torch.testing.assert_close(scored.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prompt_class", [SharedPrompt, PlainPrompt])
@pytest.mark.parametrize("chosen", [None, [0, 1, 2, 3], [1, 3], [2], []], ids=str)
def test_losses_are_scattered_to_the_batch(chosen: list[int] | None, prompt_class: type) -> None:
    """Sums of the token losses where the mask is True; elsewhere an exact zero without gradient, tokens included."""
    model, processor = build("llava")
    batch = double(PairedTargetCollator(processor, answer_weight=3.0)(rows("llava")))
    mask = None if chosen is None else torch.zeros(4).bool().index_fill(0, torch.tensor(chosen, dtype=torch.long), True)
    with exact_float64(model):
        loss = prompt_class(model, batch["prompt"]).loss(batch["reasoning"], mask)
        with torch.no_grad():
            log_probs = PlainPrompt(model, batch["prompt"]).log_probs(batch["reasoning"])
    counts = torch.ones(4).bool() if mask is None else mask
    expected = -(log_probs * batch["reasoning"]["weights"]).sum(dim=1) * counts
    torch.testing.assert_close(loss.total.double(), expected, rtol=0, atol=TOLERANCE)
    assert loss.tokens.tolist() == (batch["reasoning"]["weights"].sum(dim=1) * counts).tolist()
    assert loss.total[~counts].tolist() == [0.0] * int((~counts).sum())
    assert loss.total[2] == 0 and loss.mean[2] == 0, "this post has no rationale"
    assert loss.total.requires_grad == (counts.any().item() and chosen != [2])


def test_posts_outside_the_mask_cost_nothing() -> None:
    """The language model computes the continuations of the chosen posts only, and none where no post is chosen."""
    model, processor = build("llava")
    batch = PairedTargetCollator(processor)(rows("llava"))
    prompt = SharedPrompt(model, batch["prompt"])
    sizes: list[int] = []
    layer = model.get_decoder().layers[0]
    layer.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(len(args[0])), with_kwargs=True)
    for mask in ([True, True, False, True], [False, True, False, False], [False] * 4):
        prompt.loss(batch["reasoning"], torch.tensor(mask))
    assert sizes == [3, 1]
