"""One optimizer step of AimKP, by ordinary forwards and backwards of one post after the other, in float64."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from dynkp.batches.collators import PairedTargetCollator
from dynkp.batches.prompt_layout import locate
from dynkp.mechanics.modality_masking import MODALITIES, random_keep_mask
from dynkp.mechanics.shared_prompt import prompt_positions
from dynkp.objectives.switching import below_threshold
from tests.support.aimkp_trainers import AIMKP, BOTH, aimkp, force_strides, lora, read_visits
from tests.support.posts import rows
from tests.support.tiny_models import build, exact_float64
from tests.support.trainers import EXACT, Gradients, ReportedLoss


def kept_by_hand(layout: Any, modality: str, stride: int, width: int) -> torch.Tensor:
    """Eq. 2, cell by cell."""
    keep = torch.ones(width, dtype=torch.bool)
    if modality == "text":
        text = list(layout.text)
        chosen = [slot for k, slot in enumerate(text) if k % stride == stride - 1] or text[-1:]
        keep[text] = False
        keep[chosen] = True
        return keep
    for grid in layout.grids:
        cells = [divmod(index, grid.width) for index in range(len(grid.slots))]
        chosen = [
            slot
            for slot, (a, b) in zip(grid.slots, cells, strict=True)
            if a % stride == stride - 1 and b % stride == stride - 1
        ] or [grid.slots[-1]]
        keep[list(grid.slots)] = False
        keep[chosen] = True
    return keep


def reference_gradients(
    model: torch.nn.Module, collator: PairedTargetCollator, post: dict[str, Any], kind: str, strides: dict[str, int], args: Any
) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Per view of one post: Σ nll of its target, and that sum's gradient, by an ordinary forward and backward of its own."""
    batch = collator([post])
    target, prompt = batch[kind]["input_ids"], batch["prompt"]
    prompt = {key: value.double() if value.is_floating_point() else value for key, value in prompt.items()}
    [layout] = locate(collator.renderer, [post], [len(post["images"])], prompt, args.modalities)
    positions, width = prompt_positions(model, prompt), prompt["input_ids"].shape[1]
    following = positions[..., -1:] + torch.arange(1, target.shape[1])
    found = {}
    for view in ("full", *strides):
        if view != "full" and not layout.has(view):
            continue
        keep = torch.ones(width, dtype=torch.bool)
        if view != "full" and args.mask_pattern == "strided":
            keep = kept_by_hand(layout, view, strides[view], width)
        elif view != "full" and args.mask_pattern == "pooled":
            found[view] = pooled_by_hand(model, prompt, layout, view, strides[view], target)
            continue
        elif view != "full":
            options = {"post_ids": [post["id"]], "visits": [0], "seed": args.seed}
            keep = random_keep_mask([layout], view, [strides[view]], width, **options)[0]
        inputs = dict(prompt)
        inputs["input_ids"] = torch.cat([prompt["input_ids"], target[:, :-1]], dim=1)
        inputs["attention_mask"] = torch.cat([keep[None].long(), torch.ones_like(target[:, :-1])], dim=1)
        for key in ("token_type_ids", "mm_token_type_ids"):
            if key in inputs:
                inputs[key] = torch.cat([inputs[key], torch.zeros_like(target[:, :-1])], dim=1)
        if "cross_attention_mask" in inputs:
            last = inputs["cross_attention_mask"][:, -1:].expand(-1, target.shape[1] - 1, -1, -1)
            inputs["cross_attention_mask"] = torch.cat([inputs["cross_attention_mask"], last], dim=1)
        inputs["position_ids"] = torch.cat([positions, following], dim=-1)
        logits = model(**inputs, use_cache=False).logits[0, width - 1 :]
        nll = -torch.log_softmax(logits, dim=-1)[torch.arange(target.shape[1]), target[0]].sum()
        model.zero_grad()
        nll.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        found[view] = (nll.detach(), gradients)
    model.zero_grad()
    return found


def pooled_by_hand(
    model: torch.nn.Module, prompt: dict[str, Any], layout: Any, modality: str, stride: int, target: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """LLaVA's embeddings, token by token: those of a stride replaced by their mean, positions counted anew."""
    llava = model.get_base_model()
    embeddings = llava.get_input_embeddings()(prompt["input_ids"])[0]
    images = [slot for grid in layout.grids for slot in grid.slots]
    if images:
        features = torch.cat(list(llava.model.get_image_features(pixel_values=prompt["pixel_values"]).pooler_output))
        embeddings = embeddings.index_copy(0, torch.tensor(images), features)
    groups = [[slot] for slot in range(len(embeddings))]
    if modality == "text":
        slots = list(layout.text)
        blocks = max(1, len(slots) // stride)
        groups = [group for group in groups if group[0] not in slots]
        groups += [slots[stride * b : stride * (b + 1) if b + 1 < blocks else None] for b in range(blocks)]
    for grid in layout.grids if modality == "image" else ():
        groups = [group for group in groups if group[0] not in grid.slots]
        rows_, columns = max(1, grid.height // stride), max(1, grid.width // stride)
        if grid.height < stride or grid.width < stride:
            rows_ = columns = 1
        cells: dict[tuple[int, int], list[int]] = {}
        for index, slot in enumerate(grid.slots):
            a, b = divmod(index, grid.width)
            cells.setdefault((min(a // stride, rows_ - 1), min(b // stride, columns - 1)), []).append(slot)
        groups += [cells[key] for key in sorted(cells)]
    groups.sort(key=lambda group: group[0])
    short = torch.stack([embeddings[group].mean(dim=0) for group in groups])
    answer = llava.get_input_embeddings()(target[0, :-1])
    logits = model(inputs_embeds=torch.cat([short, answer])[None], use_cache=False).logits[0, len(short) - 1 :]
    nll = -torch.log_softmax(logits, dim=-1)[torch.arange(target.shape[1]), target[0]].sum()
    model.zero_grad()
    nll.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return nll.detach(), gradients


def cosine(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    dot = sum((one[name] * other[name]).sum().item() for name in one.keys() & other.keys())
    norms = [math.sqrt(sum(gradient.square().sum().item() for gradient in side.values())) for side in (one, other)]
    return min(1.0, dot / (norms[0] * norms[1]))


def reference_step(
    model: torch.nn.Module,
    collator: PairedTargetCollator,
    posts: list[dict[str, Any]],
    strides: dict[str, dict[str, int]],
    args: Any,
    kinds: list[str],
) -> tuple[float, dict[str, torch.Tensor], dict[tuple[str, str], tuple[float, bool]]]:
    """The step's loss and gradients, and per post and modality the cosine and whether the variant was kept."""
    loss, total, tokens, visits = 0.0, {}, 0.0, {}
    lengths = [collator([post])[kind]["lengths"][0] for post, kind in zip(posts, kinds, strict=True)]
    for post, kind, length in zip(posts, kinds, lengths, strict=True):
        masked = {name: strides[name][post["id"]] for name in args.modalities}
        views = reference_gradients(model, collator, post, kind, masked, args)
        scale = 1.0 if args.loss_normalization == "token" else 1.0 / length
        tokens += length * scale
        kept = ["full"]
        for name in args.modalities:
            if name in views:
                alike = cosine(views["full"][1], views[name][1])
                visits[post["id"], name] = (alike, not args.filter_gradients or alike > args.threshold(name))
                kept += [name] * visits[post["id"], name][1]
        share = scale / (len(kept) if args.variant_reduction == "mean" else 1)
        for view in kept:
            loss += share * views[view][0].item()
            for name, gradient in views[view][1].items():
                total[name] = total.get(name, 0) + share * gradient
    return loss / tokens, {name: gradient / tokens for name, gradient in total.items()}, visits


def assert_step(family: str, folder: Path, classes: Any = AIMKP, count: int = 5, **options: Any) -> list[dict[str, Any]]:
    """One optimizer step of micro-batches of 2, 2 and 1, against the reference; returns the log of visits."""
    posts = rows(family, count)
    # Every stride of the list somewhere; several pictures, none, no text, and a grid smaller than the stride among them.
    numbers = itertools.cycle(options.pop("strides", (2, 3, 4, 8, 16, 1, 5)))
    strides = {name: {post["id"]: next(numbers) for post in posts} for name in MODALITIES}
    model, processor = build(family)
    if options.get("adapters", True):
        torch.manual_seed(0)
        model = get_peft_model(model, lora(family))
    with exact_float64(model):
        gradients = Gradients()
        trainer = aimkp(
            family, folder, posts, classes, gradient_accumulation_steps=3, max_steps=1, callbacks=[gradients], log_visits=True,
            **options,
        )  # fmt: skip
        trainer.model.double()
        model.load_state_dict(trainer.model.state_dict())  # the adapters' random weights
        for weight, ours in zip(model.parameters(), trainer.model.parameters(), strict=True):
            weight.requires_grad = ours.requires_grad
        collator = PairedTargetCollator(processor, task=trainer.args.task)
        kinds = ["direct"] * count
        if classes is BOTH:
            kinds = chosen_targets(model, collator, posts, trainer)
        loss, expected, visits = reference_step(model, collator, posts, strides, trainer.args, kinds)
        force_strides(trainer, strides)
        reported = ReportedLoss(trainer)
        trainer.train()
    [actual] = gradients.steps
    assert reported.total == pytest.approx(loss, rel=EXACT)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 1e-3
    for name in expected.keys() | actual.keys():
        zero = torch.zeros((), dtype=torch.float64)
        difference = (actual.get(name, zero) - expected.get(name, zero)).abs().max().item()
        assert difference <= EXACT * max(1.0, largest), name
    logged = read_visits(folder) if visits else []
    assert {(row["id"], row["modality"]) for row in logged} == visits.keys()
    for row in logged:
        alike, kept = visits[row["id"], row["modality"]]
        assert row["cosine"] == pytest.approx(alike, abs=EXACT) and row["kept"] == kept
        assert row["stride"] == strides[row["modality"]][row["id"]]
    return logged


def chosen_targets(model: Any, collator: Any, posts: list[dict[str, Any]], trainer: Any) -> list[str]:
    """What Dynamic CoT teaches each post, by plain forwards."""
    kinds = []
    for post in posts:
        views = reference_gradients(model, collator, post, "direct", {}, trainer.args)
        mean = views["full"][0] / collator([post])["direct"]["lengths"][0]
        easy = trainer.args.strategy == "dynamic" and bool(below_threshold(mean, trainer.gamma.value))
        kinds.append("reasoning" if post["rationale"] and easy else "direct")
    return kinds
