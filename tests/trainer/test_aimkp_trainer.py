"""AimKPTrainer: its cosines, its filter and its update are the paper's, however the optimizer step is computed.

Holds: a step equals a reference that goes through its posts one at a time with ordinary, masked forwards and a gradient
each (float64, 1e-10), batched and plain, for strides 1 to 16, kept and dropped variants, every masking pattern and ablation,
with and without gradient checkpointing; without masks it is plain fine-tuning; accumulation changes nothing; strides follow
the authors' rule step by step; a resumed run, also one that was killed, is the uninterrupted one; another dataset's strides
are an error; what cannot be right is refused.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, MistralConfig, TrainerCallback

from dynkp.batches.collators import PairedTargetCollator
from dynkp.batches.prompt_layout import locate
from dynkp.data.sources import load_posts
from dynkp.mechanics.gradient_similarity import VariantGradients
from dynkp.mechanics.modality_masking import MODALITIES, random_keep_mask, why_tokens_cannot_be_dropped
from dynkp.mechanics.shared_prompt import prompt_positions
from dynkp.objectives.switching import below_threshold
from dynkp.trainer.aimkp_config import AimKPConfig
from dynkp.trainer.aimkp_trainer import AimKPTrainer
from dynkp.trainer.dynamic_aimkp_trainer import DynamicAimKPConfig, DynamicAimKPTrainer
from dynkp.trainer.dynamic_cot_config import DynamicCoTConfig
from dynkp.trainer.dynamic_cot_trainer import DynamicCoTTrainer
from tests.support.posts import picture, rows
from tests.support.tiny_models import build, exact_float64
from tests.support.trainers import largest_difference, losses, trainer_of, weights
from tests.trainer.test_dynamic_cot_trainer import Gradients, ReportedLoss, StopAt, history

EXACT = 1e-10
AIMKP = (AimKPTrainer, AimKPConfig)
BOTH = (DynamicAimKPTrainer, DynamicAimKPConfig)
PROJECTOR = {"llava": "multi_modal_projector", "qwen2_5_vl": "merger", "internvl": "multi_modal_projector"}


def lora(family: str, dropout: float = 0.0) -> LoraConfig:
    """The paper's: all linear layers of the language model, and the projector in full."""
    modules = r"^(?!.*(vision|visual|projector|connector|lm_head)).*_proj$"
    saved = [PROJECTOR[family]] if family in PROJECTOR else None
    return LoraConfig(r=4, target_modules=modules, modules_to_save=saved, init_lora_weights=False, lora_dropout=dropout)


def aimkp(family: str, folder: Path, posts: Any = None, classes: Any = AIMKP, **options: Any) -> AimKPTrainer:
    """With masking from the first step; `adapters=False` trains all weights."""
    if options.pop("adapters", True):
        torch.manual_seed(0)
        options.setdefault("peft_config", lora(family))
    return trainer_of(family, folder, posts, classes=classes, **{"warmup_epochs": 0, **options})


def force_strides(trainer: AimKPTrainer, strides: dict[str, dict[str, int]]) -> None:
    """As if the posts' earlier visits had led to these strides."""
    visited = {name: {post: [stride, stride, -1, 0] for post, stride in strides[name].items()} for name in MODALITIES}
    schedule = trainer.new_schedule()
    schedule.load_state({**schedule.state(), "visited": visited})
    trainer.new_schedule = lambda: schedule  # type: ignore[method-assign]  # what training begins with


def read_visits(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "visits.jsonl").read_text().splitlines()]


# (a) one optimizer step against a naive reference


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


@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointing"])
@pytest.mark.parametrize("backend", ["batched", "plain"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_step_equals_the_reference(family: str, backend: str, checkpointing: bool, tmp_path: Path) -> None:
    """LoRA and the whole projector; thresholds between the cosines, so that some are kept and some are not."""
    options = {"similarity_backend": backend, "gradient_checkpointing": checkpointing}
    logged = assert_step(family, tmp_path, **options, text_threshold=0.9, image_threshold=0.8)
    assert {row["kept"] for row in logged} == {True, False}


@pytest.mark.parametrize("first", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_step_equals_the_reference_at_every_stride(family: str, first: int, tmp_path: Path) -> None:
    assert_step(family, tmp_path, strides=(first,), text_threshold=0.95, image_threshold=0.8)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "internvl", "idefics3", "smolvlm", "gemma3"])
def test_step_equals_the_reference_for_families(family: str, tmp_path: Path) -> None:
    assert_step(family, tmp_path, image_threshold=0.5, peft_config=lora(family))


ABLATIONS: list[dict[str, Any]] = [
    {"mask_text": False},
    {"mask_image": False},
    {"filter_gradients": False},
    {"variant_reduction": "sum"},
    {"loss_normalization": "sample"},
    {"mask_pattern": "random"},
    {"mask_pattern": "pooled"},
    {"prompt_backend": "plain"},
    {"text_threshold": 1.0, "image_threshold": 1.0},
]


@pytest.mark.parametrize("backend", ["batched", "plain"])
@pytest.mark.parametrize("options", ABLATIONS, ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()))
def test_step_equals_the_reference_in_every_ablation(options: dict[str, Any], backend: str, tmp_path: Path) -> None:
    assert_step("llava", tmp_path, similarity_backend=backend, **options)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3", "internvl"])
def test_pooled_batches_equal_pooled_posts(family: str, tmp_path: Path) -> None:
    """Also with 3-D positions, which must be those of smaller pictures, and with features added to deeper layers."""
    found = {}
    for backend in ("batched", "plain"):
        model, processor = build(family)
        with exact_float64(model):
            gradients = Gradients()
            trainer = aimkp(
                family, tmp_path / backend, rows(family, 4), mask_pattern="pooled", similarity_backend=backend, max_steps=1,
                log_visits=True, callbacks=[gradients], per_device_train_batch_size=4, peft_config=lora(family), task="aimkp",
                initial_stride=2, image_threshold=0.0,
            )  # fmt: skip
            trainer.model.double()
            trainer.train()
        visits = sorted(read_visits(tmp_path / backend), key=lambda row: (row["id"], row["modality"]))
        found[backend] = ([row["cosine"] for row in visits], gradients.steps[0])
    assert len(found["plain"][0]) == 6 and max(found["plain"][0]) < 1.0 + EXACT
    assert found["batched"][0] == pytest.approx(found["plain"][0], abs=EXACT)
    for name, gradient in found["plain"][1].items():
        torch.testing.assert_close(found["batched"][1][name], gradient, rtol=0, atol=EXACT)


@pytest.mark.parametrize("gamma", ["0", "between", "inf"])
@pytest.mark.parametrize("backend", ["batched", "plain"])
def test_both_methods_in_one_step(backend: str, gamma: str, tmp_path: Path) -> None:
    """The target is Dynamic CoT's choice; cosines, filter and update are AimKP's for this target."""
    options = {"similarity_backend": backend, "log_choices": True, "count": 6}

    def choices(folder: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / "choices.jsonl").read_text().splitlines()]

    expected = {"0": 0, "inf": 5}.get(gamma)
    if expected is None:  # somewhere among the posts that have a rationale, where rounding does not decide
        assert_step("llava", tmp_path / "all", classes=BOTH, gamma="inf", **options)
        observed = sorted(row["direct_loss"] for row in choices(tmp_path / "all") if row["choice"] == "reasoning")
        expected = max(range(1, 5), key=lambda index: observed[index] - observed[index - 1])
        gamma = str((observed[expected] + observed[expected - 1]) / 2)
    assert_step("llava", tmp_path, classes=BOTH, gamma=gamma, **options)
    assert [row["choice"] for row in choices(tmp_path)].count("reasoning") == expected


# (b) without masks it is plain fine-tuning; both methods without one of them are the other


def test_the_warm_up_is_plain_fine_tuning(tmp_path: Path) -> None:
    runs = []
    common = {"task": "aimkp", "loss_normalization": "token", "adapters": False, "max_steps": 3}
    for classes, options in (
        (AIMKP, {"warmup_epochs": 1}),
        (AIMKP, {"mask_text": False, "mask_image": False}),
        ((DynamicCoTTrainer, DynamicCoTConfig), {"strategy": "direct", "warmup_steps": 0}),
    ):
        options = {**common, **options}
        adapters = options.pop("adapters")
        assert not adapters
        trainer = trainer_of("llava", tmp_path, classes=classes, **{"warmup_steps": 0, **options})
        trainer.train()
        runs.append((losses(trainer), weights(trainer)))
    for run in runs[:2]:
        assert run[0] == runs[2][0] and largest_difference(run[1], runs[2][1]) == 0


def test_direct_targets_under_both_are_aimkp(tmp_path: Path) -> None:
    common = {"task": "aimkp", "loss_normalization": "token", "max_steps": 4, "image_threshold": 0.0}
    one = aimkp("llava", tmp_path / "one", **common)
    two = aimkp("llava", tmp_path / "two", classes=BOTH, strategy="direct", **common)
    for trainer in (one, two):
        trainer.train()
    assert losses(one) == losses(two) and largest_difference(weights(one), weights(two)) == 0
    assert one.schedule.state() == two.schedule.state()


# (c) batches


@pytest.mark.parametrize("normalization", ["token", "sample"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_accumulation_changes_nothing(family: str, normalization: str, tmp_path: Path) -> None:
    """Three epochs of six posts in optimizer steps of 4 and 2: 1 x 4 and 4 x 1 micro-batches."""
    runs = []
    for batch_size in (4, 1):
        trainer = aimkp(
            family,
            tmp_path / str(batch_size),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size,
            max_steps=6,
            warmup_epochs=1,
            image_threshold=0.7,
            loss_normalization=normalization,
            log_visits=True,
        )
        trainer.train()
        runs.append(trainer)
    one, other = runs
    assert losses(other) == pytest.approx(losses(one), rel=1e-5, abs=1e-6)
    assert largest_difference(weights(one), weights(other)) < 2e-6
    assert other.schedule.state() == one.schedule.state()
    for name in ("text_cosine", "image_cosine", "text_kept_share", "full_loss", "image_loss"):
        assert losses(other, name) == pytest.approx(losses(one, name), rel=1e-4), name
    assert len(read_visits(tmp_path / "4")) == len(read_visits(tmp_path / "1")) == 2 * (5 + 4)


def test_posts_without_text_or_picture_have_no_such_variant(tmp_path: Path) -> None:
    posts = [
        {"id": "words", "text": "the sea", "keyphrases": ["sea"], "images": []},
        {"id": "picture", "text": "", "keyphrases": ["dog"], "images": [picture(1)]},
    ]
    trainer = aimkp("llava", tmp_path, posts, max_steps=1, log_visits=True)
    trainer.train()
    assert sorted((row["id"], row["modality"]) for row in read_visits(tmp_path)) == [("picture", "image"), ("words", "text")]
    state = trainer.schedule.state()["visited"]
    assert (list(state["text"]), list(state["image"])) == (["words"], ["picture"])


def test_bf16_stays_close_to_float32(tmp_path: Path) -> None:
    cosines = []
    for bf16 in (False, True):
        trainer = aimkp("llava", tmp_path / str(bf16), bf16=bf16, gradient_checkpointing=bf16, max_steps=1, log_visits=True)
        trainer.train()
        cosines.append([row["cosine"] for row in read_visits(tmp_path / str(bf16))])
    assert cosines[1] == pytest.approx(cosines[0], abs=1e-2) and cosines[1] != cosines[0]


def test_mllama_masks_text_and_refuses_pictures(tmp_path: Path) -> None:
    assert_step("mllama", tmp_path, mask_image=False, peft_config=lora("mllama"))
    with pytest.raises(ValueError, match="mask_image=False"):
        aimkp("mllama", tmp_path, rows("mllama", 4), peft_config=lora("mllama"), max_steps=1)


def test_a_text_model_masks_text(tmp_path: Path) -> None:
    trainer = aimkp("llama", tmp_path, peft_config=lora("llama"), max_steps=2)
    trainer.train()
    assert losses(trainer, "text_cosine") and not losses(trainer, "image_cosine")


# (d) strides


def authors_strides(cosines: list[float], threshold: float) -> list[int]:
    """The authors' rule after each visit, as their code has it: a failure halves once and is final."""
    stride, frozen, strides = 2, False, []
    for cosine_ in cosines:
        if not frozen:
            if cosine_ > threshold:
                stride *= 2
            else:
                stride, frozen = max(2, stride // 2), True
        strides.append(stride)
    return strides


@pytest.mark.parametrize("freeze", [True, False])
def test_strides_follow_the_authors_rule(freeze: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded cosines are played back, seven epochs long; the trainer's strides are those of the rule, step by step."""
    recorded = {
        "text": {"a": [0.5, 0.3, 0.05, 0.5, 0.1, 0.9, 0.2], "b": [0.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]},
        "image": {"a": [0.9, 0.8, 0.7, 0.41, 0.4, 0.9, 0.9], "b": [0.5, 0.39, 0.5, 0.2, 0.5, 0.5, 0.1]},
    }
    posts = [{"id": name, "text": f"{name} word or two", "keyphrases": ["dog"], "images": [picture(1)]} for name in "ab"]
    trainer = aimkp(
        "llava", tmp_path, posts, num_train_epochs=8, max_steps=-1, freeze_failed_strides=freeze, warmup_epochs=1,
        variant_reduction="mean", log_visits=True, train_sampling_strategy="sequential",
    )  # fmt: skip

    def replay(self: Any, variant: str) -> torch.Tensor:
        return torch.tensor([recorded[variant][name][trainer.current_epoch - 1] for name in "ab"])

    monkeypatch.setattr(VariantGradients, "cosines", replay)
    trainer.train()
    visits = read_visits(tmp_path)
    assert len(visits) == 7 * 4
    for modality, by_post in recorded.items():
        threshold = {"text": 0.1, "image": 0.4}[modality]
        for name, sequence in by_post.items():
            used = [row["stride"] for row in visits if (row["modality"], row["id"]) == (modality, name)]
            if freeze:
                expected = [2, *authors_strides(sequence, threshold)[:-1]]
            else:
                expected = [2]
                for cosine_ in sequence[:-1]:
                    expected.append(2 * expected[-1] if cosine_ > threshold else max(2, expected[-1] // 2))
            assert used == expected, (modality, name)


def test_the_log_tells_cosines_shares_strides_and_cost(tmp_path: Path) -> None:
    trainer = aimkp("llava", tmp_path, max_steps=6, warmup_epochs=1, image_threshold=-1.0, text_threshold=1.0)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all("text_cosine" not in entry and "step_cost" not in entry for entry in log[:3])
    for entry in log[3:]:
        assert -1 <= entry["text_cosine"] <= 1 and entry["text_kept_share"] == 0.0
        assert entry["step_cost"] > 1.0
    assert log[-1]["text_stride_2"] == 1.0 and log[-1]["image_stride_4"] == 1.0


# (e) resume


def resumable(folder: Path, posts: Any = None, max_steps: int = 10, family: str = "llava", **options: Any) -> AimKPTrainer:
    """Steps of two posts over six: a warm-up of three, then masking; the checkpoints at 4 and 8 lie within an epoch."""
    settings = {"save_strategy": "steps", "save_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-3}
    settings |= {"lr_scheduler_type": "cosine", "max_steps": max_steps, "log_visits": True, "warmup_epochs": 1}
    settings |= {"image_threshold": 0.6, "projector_learning_rate": 1e-4}
    return aimkp(family, folder, rows(family, 6) if posts is None else posts, **{**settings, **options})


def measured(trainer: AimKPTrainer) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name != "step_cost"} for entry in history(trainer)]


@pytest.mark.parametrize("classes", [AIMKP, BOTH], ids=["aimkp", "both"])
@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_run_is_the_uninterrupted_one(step: int, classes: Any, tmp_path: Path) -> None:
    """Same logs, weights, strides and visits, to the last bit."""
    options = {"classes": classes, **({"gamma": "avg", "image_threshold": 0.6} if classes is BOTH else {})}
    straight = resumable(tmp_path / "straight", **options)
    straight.train()
    interrupted = resumable(tmp_path / "resumed", **options)
    interrupted.add_callback(StopAt(step + 1))
    interrupted.train()
    resumed = resumable(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / f"checkpoint-{step}"))
    assert measured(resumed) == measured(straight)
    assert largest_difference(weights(resumed), weights(straight)) == 0
    assert resumed.method_state() == straight.method_state()
    assert read_visits(tmp_path / "resumed") == read_visits(tmp_path / "straight")
    strides = {row["stride"] for row in read_visits(tmp_path / "straight")}
    assert len(strides) > 1, "a run whose strides never move proves nothing"


def test_strides_belong_to_posts_not_to_their_order(tmp_path: Path) -> None:
    interrupted = resumable(tmp_path)
    interrupted.add_callback(StopAt(5))
    interrupted.train()
    again = resumable(tmp_path, list(reversed(rows("llava", 6))))
    state = json.loads((tmp_path / "checkpoint-4/trainer_state.json").read_text())["stateful_callbacks"]["dynkp"]
    again.load_method_state(state)
    assert again.schedule.state() == state["strides"]
    other = resumable(tmp_path / "other", rows("llava", 5))
    with pytest.raises(ValueError, match="belong to 6 posts"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_checkpoint_of_another_trainer_has_no_strides(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no strides"):
        resumable(tmp_path).load_method_state({"gamma": "0.4"})


SCRIPT = """
import sys
from tests import conftest
from tests.trainer.test_aimkp_trainer import killable
from pathlib import Path
killable(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])).train()
"""


def killable(kind: str, shared: Path, folder: Path) -> AimKPTrainer:
    """Three epochs and a checkpoint every other step: of drawn posts, or of real photographs in all their aspect ratios."""
    if kind == "drawn":
        return resumable(folder, max_steps=16, save_steps=2)
    masc = shared / "data/masc_t15"
    posts = load_posts(masc / "test.jsonl", image_dir=masc / "images")
    posts = posts.filter(bool, input_columns=["images"]).select(range(30))
    options = {"per_device_train_batch_size": 5, "num_train_epochs": 3, "image_threshold": 0.5, "text_threshold": 0.5}
    return resumable(folder, posts, family="qwen2_5_vl", max_steps=-1, save_steps=2, **options)


@pytest.mark.parametrize("kind", ["drawn", "photographs"])
def test_a_killed_run_resumes(kind: str, shared: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch; the resumed process ends like one that was left alone."""
    command = [sys.executable, "-c", SCRIPT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    straight = killable(kind, shared, tmp_path / "straight")
    straight.train()
    folder = tmp_path / "killed"
    process = subprocess.Popen([*command, kind, shared, folder], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint-8/trainer_state.json").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    resumed = killable(kind, shared, folder)
    resumed.train(resume_from_checkpoint=True)
    assert largest_difference(weights(resumed), weights(straight)) == 0
    assert resumed.schedule.state() == straight.schedule.state()
    visits = read_visits(folder)
    assert visits == read_visits(tmp_path / "straight")
    assert len({row["stride"] for row in visits}) > 1 and {row["kept"] for row in visits} == {True, False}
    if kind == "photographs":
        assert len(visits) == 2 * 2 * 30
        grids = {grid for row in straight.train_dataset for grid in [straight.data_collator([row])["layouts"][0].grids[0]]}
        assert len({(grid.height, grid.width) for grid in grids}) >= 5, "many aspect ratios"


# (f) what a run leaves behind


class LiveTensors(TrainerCallback):
    """Counts the tensors that exist after each step, circles collected."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gc.collect()
        self.counts.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))


@pytest.mark.parametrize("backend", ["batched", "plain"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointing"])
def test_a_step_leaves_nothing_behind(checkpointing: bool, backend: str, tmp_path: Path) -> None:
    """Graphs, gradients of single posts and cached keys go with the step: as many tensors at step 12 as at step 4."""
    live = LiveTensors()
    aimkp(
        "llava", tmp_path, rows("llava", 4), max_steps=12, callbacks=[live], similarity_backend=backend,
        gradient_checkpointing=checkpointing, per_device_train_batch_size=4,
    ).train()  # fmt: skip
    assert live.counts[-1] <= live.counts[3] + 2, live.counts


def test_a_fresh_run_moves_an_earlier_log_aside(tmp_path: Path) -> None:
    """Also where the first rows come after the warm-up, which writes none."""
    for warmup in (0, 1, 1):
        aimkp("llava", tmp_path, max_steps=5, log_visits=True, warmup_epochs=warmup).train()
    steps = [sorted({row["step"] for row in read_visits(tmp_path)})]
    for number in (1, 2):
        lines = (tmp_path / f"visits.{number}.jsonl").read_text().splitlines()
        steps.append(sorted({json.loads(line)["step"] for line in lines}))
    assert steps == [[4, 5], [1, 2, 3, 4, 5], [4, 5]]


def test_training_twice_begins_twice(tmp_path: Path) -> None:
    trainer = aimkp("llava", tmp_path, max_steps=6, image_threshold=-1.0, text_threshold=-1.0, log_visits=True)
    used = []
    for _ in range(2):
        trainer.train()
        used.append([(row["step"], row["modality"], row["stride"]) for row in read_visits(tmp_path)])
    assert sorted(used[0]) == sorted(used[1]) and {stride for _, _, stride in used[0]} == {2, 4}


# (g) options and refusals


def test_the_projector_has_a_learning_rate_of_its_own(tmp_path: Path) -> None:
    trainer = aimkp("llava", tmp_path, projector_learning_rate=0.01, weight_decay=0.1, max_steps=1)
    trainer.train()
    names = {id(weight): name for name, weight in trainer.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert rates.keys() == {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    for name, rate in rates.items():
        assert rate == (0.01 if "projector" in name else 0.1), name
    bare = aimkp("llava", tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj"]), projector_learning_rate=0.01)
    with pytest.raises(ValueError, match="modules_to_save"):
        bare.create_optimizer()


def test_a_model_that_needs_the_plain_way_gets_it_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All weights trained, the head among them, which sees target tokens rather than posts."""
    with caplog.at_level(logging.WARNING, logger="dynkp"):
        trainer = aimkp("llava", tmp_path, adapters=False, max_steps=1)
        trainer.train()
    assert not trainer.batches_similarity and losses(trainer, "image_cosine")
    assert [record.getMessage() for record in caplog.records if "one post at a time" in record.getMessage()]
    with pytest.raises(ValueError, match="similarity_backend"):
        aimkp("llava", tmp_path, adapters=False, similarity_backend="batched")


@pytest.mark.parametrize("kind", ["embeddings", "IA3", "AdaLoRA", "VeRA", "parameters", "tokens"])
def test_adapters_without_layers_of_their_own_take_the_plain_way(kind: str, tmp_path: Path) -> None:
    """Found when the trainer is built, not after an epoch of warm-up."""
    config = {
        "embeddings": LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
        "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "AdaLoRA": peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=4),
        "VeRA": peft.VeraConfig(r=4, target_modules=["q_proj"]),
        "parameters": LoraConfig(r=2, target_modules=[], target_parameters=["q_proj.weight"]),
        "tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 6]),
    }[kind]
    trainer = aimkp("llama", tmp_path, peft_config=config, max_steps=1)
    assert not trainer.batches_similarity
    trainer.train()
    assert losses(trainer, "text_cosine")


def test_a_window_nobody_names_layers_of_is_a_window_of_all() -> None:
    """Mistral, Phi-3, Starcoder2: `sliding_window` without `layer_types`."""
    config = MistralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        sliding_window=24,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert "24 tokens back" in str(why_tokens_cannot_be_dropped(model, 25)) and why_tokens_cannot_be_dropped(model, 24) is None
    config.sliding_window = None
    assert why_tokens_cannot_be_dropped(model, 10**6) is None


def test_a_window_shorter_than_the_prompt_is_masked_not_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Gemma 3's sliding window counts slots: dropping would let it see further."""
    with caplog.at_level(logging.WARNING, logger="dynkp"):
        assert_step("gemma3", tmp_path, peft_config=lora("gemma3"))
    assert any("masked, not left out" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp16": True, "bf16": False}, "fp16"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "reentrant"),
        ({"text_threshold": 2.0}, "text_threshold"),
        ({"initial_stride": 1}, "initial_stride"),
        ({"warmup_epochs": -1}, "warmup_epochs"),
        ({"stride_schedule": "quadratic"}, "stride_schedule"),
        ({"mask_pattern": "blurred"}, "mask_pattern"),
        ({"variant_reduction": "max"}, "variant_reduction"),
        ({"similarity_backend": "fast"}, "similarity_backend"),
        ({"projector_learning_rate": -1.0}, "projector_learning_rate"),
    ],
)
def test_what_cannot_be_right_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        AimKPConfig(output_dir=str(tmp_path), use_cpu=True, **{"bf16": False, **options})


def test_streams_and_foreign_collators_are_refused(tmp_path: Path) -> None:
    stream = Dataset.from_list([{"id": "1", "text": "dog", "keyphrases": ["dog"]}]).to_iterable_dataset()
    with pytest.raises(ValueError, match="stream"):
        aimkp("llama", tmp_path, stream, peft_config=lora("llama"))
    with pytest.raises(ValueError, match="MaskingCollator"):
        aimkp("llava", tmp_path, data_collator=PairedTargetCollator(build("llava")[1]))
    nameless = [{key: value for key, value in post.items() if key != "id"} for post in rows("llava", 2)]
    for posts in (nameless, [rows("llava", 1)[0], {**nameless[1], "id": None}]):
        with pytest.raises(ValueError, match="no `id`"):
            aimkp("llava", tmp_path, posts)
    asked = [{"id": "1", "prompt": [{"role": "user", "content": "?"}], "completion": [{"role": "assistant", "content": "dog"}]}]
    with pytest.raises(ValueError, match="mask_text=False"):
        aimkp("llama", tmp_path, asked, peft_config=lora("llama"))
    with pytest.raises(ValueError, match="group_by_length"):
        aimkp("llava", tmp_path, train_sampling_strategy="group_by_length")
    with pytest.raises(ValueError, match="multitask"):
        DynamicAimKPConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, strategy="multitask")
