"""Adapters released as one `.pt` file of a PEFT model's state, such as MulCoT-RD's, loaded safely onto their base model.

Given   a base model and a file that `torch.save(peft_model.state_dict(), ...)` wrote, with or without the base's weights.
Gives   the model with the adapter.
Holds   nothing in the file is executed (`weights_only=True`); every LoRA weight of file and model is matched by name and
        shape, or the error lists which are not; the file's copy of the base model, if it has one, must be the base model.

Two things stand between such a file and today's libraries. Names: transformers 4.52 put the layers of vision-language models
one level deeper (`model.layers` became `model.language_model.layers`), so levels that only group are left out of the
comparison. Embedding rows: MulCoT-RD's code cuts the embeddings to the tokenizer's length before training (Qwen2.5-VL:
151,936 rows to 151,665). The rows cut off belong to no token and LoRA trains none of them, so the model keeps its own.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

SUFFIXES = (".pt", ".pth")
# Levels of a name that group and say nothing else, and the adapter's name.
_GROUPS = frozenset({"base_model", "model", "language_model", "vision_model", "base_layer", "default"})
_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")
# How many names an error lists.
_SHOWN = 5


def load_released_adapter(
    model: PreTrainedModel, path: str | os.PathLike[str], *, config: LoraConfig | None = None, check_base: bool = True
) -> PeftModel:
    """Put a released adapter onto its base model.

    Args:
        model: the base model; it is changed in place, as by `get_peft_model`.
        path: the `.pt` file.
        config: of the LoRA. By default rank and modules are the file's, and alpha is twice the rank, MulCoT-RD's ratio: the
            file does not say it.
        check_base: whether the base weights in the file, if any, must be the model's (to the precision of bfloat16).

    Returns:
        The PEFT model, in evaluation mode; `save_pretrained` makes a folder of it that PEFT and vLLM read.

    Raises:
        ValueError: if the file holds more than tensors, or no LoRA weights; naming the weights, if names or shapes do not
            fit the model, or the file's base weights are another model's.
        FileNotFoundError: if there is no such file.

    Example:
        >>> base = AutoModelForImageTextToText.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct")
        >>> model = load_released_adapter(base, "MulCoT-RD-3B.pt")
        >>> model.save_pretrained("mulcot-rd-3b")
    """
    state = read_state(path)
    lora = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    ranks = {tensor.shape[0] for name, tensor in lora.items() if ".lora_A." in name}
    if not ranks:
        raise ValueError(f"{path}: there are no LoRA weights (names with 'lora_A') among its {len(state)} tensors")
    if config is None:
        if len(ranks) > 1:
            raise ValueError(f"{path}: its LoRA weights have ranks {sorted(ranks)}: pass config= with a rank_pattern")
        modules = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in lora})
        rank = ranks.pop()
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules)
    if check_base:
        _check_base(model, state, path)  # before the model is changed
    adapted = get_peft_model(model, config)
    own = _by_plain_name({name: tensor for name, tensor in adapted.state_dict().items() if ".lora_" in name}, "the model")
    given = _by_plain_name(lora, path)
    for names, what in ((own.keys() - given.keys(), "lacks"), (given.keys() - own.keys(), "has, and the model does not,")):
        if names:
            raise ValueError(
                f"{path} {what} {len(names)} LoRA weights: {_listed(names)}. Load it onto the model it was trained on, or "
                "pass config= with its target_modules"
            )
    if wrong := [name for name in own if own[name].shape != given[name].shape]:
        shapes = [f"{name} {tuple(given[name].shape)}, in the model {tuple(own[name].shape)}" for name in sorted(wrong)]
        raise ValueError(
            f"{path}: {len(wrong)} LoRA weights have other shapes than the model's: {'; '.join(shapes[:_SHOWN])}. Load it onto "
            "the model it was trained on, or pass config= with its rank"
        )
    with torch.no_grad():
        for name, tensor in own.items():  # a state's tensors are the model's own
            tensor.copy_(given[name])
    return adapted.eval()


def read_state(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read a file of tensors by name; nothing in it is executed.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read so, or holds something else.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {os.fspath(path)!r}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is not a plain file of tensors, and what else it holds is not executed: {str(error)[:200]}. Ask for a "
            "state_dict, or better a safetensors file"
        ) from error
    if isinstance(state, Mapping) and len(state) == 1 and isinstance(inner := next(iter(state.values())), Mapping):
        state = inner  # {"state_dict": {...}} and the like
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    ):
        raise ValueError(f"{path} holds something else than tensors by name: save model.state_dict() alone")
    return dict(state)


def _check_base(model: PreTrainedModel, state: Mapping[str, torch.Tensor], path: Any) -> None:
    """The file's base weights are the model's; of embeddings, the rows that both have."""
    base = {name: tensor for name, tensor in state.items() if ".lora_" not in name}
    if not base:
        return
    own, given = _by_plain_name(model.state_dict(), "the model"), _by_plain_name(base, path)
    if unknown := given.keys() - own.keys():
        raise ValueError(f"{path} has {len(unknown)} weights that the model does not have: {_listed(unknown)}. {_REMEDY}")
    for name, theirs in given.items():
        ours = own[name]
        if theirs.shape != ours.shape:
            if not name.endswith(_EMBEDDINGS) or theirs.shape[1:] != ours.shape[1:] or len(theirs) > len(ours):
                raise ValueError(f"{path}: {name} is {tuple(theirs.shape)}, in the model {tuple(ours.shape)}. {_REMEDY}")
            logger.info(
                "%s: %s has %d rows, and the model %d: it was cut to the tokenizer's length. The model keeps its own, whose "
                "last rows belong to no token.",
                path,
                name,
                len(theirs),
                len(ours),
            )
            ours = ours[: len(theirs)]
        # Compared as bfloat16 stores them: either side may have been saved so.
        if not torch.allclose(theirs.to(ours.device).float(), ours.float(), rtol=2**-7, atol=1e-6):
            raise ValueError(f"{path}: {name} differs from the model's, so the file was trained on another model. {_REMEDY}")


_REMEDY = "Load it onto the model it was trained on; check_base=False takes the LoRA weights alone, whatever they stood on"


def _by_plain_name(state: Mapping[str, torch.Tensor], where: Any) -> dict[str, torch.Tensor]:
    """Tensors by names without grouping levels.

    Raises:
        ValueError: if two names become one.
    """
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        short = ".".join(part for part in name.split(".") if part not in _GROUPS)
        if short in plain:
            raise ValueError(
                f"{where}: two weights are called {short!r} once grouping levels are left out, one of them {name!r}"
            )
        plain[short] = tensor
    return plain


def _listed(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
