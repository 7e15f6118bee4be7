"""An AimKPTrainer on a tiny model, which masks from the first step on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from dynkp.data.sources import load_posts
from dynkp.mechanics.modality_masking import MODALITIES
from dynkp.trainer.aimkp_config import AimKPConfig
from dynkp.trainer.aimkp_trainer import AimKPTrainer
from dynkp.trainer.dynamic_aimkp_trainer import DynamicAimKPConfig, DynamicAimKPTrainer
from tests.support.posts import rows
from tests.support.trainers import trainer_of

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


def resumable(folder: Path, posts: Any = None, max_steps: int = 10, family: str = "llava", **options: Any) -> AimKPTrainer:
    """Steps of two posts over six: a warm-up of three, then masking; the checkpoints at 4 and 8 lie within an epoch."""
    settings = {"save_strategy": "steps", "save_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-3}
    settings |= {"lr_scheduler_type": "cosine", "max_steps": max_steps, "log_visits": True, "warmup_epochs": 1}
    settings |= {"image_threshold": 0.6, "projector_learning_rate": 1e-4}
    return aimkp(family, folder, rows(family, 6) if posts is None else posts, **{**settings, **options})


def killable(kind: str, shared: Path, folder: Path) -> AimKPTrainer:
    """Three epochs and a checkpoint every other step: of drawn posts, or of real photographs in all their aspect ratios."""
    if kind == "drawn":
        return resumable(folder, max_steps=16, save_steps=2)
    masc = shared / "data/masc_t15"
    posts = load_posts(masc / "test.jsonl", image_dir=masc / "images")
    posts = posts.filter(bool, input_columns=["images"]).select(range(30))
    options = {"per_device_train_batch_size": 5, "num_train_epochs": 3, "image_threshold": 0.5, "text_threshold": 0.5}
    return resumable(folder, posts, family="qwen2_5_vl", max_steps=-1, save_steps=2, **options)
