"""Every recipe parses into the options of its paper, and the command line overrides it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from trl import ModelConfig, TrlParser

from dynkp import DynamicCoTConfig

sys.path.insert(0, str(REPOSITORY / "examples"))
from train import DataArguments, PredictionArguments, TinyModelArguments  # noqa: E402

RECIPES = sorted((REPOSITORY / "examples" / "recipes").glob("mmkp_dynamic_cot_*.yaml"))


def parse(recipe: Path, *overrides: str) -> tuple[DynamicCoTConfig, ModelConfig]:
    parser = TrlParser((DataArguments, DynamicCoTConfig, ModelConfig, PredictionArguments, TinyModelArguments))
    # The GPU options of the recipe are the one thing a test without GPU must set otherwise.
    arguments = ["--config", str(recipe), "--use_cpu", "true", "--bf16", "false", *overrides]
    _, args, model_args, *_ = parser.parse_args_and_config(arguments)
    return args, model_args


def test_there_is_a_recipe_for_each_of_the_papers_models() -> None:
    names = {recipe.stem.removeprefix("mmkp_dynamic_cot_") for recipe in RECIPES}
    assert names >= {"qwen2_5_vl_3b", "qwen2_5_vl_7b", "internvl3_2b", "internvl3_8b", "qwen2_5_3b_text", "qwen2_5_7b_text"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipe_has_the_papers_settings(recipe: Path) -> None:
    args, model_args = parse(recipe)
    small = any(size in recipe.stem for size in ("_2b", "_3b"))
    assert (args.strategy, args.gamma, args.loss_normalization) == ("dynamic", "0.4", "sample")
    assert (args.learning_rate, args.lr_scheduler_type, args.num_train_epochs) == (5e-5, "cosine", 5 if small else 3)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (1, 1)
    assert args.freeze_vision_tower and "adamw" in args.optim.value and model_args.model_name_or_path
    assert args.max_length is None and args.answer_weight == 1.0


def test_the_command_line_overrides_a_recipe() -> None:
    args, _ = parse(RECIPES[0], "--gamma", "quantile:0.5", "--num_train_epochs", "1")
    assert (args.gamma, args.num_train_epochs) == ("quantile:0.5", 1.0)
