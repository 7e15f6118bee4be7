"""Every private name of TRL and transformers that we rely on exists and behaves as relied on: an upgrade fails here first."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from torch import nn
from transformers import Trainer, TrainerState
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.data_utils import prepare_multimodal_messages
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import add_fused_lm_head

from dynkp.batches.collators import PairedTargetCollator
from dynkp.mechanics.shared_prompt import PlainPrompt, SharedPrompt, score_targets
from dynkp.trainer.post_trainer import fused_score_targets
from tests.support.posts import rows
from tests.support.tiny_models import FAMILIES, build
from tests.support.trainers import trainer_of


def parameters_of(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


# TRL


def test_forward_redirection_runs_a_method_inside_the_wrappers_forward() -> None:
    """So that hooks of the wrapper (DDP's) run around it, and the inner model's own forward works within."""
    inner = nn.Linear(2, 3)
    calls: list[str] = []

    def method(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append("method")
        return model(x), model(2 * x)

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    outer = Wrapper()
    outer.register_forward_pre_hook(lambda *_: calls.append("before"))
    outer.register_forward_hook(lambda *_: calls.append("after"))
    x = torch.ones(1, 2)
    first, second = _ForwardRedirection()(outer, inner, method, inner, x)
    assert calls == ["before", "method", "after"]
    torch.testing.assert_close((first, second), (inner(x), inner(2 * x)))
    assert _ForwardRedirection()(inner, inner, lambda model, y: model(y), inner, x).equal(first), "without a wrapper"


@pytest.mark.parametrize("prompt_class", [SharedPrompt, PlainPrompt])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_scores_are_ours(family: str, prompt_class: type) -> None:
    """`fused_lm_head=True` with `shift_labels` scores every column of the input, unshifted: values and gradients."""
    model, processor = build(family)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # as SFTTrainer does
    batch = PairedTargetCollator(processor)(rows(family))
    results = []
    for score in (score_targets, fused_score_targets):
        model.zero_grad()
        log_probs = prompt_class(model, batch["prompt"], score=score).log_probs(batch["reasoning"], [0, 1])
        (log_probs * torch.linspace(0.5, 1.5, log_probs.numel()).view(log_probs.shape)).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((log_probs.detach(), gradients))
    (ours, our_gradients), (fused, fused_gradients) = results
    assert ours.shape == fused.shape and ours.dtype == fused.dtype == torch.float32
    torch.testing.assert_close(fused, ours, rtol=1e-5, atol=1e-5)
    assert not fused[~batch["reasoning"]["mask"][[0, 1]]].any()
    assert our_gradients.keys() == fused_gradients.keys()
    for name, gradient in our_gradients.items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=0, atol=1e-4 * scale, msg=name)


def test_sft_trainer_fuses_the_head_and_asks_ddp_for_unused_parameters(tmp_path: Any) -> None:
    trainer = trainer_of("llava", tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    outputs = trainer.model(input_ids=ids, shift_labels=ids, fused_lm_head=True)
    assert outputs.log_probs.shape == (1, 3) and outputs.label_mask.all()
    assert trainer.args.ddp_find_unused_parameters is True


def test_sft_config_and_trainer_take_what_we_pass() -> None:
    fields = SFTConfig.__dataclass_fields__
    assert {"dataset_kwargs", "max_length", "packing", "padding_free", "trust_remote_code"} <= fields.keys()
    assert {"gradient_checkpointing", "gradient_checkpointing_kwargs", "remove_unused_columns"} <= fields.keys()
    wanted = {"model", "args", "train_dataset", "eval_dataset", "processing_class", "data_collator", "peft_config", "callbacks"}
    assert wanted <= set(parameters_of(SFTTrainer.__init__))


def test_skip_prepare_dataset_leaves_the_posts_alone(tmp_path: Any) -> None:
    trainer = trainer_of("llama", tmp_path)
    assert {"id", "text", "keyphrases", "rationale"} <= set(trainer.train_dataset.column_names)
    assert isinstance(trainer.data_collator, PairedTargetCollator)


def test_prepare_multimodal_messages_puts_placeholders_in_front() -> None:
    messages = [{"role": "user", "content": "what?"}]
    [message] = prepare_multimodal_messages(messages, images=[None, None])
    assert [part["type"] for part in message["content"]] == ["image", "image", "text"]
    assert messages == [{"role": "user", "content": "what?"}]


# transformers' Trainer


def test_trainer_methods_have_the_signatures_we_override() -> None:
    assert parameters_of(Trainer.get_batch_samples) == ["self", "epoch_iterator", "num_batches", "device"]
    assert parameters_of(Trainer.training_step) == ["self", "model", "inputs", "num_items_in_batch"]
    assert parameters_of(Trainer.compute_loss) == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
    assert parameters_of(SFTTrainer.log) == ["self", "logs", "start_time"]
    assert parameters_of(Trainer.prediction_step)[1:] == ["model", "inputs", "prediction_loss_only", "ignore_keys"]
    assert parameters_of(Trainer._load_from_checkpoint) == ["self", "resume_from_checkpoint", "model"]
    assert parameters_of(Trainer._load_best_model) == ["self"]
    assert parameters_of(SFTTrainer._save_checkpoint) == ["self", "model", "trial"]
    assert parameters_of(Trainer._save_rng_state) == ["self", "output_dir"]
    assert "_tr_loss" in Trainer._finalize_training.__code__.co_names
    assert parameters_of(Trainer.train)[:2] == ["self", "resume_from_checkpoint"]
    assert "metric_key_prefix" in parameters_of(Trainer.evaluate)
    assert parameters_of(Trainer.floating_point_ops) == ["self", "inputs"]
    assert TRAINER_STATE_NAME == "trainer_state.json"


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_scaled_loss_is_left_alone(family: str, tmp_path: Any) -> None:
    """`loss_is_scaled_for_ga = True`: Trainer reports what `compute_loss` returns, whatever the model accepts."""
    trainer = trainer_of(family, tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=1)
    returned: list[float] = []
    original = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        loss = original(*args, **kwargs)
        returned.append(loss.item())
        return loss

    trainer.compute_loss = compute_loss
    trainer.train()
    pairs = [sum(returned[step : step + 2]) for step in range(0, len(returned), 2)]
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == pytest.approx(pairs, rel=1e-6)
    assert trainer.model_accepts_loss_kwargs == (family == "llava")


def test_foreign_entries_of_stateful_callbacks_are_kept_in_json(tmp_path: Any) -> None:
    state = TrainerState(stateful_callbacks=[])
    state.stateful_callbacks["dynkp"] = {"gamma": "avg", "statistics": {"sum": 0.1, "count": 3}}
    state.save_to_json(str(tmp_path / "state.json"))
    assert TrainerState.load_from_json(str(tmp_path / "state.json")).stateful_callbacks == state.stateful_callbacks


def test_our_callback_runs_before_logging_and_saving(tmp_path: Any) -> None:
    """`end_of_step` comes between the optimizer step and the log, and the checkpoint holds its result."""
    trainer = trainer_of("llama", tmp_path, gamma="avg", max_steps=1)
    events: list[str] = []
    end_of_step = trainer.end_of_step
    trainer.end_of_step = lambda: (events.append("end"), end_of_step())[1]

    class Listener(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            events.append("before")

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            events.append("optimizer")

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            events.append("log")

    trainer.add_callback(Listener())
    trainer.train()
    assert events[:4] == ["before", "optimizer", "end", "log"]


def test_the_random_states_are_the_last_thing_saved_before_the_trainers_state(tmp_path: Any) -> None:
    """Where ranks wait for each other, so that the trainer's state marks a checkpoint as complete."""
    trainer = trainer_of("llama", tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    files: list[set[str]] = []
    save = trainer._save_rng_state
    trainer._save_rng_state = lambda folder: (save(folder), files.append({path.name for path in Path(folder).iterdir()}))
    trainer.train()
    assert {path.name for path in (tmp_path / "checkpoint-1").iterdir()} - files[0] == {TRAINER_STATE_NAME}


def test_the_end_of_an_epoch_is_known_when_its_last_batch_is_handed_out(tmp_path: Any) -> None:
    """accelerate's `end_of_dataloader` and `remainder`, by which repeated posts are found."""
    trainer = trainer_of("llama", tmp_path, rows("llama", 5), per_device_train_batch_size=2)
    progress, seen = GradientState(), []
    for _ in trainer.get_train_dataloader():
        seen.append((progress.end_of_dataloader, progress.remainder))
    assert seen == [(False, 1), (False, 1), (True, 1)]
    assert not progress.end_of_dataloader, "no loader, no end"


# transformers' layers and caches


def test_checkpointed_layers_keep_a_cache_only_when_allowed() -> None:
    """`_can_checkpoint_with_cache` is what lets a checkpointed layer see the cache it is handed."""
    assert GradientCheckpointingLayer._can_checkpoint_with_cache is False

    class Layer(GradientCheckpointingLayer):
        def forward(self, x: torch.Tensor, past_key_values: Any = None) -> Any:
            seen.append(past_key_values)
            return x

    seen: list[Any] = []
    layer = Layer().train()
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = functools.partial(lambda function, *args: function(*args))
    layer(torch.ones(1), past_key_values="cache")
    layer._can_checkpoint_with_cache = True
    layer(torch.ones(1), past_key_values="cache")
    assert seen == [None, "cache"]


def test_reentrance_is_read_from_the_checkpointing_function() -> None:
    model, _ = build("llama")
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        function = model.model.layers[0]._gradient_checkpointing_func
        assert isinstance(function, functools.partial) and function.keywords["use_reentrant"] is reentrant


def test_cache_takes_our_layers() -> None:
    assert {"update", "get_seq_length"} <= set(dir(DynamicLayer))
    assert {"layers", "layer_class_to_replicate"} <= set(parameters_of(Cache.__init__))
    layer = DynamicLayer()
    assert layer.is_initialized is False and {"keys", "values"} <= set(vars(layer)) | set(dir(layer))


@pytest.mark.parametrize("family", FAMILIES)
def test_models_have_the_parts_we_ask_for(family: str) -> None:
    model, _ = build(family)
    assert isinstance(model.get_output_embeddings(), nn.Linear)
    assert model.config.get_text_config().num_hidden_layers > 0
    tower = model.get_encoder(modality="image")
    is_text = family in ("llama", "qwen2", "qwen3")
    assert (tower is model or tower is model.base_model) == is_text
    if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        wanted = {"input_ids", "image_grid_thw", "attention_mask", "mm_token_type_ids"}
        assert wanted <= set(parameters_of(model.base_model.get_rope_index))
        assert any("merger" in name for name, _ in tower.named_parameters())
