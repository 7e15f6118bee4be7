"""PostTrainer: posts of every kind train the model they are given, and nothing else of it.

Holds: posts without image or rationale and rows in TRL's format train; rows are not changed; adapters train alone; workers,
precision and a model by its name change nothing but rounding; what cannot be trained is an error that names post or option.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from dynkp import KeyphraseTrainer
from dynkp.batches.keyphrase_renderer import KeyphraseRenderer
from dynkp.mechanics.shared_prompt import PlainPrompt, SharedPrompt
from dynkp.trainer.dynamic_cot_config import DynamicCoTConfig
from dynkp.trainer.dynamic_cot_trainer import DynamicCoTTrainer
from dynkp.trainer.post_config import PostConfig
from dynkp.trainer.post_trainer import PostTrainer
from tests.support.posts import picture, rows
from tests.support.tiny_models import build
from tests.support.trainers import (
    PLAIN_SETTINGS,
    largest_difference,
    losses,
    trainer_of,
    weights,
)


def test_reentrant_checkpointing_and_a_shared_prompt_are_an_error(tmp_path: Path) -> None:
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="use_reentrant=False"):
        trainer_of("llava", tmp_path, prompt_backend="shared", **options)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "qwen3"])
def test_bf16_stays_close_to_float32(family: str, tmp_path: Path) -> None:
    runs = []
    for bf16 in (False, True):
        trainer = trainer_of(family, tmp_path, gamma="inf", bf16=bf16, gradient_checkpointing=bf16)
        trainer.train()
        runs.append(losses(trainer))
        assert all(torch.isfinite(value).all() for value in weights(trainer).values())
    assert runs[1] == pytest.approx(runs[0], rel=2e-2) and runs[1] != runs[0]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llama"])
def test_lora(family: str, checkpointing: bool, tmp_path: Path) -> None:
    """Adapters learn, nothing else moves, and the vision tower's adapters are frozen with it."""
    config = LoraConfig(r=4, target_modules=r".*(q_proj|qkv|gate_proj)", init_lora_weights=False)
    torch.manual_seed(0)
    trainer = trainer_of(family, tmp_path, gamma="5.7", peft_config=config, gradient_checkpointing=checkpointing, max_steps=2)
    assert trainer.shares_prompt
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    adapters = {name for name in before if "lora_" in name}
    towers = {name for name in adapters if "vision" in name or "visual" in name}
    assert moved == adapters - towers
    assert moved and (bool(towers) == (family != "llama"))


def test_workers_change_nothing(tmp_path: Path) -> None:
    runs = []
    for workers in (0, 1):
        trainer = trainer_of("llava", tmp_path, gamma="5.7", dataloader_num_workers=workers)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1]


def test_the_users_rows_stay_as_they_were(tmp_path: Path) -> None:
    posts = rows("llava", 4)
    before = [{**post, "images": list(post["images"])} for post in posts]
    trainer_of("llava", tmp_path, posts, eval_dataset=posts).train()
    assert posts == before


def test_posts_without_picture_or_rationale(tmp_path: Path) -> None:
    posts = [{"id": "a", "text": "goal", "keyphrases": ["mufc"]}, {"id": "b", "text": "sea", "keyphrases": ["dog"]}]
    trainer = trainer_of("llava", tmp_path, posts, gamma="inf", max_steps=1)
    trainer.train()
    assert losses(trainer, "reasoning_share") == [0.0]


def test_a_text_model_leaves_pictures_out(tmp_path: Path) -> None:
    posts = [{**post, "images": [picture(1)]} for post in rows("llama", 4)]
    with_pictures = trainer_of("llama", tmp_path, posts, gamma="5.7", max_steps=2)
    without = trainer_of("llama", tmp_path, rows("llama", 4), gamma="5.7", max_steps=2)
    with_pictures.train()
    without.train()
    assert losses(with_pictures) == losses(without)


def test_trl_rows(tmp_path: Path) -> None:
    """Conversational prompt-completion rows, with the words of ours, train the same."""
    _, processor = build("llava")
    renderer = KeyphraseRenderer(processor)
    posts = rows("llava", 4)
    converted = []
    for post in posts:
        text = renderer.task.prompt(post["text"], 0)[0]["content"][0]["text"]
        target = renderer.task.reasoning_target(post["keyphrases"], post["rationale"]) if post["rationale"] else None
        converted.append(
            {
                "id": post["id"],
                "images": post["images"],
                "prompt": [{"role": "user", "content": text}],
                "completion": [{"role": "assistant", "content": "; ".join(post["keyphrases"])}],
                "reasoning_completion": target and [{"role": "assistant", "content": target}],
            }
        )
    runs = []
    for data in (posts, converted):
        trainer = trainer_of("llava", tmp_path, data, gamma="6.2", max_steps=2)
        trainer.train()
        runs.append((losses(trainer), losses(trainer, "reasoning_share")))
    assert runs[0] == runs[1] and sum(runs[0][1]) > 0


def test_model_as_a_path(tmp_path: Path) -> None:
    model, processor = build("llava")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    trainer = DynamicCoTTrainer(
        model=str(tmp_path / "model"),
        args=DynamicCoTConfig(output_dir=str(tmp_path / "run"), gamma="5.7", **PLAIN_SETTINGS),
        train_dataset=rows("llava", 6),
    )
    trainer.train()
    ready_made = trainer_of("llava", tmp_path, gamma="5.7")
    ready_made.train()
    assert losses(trainer) == pytest.approx(losses(ready_made), rel=1e-5)


def test_no_training_posts(tmp_path: Path) -> None:
    model, processor = build("llama")
    with pytest.raises(ValueError, match="`train_dataset` is None"):
        DynamicCoTTrainer(model=model, args=DynamicCoTConfig(output_dir=str(tmp_path), bf16=False), processing_class=processor)
    with pytest.raises(ValueError, match="train set has no posts"):
        trainer_of("llama", tmp_path, posts=[])
    with pytest.raises(ValueError, match="eval set has no posts"):
        trainer_of("llama", tmp_path, eval_dataset=[])
    with pytest.raises(ValueError, match="`max_length` is 3"):  # all would be dropped
        trainer_of("llama", tmp_path, max_length=3, on_invalid="skip")


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        [{"content": "goal"}],
        [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "goal"}]}],
    ],
    ids=["empty", "no role", "a picture too few"],
)
def test_trl_rows_that_cannot_be_rendered_are_named(prompt: list[Any], tmp_path: Path) -> None:
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "mufc"}], "images": [picture(1)]}
    with pytest.raises(ValueError, match="post 'post-0': `prompt`"):
        trainer_of("llava", tmp_path, posts=[row]).train()


def test_by_itself_it_is_plain_fine_tuning(tmp_path: Path) -> None:
    """On direct targets, as strategy "direct"; under its earlier name too."""
    assert KeyphraseTrainer is PostTrainer
    plain = trainer_of("llava", tmp_path, classes=(PostTrainer, PostConfig), freeze_vision_tower=False)
    direct = trainer_of("llava", tmp_path, strategy="direct", freeze_vision_tower=False)
    for trainer in (plain, direct):
        trainer.train()
    assert losses(plain) == losses(direct) and largest_difference(weights(plain), weights(direct)) == 0


@pytest.mark.parametrize(
    ("masks", "shares", "expected"),
    [
        ([], True, PlainPrompt),
        ([[True, True], [False, False]], True, PlainPrompt),
        ([[True, False], [False, True]], True, SharedPrompt),
        ([[True, True], [True, False]], True, SharedPrompt),
        ([[True, True], [True, True]], False, PlainPrompt),
    ],
)
def test_a_prompt_is_shared_between_kinds_of_targets(
    masks: list[list[bool]], shares: bool, expected: type, tmp_path: Path
) -> None:
    trainer = trainer_of("llama", tmp_path)
    trainer.shares_prompt = shares
    batch = trainer.data_collator(rows("llama", 2))
    assert type(trainer.open_prompt(trainer.model, batch["prompt"], *map(torch.tensor, masks))) is expected
