"""What a trainer checks and sets up of a model before training: its processor, frozen parts, learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.training_args import TrainingArguments

from dynkp.mechanics.shared_prompt import causal_lm_of
from dynkp.models.checkpoints import load_processor_by_name
from dynkp.trainer.post_config import PostConfig


def refuse_sharded_weights(args: TrainingArguments) -> None:
    """Refuse settings under which each rank holds a part of the weights only.

    Args:
        args ([`~transformers.TrainingArguments`]): options of the run.

    Raises:
        ValueError: under FSDP and ZeRO-3.
    """
    if args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        sharding = "FSDP"
    elif is_deepspeed_zero3_enabled():
        sharding = "ZeRO-3"
    else:
        return
    raise ValueError(
        f"The weights would be sharded over ranks ({sharding}), which fetch each layer's from one another whenever it runs. "
        "Ranks whose posts differ run it a different number of times (one target or two, with images or without) and would "
        "wait for each other for ever. Use ZeRO-2 (examples/accelerate/zero2.yaml), DDP, or LoRA."
    )


def processor_of_model(model: str | PreTrainedModel | nn.Module, args: PostConfig) -> ProcessorMixin | PreTrainedTokenizerBase:
    """Load the processor that belongs to a model.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): the model, or its name.
        args ([`~dynkp.trainer.post_config.PostConfig`]): options `processor_kwargs` and `trust_remote_code`.

    Raises:
        ValueError: if the model was not loaded by a name.
    """
    name: Any = model if isinstance(model, str) else cast(Any, model).config._name_or_path
    if not name:
        raise ValueError(
            "`processing_class` is None, and the model was not loaded by a name that its processor could be loaded by. Give "
            "the model's processor (for a text model, its tokenizer) as `processing_class`."
        )
    options = args.processor_kwargs or {}
    return load_processor_by_name(name, trust_remote_code=args.trust_remote_code, **cast(dict[str, Any], options))


def freeze_vision_tower(model: Any) -> None:
    """Exclude the vision tower from training, adapters on it included; the projector stays as it is.

    Qwen-VL keeps its projector ("merger") inside the tower; it is not part of what the papers freeze.

    Args:
        model (`torch.nn.Module`): causal (vision-)language model, or a PEFT model around one.
    """
    causal_lm = causal_lm_of(model)
    tower = causal_lm.get_encoder(modality="image")
    if tower is causal_lm or tower is causal_lm.base_model:
        return  # a text model
    for name, parameter in tower.named_parameters():
        if "merger" not in name:
            parameter.requires_grad_(False)


def projector_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Collect the trained parameters of the layers between vision tower and language model.

    Args:
        model (`torch.nn.Module`): causal vision-language model, or a PEFT model around one.

    Raises:
        ValueError: if none of them is trained.
    """
    # LLaVA, InternVL, Gemma 3, Mllama; Qwen-VL; Idefics3 and SmolVLM.
    names = ("multi_modal_projector", "merger", "connector")
    found = [
        weight
        for name, weight in model.named_parameters()
        if weight.requires_grad and any(part.startswith(names) or "merger" in part for part in name.split("."))
    ]
    if not found:
        raise ValueError(
            "`projector_learning_rate` is set, but no parameter of a projector is trained. With LoRA, name the projector in "
            "`modules_to_save` (LLaVA: 'multi_modal_projector', Qwen-VL: 'merger'), or set projector_learning_rate to None."
        )
    return found


def set_learning_rate(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], rate: float) -> None:
    """Move some of a new optimizer's parameters into groups with a learning rate of their own.

    Args:
        optimizer (`torch.optim.Optimizer`): changed in place.
        parameters (`Sequence[torch.nn.Parameter]`): the parameters to move.
        rate (`float`): their learning rate.
    """
    wanted = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in wanted]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in wanted]
            options = {key: value for key, value in group.items() if key != "params"}
            optimizer.add_param_group({**options, "params": moved, "lr": rate})
