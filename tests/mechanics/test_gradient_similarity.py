"""Gradients of single posts from a batch equal those of the posts alone: losses, cosines and the update's gradients.

Holds for LoRA with a fully trained projector, for every parameter but the LM head, for variants of unequal lengths, with
and without gradient checkpointing, posts without picture, variants kept, dropped and missing, prompts shared between
variants, dropout, bfloat16; what cannot be told apart by post is refused, and DDP reduces the update.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dynkp.batches.collators import PairedTargetCollator
from dynkp.mechanics.gradient_similarity import (
    PlainPostGradients,
    PostGradients,
    _dot_of_products,
    why_gradients_cannot_be_batched,
)
from dynkp.mechanics.shared_prompt import SharedPrompt
from tests.support.post_gradients import (
    VARIANTS,
    assert_equal_gradients,
    delivered,
    image_tokens,
    lora_and_projector,
    variant_losses,
    weighted,
    with_all_variants,
)
from tests.support.posts import rows
from tests.support.tiny_models import build, exact_float64

TOLERANCE = 1e-10
FAMILIES = ("llava", "qwen2_5_vl", "llama")


def assert_twins_agree(fast: Any, plain: Any, model: torch.nn.Module) -> None:
    for variant in plain.values:
        torch.testing.assert_close(fast.values[variant], plain.values[variant], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(fast.cosines(variant), plain.cosines(variant), rtol=0, atol=TOLERANCE)
    count = plain.count
    kept = (torch.arange(count) % 2).double()
    ramp = torch.linspace(0.5, 1.5, count).double()
    everything = {variant: ramp * (1 + index) for index, variant in enumerate(plain.values)}
    some = {variant: ramp * (kept if index % 2 else 1 - kept / 2) for index, variant in enumerate(plain.values)}
    only_first = {variant: ramp * (index == 0) for index, variant in enumerate(plain.values)}
    left_out = dict.fromkeys(list(plain.values)[1:], 1 - kept)
    for weights in (everything, some, only_first, left_out):
        one, two = weighted(fast, weights), weighted(plain, weights)
        assert one.item() == pytest.approx(two.item(), abs=TOLERANCE)
        assert_equal_gradients(delivered(model, one), delivered(model, two))


def checkpoint(model: torch.nn.Module) -> None:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_one_post_at_a_time(family: str, checkpointing: bool) -> None:
    model, collator, posts = lora_and_projector(family)
    assert why_gradients_cannot_be_batched(model) is None
    with exact_float64(model):
        if checkpointing:
            checkpoint(model)
        model.train()
        fast, plain = (with_all_variants(way, model, collator, posts) for way in (PostGradients, PlainPostGradients))
        assert_twins_agree(fast, plain, model)
        torch.testing.assert_close(plain.cosines("full"), torch.ones(4).double(), rtol=0, atol=1e-12)
        assert plain.cosines("text").min() < 0.95, "variants that hardly differ would hide a mix-up"
        if family != "llama":
            assert plain.cosines("image")[[0, 2, 3]].max() < 0.999
            assert plain.cosines("image")[1] == 0 and plain.values["image"][1] == 0, "post 1 has no picture"


def test_both_ways_of_keeping_a_product_are_exercised() -> None:
    model, collator, posts = lora_and_projector("qwen2_5_vl")
    fast = with_all_variants(PostGradients, model, collator, posts)
    assert {True, False} == set(fast._in_factors.values())
    assert all("merger" in name for name, in_factors in fast._in_factors.items() if in_factors)
    assert all(not in_factors for name, in_factors in fast._in_factors.items() if "lora_" in name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_update_is_the_gradient_of_the_weighted_losses(family: str) -> None:
    """An oracle apart from the twins' common parts: autograd on the whole batch's weighted sum of losses."""
    model, collator, posts = lora_and_projector(family)
    with exact_float64(model):
        fast = with_all_variants(PostGradients, model, collator, posts)
        weights = {variant: torch.linspace(0.2, 1 + index, 4).double() for index, variant in enumerate(VARIANTS)}
        indices_of_variant = {"image": [post for post, count in enumerate(image_tokens(model, collator, posts)) if count]}
        total = torch.zeros((), dtype=torch.float64)
        for variant in VARIANTS:
            chosen = indices_of_variant.get(variant, range(4))
            if len(chosen):
                values = variant_losses(model, collator, posts, variant)(chosen)
                total = total + (values * weights[variant][torch.as_tensor(chosen)]).sum()
        loss = weighted(fast, weights)
        assert loss.item() == pytest.approx(total.item(), abs=TOLERANCE)
        assert_equal_gradients(delivered(model, loss), delivered(model, total))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "internvl", "idefics3", "qwen3"])
def test_every_parameter_of_language_model_and_projector(family: str) -> None:
    """Norms, embeddings, biases and whole linear layers, not only LoRA's."""
    model, processor = build(family)
    collator, posts = PairedTargetCollator(processor), rows(family)
    vision = ("vision_tower", "vision_model", "visual.patch", "visual.blocks", "lm_head")
    for name, weight in model.named_parameters():
        tied = family == "gemma3" and "embed_tokens" in name
        weight.requires_grad = not tied and not any(part in name for part in vision)
    assert why_gradients_cannot_be_batched(model) is None
    with exact_float64(model):
        fast, plain = (with_all_variants(way, model, collator, posts) for way in (PostGradients, PlainPostGradients))
        assert_twins_agree(fast, plain, model)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_lora_in_the_vision_tower(family: str) -> None:
    model, processor = build(family)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    assert any("vis" in name and weight.requires_grad for name, weight in model.named_parameters())
    with exact_float64(model):
        both = [
            with_all_variants(way, model, PairedTargetCollator(processor), rows(family))
            for way in (PostGradients, PlainPostGradients)
        ]
        assert_twins_agree(*both, model)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_variants_may_share_a_graph(family: str, checkpointing: bool) -> None:
    """Prompt and pictures once for all posts, continued with the one target for all and with the other for some."""
    model, collator, posts = lora_and_projector(family)
    indices_of_variant = [0, 1, 3]  # post 2 has no rationale

    def way(kind: type) -> Any:
        batch = collator(posts)
        prompt = {key: v.double() if v.is_floating_point() else v for key, v in batch["prompt"].items()}
        gradients = kind(model, 4, image_tokens(model, collator, posts))
        with gradients.rows(range(4)):
            shared = SharedPrompt(model, prompt)
            for index, (target, chosen) in enumerate((("direct", range(4)), ("reasoning", indices_of_variant))):
                gradients.add(
                    target,
                    lambda rows, target=target: -shared.log_probs(batch[target], list(rows)).sum(dim=1),
                    chosen,
                    retain_graph=index == 0 or kind is PlainPostGradients,
                )
        return gradients

    with exact_float64(model):
        if checkpointing:
            checkpoint(model)
        model.train()
        assert_twins_agree(way(PostGradients), way(PlainPostGradients), model)


def test_dropout_is_taken_as_drawn() -> None:
    """A post alone draws the same masks both ways, in a replayed layer too."""
    model, collator, posts = lora_and_projector("llava", dropout=0.3)
    with exact_float64(model):
        checkpoint(model)
        model.train()
        both = []
        for way in (PostGradients, PlainPostGradients):
            torch.manual_seed(1)
            both.append(with_all_variants(way, model, collator, posts[2:3]))
        assert_twins_agree(*both, model)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_bfloat16_keeps_the_cosines(family: str) -> None:
    model, collator, posts = lora_and_projector(family)
    exact = with_all_variants(PostGradients, model, collator, posts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast, plain = (with_all_variants(way, model, collator, posts) for way in (PostGradients, PlainPostGradients))
    for variant in VARIANTS:
        assert fast.cosines(variant).dtype == torch.float32
        torch.testing.assert_close(fast.cosines(variant), plain.cosines(variant), rtol=0, atol=1e-2)
        torch.testing.assert_close(fast.cosines(variant), exact.cosines(variant), rtol=0, atol=2e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_module_may_be_called_several_times(family: str) -> None:
    """Two passes in one graph: their gradients add up, kept as products and as factors."""
    model, collator, posts = lora_and_projector(family)
    full, text, image = (variant_losses(model, collator, posts, variant) for variant in VARIANTS)
    with exact_float64(model):
        both = [way(model, 4, image_tokens(model, collator, posts)) for way in (PostGradients, PlainPostGradients)]
        for gradients in both:
            gradients.add("full", lambda chosen: full(chosen) + image(chosen))
            gradients.add("text", lambda chosen: text(chosen) - full(chosen) / 2)
        assert_twins_agree(*both, model)


def test_dot_products_of_products() -> None:
    """By pairs of tokens and by the matrices themselves, whichever are fewer: ⟨GᵀX, HᵀY⟩."""
    for tokens in (2, 30):
        x, y, g, h = (torch.randn(tokens + extra, size).double() for size, extra in ((5, 0), (5, 1), (4, 0), (4, 1)))
        expected = ((g.T @ x) * (h.T @ y)).sum()
        torch.testing.assert_close(_dot_of_products((x, g), (y, h)), expected)


def test_a_batch_without_pictures_leaves_the_projector_alone() -> None:
    model, collator, _ = lora_and_projector("llava")
    posts = rows("llava", images=False)
    gradients = PostGradients(model, 4, [0] * 4)
    gradients.add("full", variant_losses(model, collator, posts, "full"))
    gradients.add("image", variant_losses(model, collator, posts, "image"), [])
    assert not gradients.cosines("image").any()
    found = delivered(model, weighted(gradients, {"full": torch.ones(4), "image": torch.ones(4)}))
    assert found and not any("projector" in name for name in found)


def test_an_infinite_gradient_that_is_dropped_does_no_harm() -> None:
    model, collator, posts = lora_and_projector("llama")
    gradients = PostGradients(model, 4)
    losses = variant_losses(model, collator, posts, "full")
    gradients.add("full", losses)
    gradients.add("text", lambda chosen: losses(chosen) * torch.tensor([1.0, float("inf"), 1.0, 1.0]))
    kept = (gradients.cosines("text") > 0.1).float()
    assert kept.tolist() == [1, 0, 1, 1]
    weights = {"full": torch.ones(4), "text": kept}
    assert all(gradient.isfinite().all() for gradient in delivered(model, weighted(gradients, weights)).values())


def test_the_update_scales_and_accumulates_like_any_loss() -> None:
    model, collator, posts = lora_and_projector("llama")
    gradients = with_all_variants(PostGradients, model, collator, posts)
    weights = {variant: torch.ones(4) for variant in VARIANTS[:2]}
    once = delivered(model, weighted(gradients, weights))
    (weighted(gradients, weights) / 4).backward()
    for name, weight in model.named_parameters():
        if name in once:
            torch.testing.assert_close(weight.grad, once[name] * 1.25)


def test_a_linear_layer_with_a_forward_of_its_own_keeps_it() -> None:
    """accelerate and others replace the forward of single modules: what they do is done in the recorded run too."""
    model, collator, posts = lora_and_projector("llama")
    layer = next(module for name, module in model.named_modules() if name.endswith("lora_A.default"))
    own = layer.forward = lambda inputs: 2 * torch.nn.functional.linear(inputs, layer.weight)
    with exact_float64(model):
        both = [with_all_variants(way, model, collator, posts) for way in (PostGradients, PlainPostGradients)]
        assert_twins_agree(*both, model)
    assert layer.forward is own


def test_the_model_is_left_as_it_was() -> None:
    model, collator, posts = lora_and_projector("llava")
    losses = variant_losses(model, collator, posts, "full")
    before = [vars(module).get("forward") for module in model.modules()]
    gradients = PostGradients(model, 4, image_tokens(model, collator, posts))
    gradients.add("full", losses)
    with pytest.raises(ValueError, match="one loss each"):
        gradients.add("text", lambda chosen: losses(chosen).sum())
    assert [vars(module).get("forward") for module in model.modules()] == before
    assert all(weight.grad is None for weight in model.parameters())


# Refusals ------------------------------------------------------------------------------------------------------------


def test_a_parameter_used_outside_its_module_is_an_error() -> None:
    model, collator, posts = lora_and_projector("llama")
    name, weight = next((n, w) for n, w in model.named_parameters() if w.requires_grad)
    losses = variant_losses(model, collator, posts, "full")
    with pytest.raises(RuntimeError, match="similarity_backend='plain'") as error:
        PostGradients(model, 4).add("full", lambda chosen: losses(chosen) + weight.square().sum())
    assert name in str(error.value)


def test_rows_that_cannot_be_divided_among_the_posts_are_an_error() -> None:
    model, collator, posts = lora_and_projector("llava")
    losses = variant_losses(model, collator, posts, "full")
    for tokens in ([16, 0, 31, 16], [0, 0, 0, 0]):
        with pytest.raises(RuntimeError, match="image_tokens"):
            PostGradients(model, 4, tokens).add("full", losses)


def test_rows_of_the_language_model_that_are_not_posts_are_an_error() -> None:
    """Flat tokens (a mixture of experts), and other numbers of posts than announced."""
    model, collator, posts = lora_and_projector("llama")
    losses = variant_losses(model, collator, posts, "full")
    with pytest.raises(RuntimeError, match="one row per post"):
        PostGradients(model, 4).add("full", lambda chosen: losses(range(3)).repeat(2)[:4])
    layer = model.get_base_model().model.layers[0].mlp.gate_proj
    with pytest.raises(RuntimeError, match="one row per post"):
        PostGradients(model, 4).add("full", lambda chosen: layer(torch.randn(4, 32)).sum(dim=1))


def test_float16_is_refused() -> None:
    model, collator, posts = lora_and_projector("llama")
    with pytest.raises(ValueError, match="bf16=True"), torch.autocast("cpu", dtype=torch.float16):
        PostGradients(model, 4).add("full", variant_losses(model, collator, posts, "full"))
    for way in (PostGradients, PlainPostGradients):
        with pytest.raises(ValueError, match="bf16=True"):
            way(model.half(), 4)


def test_reentrant_checkpointing_is_refused() -> None:
    model, _, _ = lora_and_projector("llama")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    for way in (PostGradients, PlainPostGradients):
        with pytest.raises(ValueError, match="use_reentrant=False"):
            way(model, 4)


def test_a_variant_is_added_once_and_weighed_only_if_added() -> None:
    model, collator, posts = lora_and_projector("llama")
    gradients = PostGradients(model, 4)
    gradients.add("full", variant_losses(model, collator, posts, "full"))
    with pytest.raises(ValueError, match="added before"):
        gradients.add("full", variant_losses(model, collator, posts, "full"))
    with pytest.raises(ValueError, match="text"):
        weighted(gradients, {"full": torch.ones(4), "text": torch.ones(4)})
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        PostGradients(model, 4)


def test_what_needs_the_plain_way_is_named_and_the_plain_way_does_it() -> None:
    dora, collator, posts = lora_and_projector("llama", use_dora=True)
    assert "DoRA" in (why_gradients_cannot_be_batched(dora) or "")
    plain = with_all_variants(PlainPostGradients, dora, collator, posts)
    assert any("magnitude" in name for name in delivered(dora, weighted(plain, {"full": torch.ones(4)})))

    model, _ = build("llama")
    assert "LM head" in (why_gradients_cannot_be_batched(model) or "")
    tied, _ = build("gemma3")
    assert "shared between modules" in (why_gradients_cannot_be_batched(tied) or "")
    replayed, _ = build("llava")
    replayed.requires_grad_(False)
    replayed.model.multi_modal_projector.gate = torch.nn.Parameter(torch.ones(1))
    replayed.model.multi_modal_projector.dropout = torch.nn.Dropout(0.1)
    assert "dropout" in (why_gradients_cannot_be_batched(replayed) or "")


# Ranks ---------------------------------------------------------------------------------------------------------------

RANK = """
import sys, torch, torch.distributed as distributed
from dynkp.mechanics.gradient_similarity import PostGradients
from tests.support import post_gradients as t
from tests.support.tiny_models import exact_float64

class Step(torch.nn.Module):
    def __init__(self, model, collator):
        super().__init__()
        self.model, self.collator = model, collator

    def forward(self, posts):
        gradients = t.with_all_variants(PostGradients, self.model, self.collator, posts)
        kept = (gradients.cosines("text") > 0.5).double()
        return t.weighted(gradients, {"full": 1 / (1 + kept), "text": kept / (1 + kept), "image": torch.ones(2).double()})

distributed.init_process_group("gloo")
rank = distributed.get_rank()
model, collator, posts = t.lora_and_projector("llava")
with exact_float64(model):
    step = torch.nn.parallel.DistributedDataParallel(Step(model, collator), find_unused_parameters=True)
    step(posts[2 * rank : 2 * rank + 2]).backward()
    ddp = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for start in (0, 2):
        (Step(model, collator)(posts[start : start + 2]) / 2).backward()
    alone = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    t.assert_equal_gradients(ddp, alone)
print("ranks agree", distributed.get_world_size())
distributed.barrier()
distributed.destroy_process_group()
"""


def test_ddp_reduces_the_update(tmp_path: Path) -> None:
    """Two gloo ranks with two posts each, the update computed inside the wrapped forward, are one process."""
    (tmp_path / "rank.py").write_text(RANK)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "rank.py")]
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=200,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.count("ranks agree 2") == 2, done.stdout[-4000:]
