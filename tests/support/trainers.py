"""A trainer on a tiny model, set up so that a step is arithmetic: SGD, no clipping, no schedule, float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

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


EXACT = 1e-10


class Gradients(TrainerCallback):
    """Keeps every optimizer step's gradients."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        named = model.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


class ReportedLoss:
    """What the micro-batches report, added up in float64 (Trainer's own account is in float32)."""

    def __init__(self, trainer: Any) -> None:
        self.total, self.training_step = 0.0, trainer.training_step
        trainer.training_step = self

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = self.training_step(*args, **kwargs)
        self.total += loss.item()
        return loss


def read_choices(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (folder / "choices.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def resumable(family: str, folder: Path, max_steps: int = 6, **options: Any) -> DynamicCoTTrainer:
    """Six steps of two posts over seven posts: the checkpoint at 3 lies within the first epoch, the run in two."""
    settings = {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-3}
    settings |= {"lr_scheduler_type": "cosine", "max_steps": max_steps, "log_choices": True}
    return trainer_of(family, folder, rows(family, 7), **{**settings, **options})


def history(trainer: DynamicCoTTrainer) -> list[dict[str, Any]]:
    """What was logged at every step, clocks aside."""
    return [
        {name: value for name, value in entry.items() if "runtime" not in name and "per_second" not in name}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step
