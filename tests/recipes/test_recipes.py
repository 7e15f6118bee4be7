"""Every recipe parses into the options of its paper, for modules that its family has, and the command line overrides it."""

from __future__ import annotations

from typing import Any

import pytest
from peft import get_peft_model
from trl import ModelConfig, TrlParser, get_peft_config

from dynkp import AimKPConfig, DynamicAimKPConfig, MulCoTRDConfig
from dynkp.recipes.catalog import Recipe, find_recipe, recipes
from dynkp.training.options import METHODS, DataArguments, PredictionArguments, TinyModelArguments
from tests.support.tiny_models import build

RECIPES = [recipe for recipe in recipes("training") if recipe.name.startswith("mmkp_dynamic_cot_")]


def parse(recipe: Recipe, *overrides: str) -> tuple[Any, ModelConfig]:
    """Read a recipe as TRL does, without looking for its model."""
    config_class = METHODS[recipe.method][1]
    parser = TrlParser((DataArguments, config_class, ModelConfig, PredictionArguments, TinyModelArguments))
    # The GPU options of the recipe are the one thing a test without GPU must set otherwise.
    arguments = ["--config", str(recipe.path), "--use_cpu", "true", "--bf16", "false", *overrides]
    data, args, model_args, *_ = parser.parse_args_and_config(arguments)
    assert data.method == recipe.method
    return args, model_args


def test_there_is_a_recipe_for_each_of_the_papers_models() -> None:
    names = {recipe.name.removeprefix("mmkp_dynamic_cot_") for recipe in RECIPES}
    assert names >= {"qwen2_5_vl_3b", "qwen2_5_vl_7b", "internvl3_2b", "internvl3_8b", "qwen2_5_3b_text", "qwen2_5_7b_text"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_recipe_has_the_papers_settings(recipe: Recipe) -> None:
    args, model_args = parse(recipe)
    small = any(size in recipe.name for size in ("_2b", "_3b"))
    assert (args.strategy, args.gamma, args.loss_normalization) == ("dynamic", "0.4", "sample")
    assert (args.learning_rate, args.lr_scheduler_type, args.num_train_epochs) == (5e-5, "cosine", 5 if small else 3)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (1, 1)
    assert args.freeze_vision_tower and "adamw" in args.optim.value and model_args.model_name_or_path
    assert args.max_length is None and args.answer_weight == 1.0


def parse_masking(name: str) -> tuple[AimKPConfig, ModelConfig]:
    return parse(find_recipe(name))


@pytest.mark.parametrize(("name", "epochs"), [("cmkp_aimkp_llava_1_5_7b", 4), ("cmkp_aimkp_qwen2_vl_7b", 6)])
def test_aimkp_recipe_has_the_papers_settings(name: str, epochs: int) -> None:
    args, model_args = parse_masking(name)
    assert isinstance(args, AimKPConfig) and args.num_train_epochs == epochs and args.task == "aimkp"
    assert (args.text_threshold, args.image_threshold, args.initial_stride, args.warmup_epochs) == (0.1, 0.4, 2, 1)
    assert (args.learning_rate, args.projector_learning_rate, args.warmup_steps, args.weight_decay) == (2e-4, 2e-5, 0.03, 0.0)
    assert (model_args.lora_r, model_args.lora_alpha, model_args.lora_dropout) == (128, 256, 0.05)
    assert 4 * args.per_device_train_batch_size * args.gradient_accumulation_steps == 64, "on the paper's four GPUs"
    assert args.metric_for_best_model == "composite" and args.eval_convention == "aimkp"
    assert args.pad_images_to_squares == ("llava" in name)
    if "qwen2_vl" in name:
        assert args.processor_kwargs == {"min_pixels": 576 * 28 * 28, "max_pixels": 576 * 28 * 28}


@pytest.mark.parametrize("recipe", ["cmkp_aimkp_llava_1_5_7b", "cmkp_aimkp_qwen2_vl_7b", "mmkp_dynamic_aimkp_qwen2_5_vl_3b"])
def test_recipes_of_aimkp_train_the_language_model_and_the_projector(recipe: str) -> None:
    """What the recipe names must exist in the family: adapters in the language model alone, the projector in full."""
    _, model_args = parse_masking(recipe)
    model, _ = build("llava" if "llava" in recipe else "qwen2_vl" if "qwen2_vl" in recipe else "qwen2_5_vl")
    adapted = get_peft_model(model, get_peft_config(model_args))
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    adapters = {name for name in trained if "lora_" in name}
    projector = "multi_modal_projector" if "llava" in recipe else "merger"
    assert adapters and all("language_model" in name for name in adapters)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in adapters} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert trained - adapters and all(projector in name for name in trained - adapters)


def test_the_combined_recipe_has_both_methods_settings() -> None:
    args, _ = parse_masking("mmkp_dynamic_aimkp_qwen2_5_vl_3b")
    assert isinstance(args, DynamicAimKPConfig)
    assert (args.strategy, args.gamma, args.text_threshold, args.image_threshold) == ("dynamic", "0.4", 0.1, 0.4)


@pytest.mark.parametrize(
    ("name", "dropout"),
    [("masc_mulcot_rd_assistant_qwen2_5_vl_7b", 0.2), ("masc_mulcot_rd_student_qwen2_5_vl_3b", 0.05)],
)
def test_mulcot_rd_recipes_have_the_papers_settings(name: str, dropout: float) -> None:
    args, model_args = parse(find_recipe(name))
    assert isinstance(args, MulCoTRDConfig) and args.task == "masc" and args.parsed_task_weights == {"label": 1.0, "chain": 1.0}
    assert (args.distillation_weight, args.temperature, args.kd_positions) == (0.3, 2.0, "answer")
    assert (args.assistant, args.soft_labels) == (None, None), "the student's recipe says where they go; λ is 0 until then"
    assert (model_args.lora_r, model_args.lora_alpha, model_args.lora_dropout) == (16, 32, dropout)
    assert args.learning_rate == 3e-4 and args.per_device_train_batch_size * args.gradient_accumulation_steps == 40
    assert args.lr_scheduler_type == "reduce_lr_on_plateau"
    assert args.lr_scheduler_kwargs == {"mode": "max", "factor": 0.5, "patience": 2}
    assert args.metric_for_best_model == "accuracy" and args.load_best_model_at_end and args.greater_is_better
    assert args.processor_kwargs == {"min_pixels": 280 * 280, "max_pixels": 280 * 280}
    model, _ = build("qwen2_5_vl")
    adapted = get_peft_model(model, get_peft_config(model_args))
    trained = {name for name, value in adapted.named_parameters() if value.requires_grad}
    assert trained and all("language_model" in name and "lora_" in name for name in trained)


def test_the_command_line_overrides_a_recipe() -> None:
    args, _ = parse(RECIPES[0], "--gamma", "quantile:0.5", "--num_train_epochs", "1")
    assert (args.gamma, args.num_train_epochs) == ("quantile:0.5", 1.0)
