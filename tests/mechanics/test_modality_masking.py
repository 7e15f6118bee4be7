"""AimKP's masks keep the cells its paper keeps, and dropping masked tokens equals masking them.

Holds: in float64, log-probabilities and gradients of both agree to 1e-10 for every family that lays pictures out as
tokens, strides 1 to 16, either modality, unequal lengths, posts without picture or without text, several pictures,
repeated rows, gradient checkpointing, LoRA, eager attention, and through the shared prompt. Masks are those computed by
hand; random ones keep as many and depend on seed, post and visit alone.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from dynkp.batches.collators import PairedTargetCollator
from dynkp.batches.image_grids import ImageGrid
from dynkp.batches.prompt_layout import PromptLayout, locate
from dynkp.mechanics import shared_prompt
from dynkp.mechanics.modality_masking import (
    encode,
    keep_mask,
    kept_cells,
    kept_tokens,
    masked,
    random_keep_mask,
    why_tokens_cannot_be_dropped,
)
from dynkp.mechanics.shared_prompt import PlainPrompt, SharedPrompt, prompt_positions
from tests.support.exact import double
from tests.support.posts import picture, rows
from tests.support.tiny_models import build, exact_float64

TOLERANCE = 1e-10
LAYOUTS = [
    PromptLayout(range(7, 12), (ImageGrid(tuple(range(1, 7)), 2, 3),)),
    PromptLayout(range(0), (ImageGrid((0, 1, 2, 3), 2, 2), ImageGrid((5, 6, 7, 8), 2, 2))),
    PromptLayout(range(11, 12), ()),
]


def stays(keep: torch.Tensor) -> list[list[int]]:
    """The slots masked in each row."""
    return [(~row).nonzero().flatten().tolist() for row in keep]


# Masks ---------------------------------------------------------------------------------------------------------------


def test_kept_cells_by_hand() -> None:
    assert kept_cells(2, 3, 1) == [0, 1, 2, 3, 4, 5]
    assert kept_cells(2, 3, 2) == [4]  # (1, 1)
    assert kept_cells(4, 6, 2) == [7, 9, 11, 19, 21, 23]
    assert kept_cells(7, 7, 3) == [2 * 7 + 2, 2 * 7 + 5, 5 * 7 + 2, 5 * 7 + 5]
    assert kept_cells(2, 6, 3) == [11], "no row is left: the last token"
    assert kept_cells(24, 24, 24) == [575] == kept_cells(24, 24, 32)
    assert kept_tokens(7, 3) == [2, 5] and kept_tokens(3, 3) == [2] and kept_tokens(2, 3) == [1]
    assert kept_tokens(0, 2) == [] and kept_tokens(3, 1) == [0, 1, 2]
    for function in (lambda: kept_cells(2, 2, 0), lambda: kept_tokens(2, 0)):
        with pytest.raises(ValueError, match="stride=0 keeps nothing"):
            function()


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 40))
def test_kept_cells_are_the_papers_congruence(height: int, width: int, stride: int) -> None:
    kept = [
        a * width + b
        for a in range(height)
        for b in range(width)
        if a % stride == (stride - 1) % stride and b % stride == (stride - 1) % stride
    ]
    assert kept_cells(height, width, stride) == (kept or [height * width - 1])
    assert kept_tokens(width, stride) == ([k for k in range(width) if k % stride == (stride - 1) % stride] or [width - 1])
    # Doubling only takes away, as long as anything qualifies: what makes the schedule a curriculum.
    if kept_cells(height, width, 2 * stride) != [height * width - 1]:
        assert set(kept_cells(height, width, 2 * stride)) <= set(kept_cells(height, width, stride))


def test_keep_masks_by_hand() -> None:
    assert stays(keep_mask(LAYOUTS, "text", [2, 2, 2], 13)) == [[7, 9, 11], [], []]
    assert stays(keep_mask(LAYOUTS, "text", [8, 1, 8], 13)) == [[7, 8, 9, 10], [], []]
    assert stays(keep_mask(LAYOUTS, "image", [1, 2, 2], 13)) == [[], [0, 1, 2, 5, 6, 7], []]
    assert stays(keep_mask(LAYOUTS, "image", [4, 4, 4], 13)) == [[1, 2, 3, 4, 5], [0, 1, 2, 5, 6, 7], []]
    with pytest.raises(ValueError, match="modality='audio' is unknown"):
        keep_mask(LAYOUTS, "audio", [2, 2, 2], 13)


def test_random_masks_keep_as_many_and_depend_on_seed_post_and_visit_alone() -> None:
    grid = PromptLayout(range(100, 140), (ImageGrid(tuple(range(64)), 8, 8),))

    def draw(post_id: str = "p", visit: int = 0, seed: int = 0, modality: str = "image") -> list[int]:
        ids, visits = [post_id, "other"], [visit, 5]
        keep = random_keep_mask([grid, grid], modality, [2, 4], 140, post_ids=ids, visits=visits, seed=seed)
        alone = random_keep_mask([grid], modality, [2], 140, post_ids=ids[:1], visits=visits[:1], seed=seed)
        assert torch.equal(keep[:1], alone), "another post in the batch changes nothing"
        return stays(keep)[0]

    for modality in ("image", "text"):
        strided = stays(keep_mask([grid], modality, [2], 140))[0]
        draws = [draw(modality=modality), *(draw(modality=modality, **{key: 1}) for key in ("visit", "seed"))]
        draws.append(draw("q", modality=modality))
        assert all(len(drawn) == len(strided) for drawn in draws)
        assert len({tuple(drawn) for drawn in [*draws, strided]}) == 5, "all differ"
        assert draw(modality=modality) == draws[0]
        twins = PromptLayout(range(0), (grid.grids[0], ImageGrid(tuple(range(70, 134)), 8, 8)))
        masked_slots = stays(random_keep_mask([twins], "image", [2], 140, post_ids=["p"], visits=[0], seed=0))[0]
        assert [slot for slot in masked_slots if slot < 64] != [slot - 70 for slot in masked_slots if slot >= 70]
        both = PromptLayout(range(70, 134), grid.grids)  # 16 of 64 stay of either
        image, text = (
            stays(random_keep_mask([both], name, [stride], 140, post_ids=["p"], visits=[0], seed=0))[0]
            for name, stride in (("image", 2), ("text", 4))
        )
        assert len(image) == len(text) and image != [slot - 70 for slot in text]
        assert set(draws[0]) <= (set(range(64)) if modality == "image" else set(range(100, 140)))


# Dropping equals masking -----------------------------------------------------------------------------------------------


def collated(processor: Any, posts: list[dict[str, Any]], modalities: tuple[str, ...] = ("text", "image")):
    """The batch, in which every target token has another weight, and where its posts lie."""
    collator = PairedTargetCollator(processor, task="aimkp", kinds=("direct",))
    batch = double(collator(posts))
    weights = batch["direct"]["weights"]
    batch["direct"]["weights"] = weights * torch.linspace(0.5, 1.5, weights.numel(), dtype=torch.float64).view(weights.shape)
    counts = [len(post["images"]) for post in posts]
    return batch, locate(collator.renderer, posts, counts, batch["prompt"], modalities)


def loss_and_gradients(model: Any, prompt_class: type, inputs: dict[str, Any], positions: torch.Tensor, targets: Any):
    """Positions as given, not as `prompt_class` would find them in a masked prompt."""
    model.zero_grad()
    with mock.patch.object(shared_prompt, "prompt_positions", lambda *_: positions):
        log_probs = prompt_class(model, inputs).log_probs(targets)
    loss = -(log_probs * targets["weights"]).sum()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(left: tuple[float, dict], right: tuple[float, dict]) -> None:
    assert left[0] == pytest.approx(right[0], abs=TOLERANCE * max(1.0, abs(right[0])))
    largest = max(gradient.abs().max().item() for gradient in right[1].values())
    assert largest > 1e-3, "gradients that vanish would agree whatever is computed"
    for name in left[1].keys() | right[1].keys():
        found = [side[1].get(name, torch.zeros(())) for side in (left, right)]
        assert (found[0] - found[1]).abs().max() <= TOLERANCE * max(1.0, largest), name


def check(model: Any, batch: dict[str, Any], keep: torch.Tensor, prompt_class: type = PlainPrompt) -> float:
    """Compares both ways; returns the loss."""
    prompt = batch["prompt"]
    plain = loss_and_gradients(model, PlainPrompt, masked(prompt, keep), prompt_positions(model, prompt), batch["direct"])
    view = encode(model, prompt).view(keep)
    longest = int((prompt["attention_mask"].bool() & keep).sum(dim=1).max())
    assert view.inputs["input_ids"].shape[1] == view.positions.shape[-1] == longest
    assert_equal(loss_and_gradients(model, prompt_class, view.inputs, view.positions, batch["direct"]), plain)
    return plain[0]


@pytest.mark.parametrize("modality", ["text", "image"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "smolvlm"])
def test_dropping_equals_masking(family: str, modality: str) -> None:
    model, processor = build(family)
    batch, layouts = collated(processor, rows(family))
    width = batch["prompt"]["input_ids"].shape[1]
    assert why_tokens_cannot_be_dropped(model, width) is None
    with exact_float64(model):
        model.train()
        losses = [
            check(model, batch, keep_mask(layouts, modality, [stride, 2, stride, 2 * stride], width))
            for stride in (1, 2, 3, 4, 5, 8, 16)
        ]
    full = losses[0]
    assert all(abs(loss - full) > 1e-6 for loss in losses[1:]), "a mask that changes nothing proves nothing"


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("setting", ["checkpointing", "lora", "eager", "shared", "shared and checkpointing"])
def test_dropping_equals_masking_in_other_settings(family: str, setting: str) -> None:
    model, processor = build(family)
    batch, layouts = collated(processor, rows(family))
    if setting == "eager":
        model.set_attn_implementation("eager")
    if setting == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    with exact_float64(model):
        if "checkpointing" in setting:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        for modality in ("text", "image"):
            keep = keep_mask(layouts, modality, [2, 3, 4, 2], batch["prompt"]["input_ids"].shape[1])
            check(model, batch, keep, SharedPrompt if "shared" in setting else PlainPrompt)


def with_text(family: str) -> list[dict[str, Any]]:
    return [post for post in rows(family) if post["text"]]


@pytest.mark.parametrize("family", ["mllama", "llama"])
def test_text_without_image_tokens_drops_too(family: str) -> None:
    model, processor = build(family)
    batch, layouts = collated(processor, with_text(family), ("text",))
    with exact_float64(model):
        check(model, batch, keep_mask(layouts, "text", [2] * len(layouts), batch["prompt"]["input_ids"].shape[1]))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "mllama"])
def test_full_and_masked_views_in_one_pass(family: str) -> None:
    """Rows may be repeated: all views of every post in one pass give the sum of the passes of each."""
    model, processor = build(family)
    modalities = ("text",) if family == "mllama" else ("text", "image")
    batch, layouts = collated(processor, with_text(family), modalities)
    prompt, targets, count, width = batch["prompt"], batch["direct"], len(layouts), batch["prompt"]["input_ids"].shape[1]
    keeps = [torch.ones(count, width, dtype=torch.bool)]
    keeps += [keep_mask(layouts, modality, [2] * count, width) for modality in modalities]
    with exact_float64(model):
        positions = prompt_positions(model, prompt)
        passes = [loss_and_gradients(model, PlainPrompt, masked(prompt, keep), positions, targets) for keep in keeps]
        names = {name for _, gradients in passes for name in gradients}
        total = (
            sum(loss for loss, _ in passes),
            {name: sum(gradients.get(name, torch.zeros(())) for _, gradients in passes) for name in names},
        )
        view = encode(model, prompt).view(torch.cat(keeps), [*range(count)] * len(keeps))
        repeated = {key: torch.cat([value] * len(keeps)) for key, value in targets.items() if key != "lengths"}
        repeated["lengths"] = targets["lengths"] * len(keeps)
        assert_equal(loss_and_gradients(model, PlainPrompt, view.inputs, view.positions, repeated), total)


def test_a_masked_last_token_still_predicts() -> None:
    """A template may end with the post's text; its last token, masked, is asked but not seen."""
    model, processor = build("llava")
    batch, layouts = collated(processor, rows("llava"))
    keep = keep_mask(layouts, "text", [2] * 4, batch["prompt"]["input_ids"].shape[1])
    keep[:, -1] = False
    with exact_float64(model):
        prompt = batch["prompt"]
        positions = prompt_positions(model, prompt)
        plain = loss_and_gradients(model, PlainPrompt, masked(prompt, keep), positions, batch["direct"])
        view = encode(model, prompt).view(keep)
        assert view.inputs["attention_mask"][:, -1].tolist() == [0] * 4
        assert_equal(loss_and_gradients(model, PlainPrompt, view.inputs, view.positions, batch["direct"]), plain)


def test_dropped_prompts_by_hand() -> None:
    model, processor = build("llava")
    batch, layouts = collated(processor, rows("llava", 2))  # one picture of 4x4 tokens, and a long text without picture
    prompt = batch["prompt"]
    width = prompt["input_ids"].shape[1]
    keep = keep_mask(layouts, "image", [2, 2], width)
    view = encode(model, prompt).view(keep)
    left = [(prompt["attention_mask"][row].bool() & keep[row]).nonzero().flatten() for row in range(2)]
    assert len(left[0]) == int(prompt["attention_mask"][0].sum()) - 12 and len(left[1]) == width
    for row in range(2):
        pad = width - len(left[row])
        assert view.inputs["attention_mask"][row].tolist() == [0] * pad + [1] * len(left[row])
        assert torch.equal(view.inputs["input_ids"][row, pad:], prompt["input_ids"][row, left[row]])
        first = left[row][0] if row else int((1 - prompt["attention_mask"][row]).sum())
        assert torch.equal(view.positions[row, pad:], left[row] - first), "positions keep their gaps"
    features = model.base_model.get_image_features(pixel_values=prompt["pixel_values"], return_dict=True).pooler_output
    (kept,) = view.inputs["mm_encoder_outputs"]["image"].pooler_output
    torch.testing.assert_close(kept, torch.cat(list(features))[[5, 7, 13, 15]])
    assert (view.feature_index[0] >= 0).sum() == 4 and view.feature_index[1].max() == -1
    # A view of posts without picture only has no features left, and views of views are views.
    assert "mm_encoder_outputs" not in encode(model, prompt).view(keep[1:], [1]).inputs
    again = view.view(torch.ones_like(view.inputs["input_ids"]).bool())
    assert torch.equal(again.inputs["input_ids"], view.inputs["input_ids"])
    assert torch.equal(again.feature_index, view.feature_index)


def test_what_dropping_cannot_do_is_said() -> None:
    """Gemma 3's window counts slots: dropping tokens lets it see further, so the losses differ, and it is refused."""
    model, processor = build("gemma3")
    post = {"id": "1", "text": "a long day at the sea " * 8, "keyphrases": ["k"], "images": [picture(1)]}
    batch, layouts = collated(processor, [post])
    prompt, targets = batch["prompt"], batch["direct"]
    width = prompt["input_ids"].shape[1]
    assert "attend to 48 tokens back" in str(why_tokens_cannot_be_dropped(model, width))
    assert why_tokens_cannot_be_dropped(model, 48) is None
    keep = keep_mask(layouts, "text", [2], width)
    with exact_float64(model):
        plain = loss_and_gradients(model, PlainPrompt, masked(prompt, keep), prompt_positions(model, prompt), targets)
        view = encode(model, prompt).view(keep)
        dropped = loss_and_gradients(model, PlainPrompt, view.inputs, view.positions, targets)
        assert abs(plain[0] - dropped[0]) > 1e-6
        model.config.get_text_config().sliding_window = 4096
        for modality in ("text", "image"):
            check(model, batch, keep_mask(layouts, modality, [2], width))
    llama, _ = build("llama")
    llama.config._attn_implementation = "flash_attention_2"
    assert "Flash Attention" in str(why_tokens_cannot_be_dropped(llama, 10))
