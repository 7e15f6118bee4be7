"""What a trainer sets up of a model: its processor, frozen parts, learning rates; and what it refuses.

Holds, for every family: the vision tower is frozen as a whole, the projector never; the projector alone gets a learning rate of
its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from dynkp.trainer.dynamic_cot_config import DynamicCoTConfig
from dynkp.trainer.model_setup import refuse_sharded_weights, set_learning_rate
from tests.support.aimkp_trainers import aimkp
from tests.support.trainers import (
    PLAIN_SETTINGS,
    trainer_of,
    weights,
)


@pytest.mark.parametrize(
    ("family", "tower", "projector"),
    [
        ("llava", "vision_tower", "multi_modal_projector"),
        ("qwen2_vl", "visual", "visual.merger"),
        ("qwen2_5_vl", "visual", "visual.merger"),
        ("qwen3_vl", "visual", "merger"),
        ("internvl", "vision_tower", "multi_modal_projector"),
        ("gemma3", "vision_tower", "multi_modal_projector"),
        ("idefics3", "vision_model", "connector"),
        ("smolvlm", "vision_model", "connector"),
        ("mllama", "vision_model", "multi_modal_projector"),
    ],
)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "free"])
def test_freezing_the_vision_tower(family: str, tower: str, projector: str, frozen: bool, tmp_path: Path) -> None:
    trainer = trainer_of(family, tmp_path, gamma="5.7", freeze_vision_tower=frozen)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    of_projector = {name for name in before if projector in name}
    of_tower = {name for name in before if tower in name} - of_projector
    of_language = set(before) - of_tower - of_projector
    assert of_projector & moved and of_language & moved and of_tower
    assert bool(of_tower & moved) != frozen


def test_a_model_in_memory_needs_its_processor(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`processing_class` is None"):
        trainer_of("llava", tmp_path, processing_class=None)


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


def test_sharded_weights_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = DynamicCoTConfig(output_dir=str(tmp_path), **PLAIN_SETTINGS)
    refuse_sharded_weights(args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP.*Use ZeRO-2"):
        refuse_sharded_weights(args)


def test_parameters_are_moved_to_a_group_of_their_own() -> None:
    one, two, three = (torch.nn.Parameter(torch.zeros(size)) for size in (1, 2, 3))
    groups = [{"params": [one, two], "weight_decay": 0.5}, {"params": [three], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    set_learning_rate(optimizer, [two], 0.1)
    assert [([len(p) for p in group["params"]], group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        ([1], 1.0, 0.5),
        ([3], 1.0, 0.0),
        ([2], 0.1, 0.5),
    ]
