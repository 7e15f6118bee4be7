"""A trainer on a tiny model, set up so that a step is arithmetic: SGD, no clipping, no schedule, float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dynkp.trainer.dynamic_cot_config import DynamicCoTConfig
from dynkp.trainer.dynamic_cot_trainer import DynamicCoTTrainer
from tests.support.posts import rows
from tests.support.tiny_models import build

PLAIN_SETTINGS: dict[str, Any] = {
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": 3,
}
NOT_IN_THE_CONFIG = ("eval_dataset", "peft_config", "callbacks", "processing_class", "data_collator")


def trainer_of(
    family: str,
    output_dir: Path | str,
    posts: Any = None,
    model: Any = None,
    classes: tuple[type, type] = (DynamicCoTTrainer, DynamicCoTConfig),
    **options: Any,
):
    """The trainer; `posts` defaults to six of the family's, `options` go to the config or, by name, to the trainer."""
    trainer_class, config_class = classes
    tiny, processor = build(family)
    arguments = {"processing_class": processor}
    arguments |= {name: options.pop(name) for name in NOT_IN_THE_CONFIG if name in options}
    args = config_class(output_dir=str(output_dir), **{**PLAIN_SETTINGS, "eval_generation_posts": 0, **options})
    posts = rows(family, 6) if posts is None else posts
    return trainer_class(model=tiny if model is None else model, args=args, train_dataset=posts, **arguments)


def losses(trainer: Any, name: str = "loss") -> list[float]:
    """The logged values, step by step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)
