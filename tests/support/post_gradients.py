"""Models, posts and variants whose per-post gradients are compared, in one process and on ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from dynkp.batches.collators import PairedTargetCollator
from dynkp.batches.targets import SEQUENCE_INPUTS
from dynkp.mechanics.shared_prompt import prompt_positions, score_targets
from tests.support.exact import TOLERANCE
from tests.support.posts import rows
from tests.support.tiny_models import build

VARIANTS = ("full", "text", "image")


PROJECTORS = ("multi_modal_projector", "visual.merger")


LANGUAGE_MODEL_LINEARS = r"^(?!.*(vision|visual|projector|connector|lm_head)).*_proj$"


Build = tuple[torch.nn.Module, Any, list[dict[str, Any]]]


def lora_and_projector(family: str, dropout: float = 0.0, **changes: Any) -> Build:
    """LoRA on all linear layers of the language model, away from its zero initialization, and the whole projector."""
    model, processor = build(family)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=LANGUAGE_MODEL_LINEARS, init_lora_weights=False, lora_dropout=dropout, **changes)
    model = get_peft_model(model, config)
    for name, weight in model.named_parameters():
        if any(part in name for part in PROJECTORS):
            weight.requires_grad = True
    return model, PairedTargetCollator(processor), rows(family)


def image_token(model: torch.nn.Module) -> int:
    return getattr(model.config, "image_token_id", -1)


def image_tokens(model: torch.nn.Module, collator: Any, posts: list[dict[str, Any]]) -> list[int]:
    return (collator(posts)["prompt"]["input_ids"] == image_token(model)).sum(dim=1).tolist()


def variant_losses(
    model: torch.nn.Module, collator: Any, posts: list[dict[str, Any]], variant: str
) -> Callable[[Sequence[int]], torch.Tensor]:
    """Direct answers' mean losses: of whole prompts, without every other text token, without most image tokens.

    Text tokens are dropped and the others keep their positions, which makes the variants' lengths differ.
    """
    token = image_token(model)
    dtype = next(model.parameters()).dtype

    def losses(chosen: Sequence[int]) -> torch.Tensor:
        batch = collator([posts[post] for post in chosen])
        prompt, targets = dict(batch["prompt"]), batch["direct"]
        prompt = {key: value.to(dtype) if value.is_floating_point() else value for key, value in prompt.items()}
        ids, attended = prompt["input_ids"], prompt["attention_mask"].bool()
        positions = prompt_positions(model, prompt)
        places = torch.arange(ids.shape[1]) - (ids.shape[1] - attended.sum(dim=1, keepdim=True))
        if variant == "image":
            prompt["attention_mask"] = (attended & ((ids != token) | (places % 3 == 2))).long()
        if variant == "text":
            dropped = (ids != token) & (places % 2 == 1)
            dropped[:, -1] = False
            order = (attended & ~dropped).long().argsort(dim=1, stable=True)[:, -int((attended & ~dropped).sum(1).max()) :]
            kept = (attended & ~dropped).gather(1, order)
            for key in SEQUENCE_INPUTS:
                if key in prompt:
                    prompt[key] = prompt[key].gather(1, order)
            prompt["attention_mask"] = kept.long()
            positions = positions.gather(-1, order.expand_as(positions[..., : order.shape[1]]))
        answers, mask = targets["input_ids"], targets["mask"]
        inputs = dict(prompt)
        inputs["input_ids"] = torch.cat([prompt["input_ids"], answers[:, :-1]], dim=1)
        inputs["attention_mask"] = torch.cat([prompt["attention_mask"], mask[:, :-1].long()], dim=1)
        if "mm_token_type_ids" in prompt:
            inputs["mm_token_type_ids"] = torch.cat([prompt["mm_token_type_ids"], 0 * answers[:, :-1]], dim=1)
        following = positions[..., -1:] + torch.arange(1, answers.shape[1])
        inputs["position_ids"] = torch.cat([positions, following], dim=-1)
        log_probs = score_targets(model, {**inputs, "use_cache": False}, answers, mask)
        return -log_probs.sum(dim=1) / mask.sum(dim=1)

    return losses


def with_all_variants(way: type, model: torch.nn.Module, collator: Any, posts: list[dict[str, Any]]) -> Any:
    tokens = image_tokens(model, collator, posts)
    gradients = way(model, len(posts), tokens)
    indices_of_variant = {"image": [post for post, count in enumerate(tokens) if count]}
    for variant in VARIANTS:
        gradients.add(variant, variant_losses(model, collator, posts, variant), indices_of_variant.get(variant))
    return gradients


def weighted(gradients: Any, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Σ_m Σ_i w_im ℓ_im over the variants in `weights`, with the recorded gradients."""
    losses = gradients.losses(list(weights))
    return sum((weight * loss).sum() for weight, loss in zip(weights.values(), losses, strict=True))


def delivered(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_equal_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys() and expected
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 1e-3, "gradients that vanish would agree whatever is computed"
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=TOLERANCE * max(1.0, largest), msg=name)
