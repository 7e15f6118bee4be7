"""Released adapters: a PEFT model's state in one `.pt` file, such as MulCoT-RD's, loaded safely onto its base model.

Such a file is written by `torch.save(peft_model.state_dict(), ...)`, with or without the weights of the base model.

Guarantees:

- Nothing in the file is executed (`weights_only=True`).
- Every LoRA weight of the file and of the model is matched by name and shape, or the error lists those that are not.
- Base weights in the file, if there are any, must be those of the base model.

Two differences between such a file and the current libraries are resolved. Names: transformers 4.52 moved the layers of
vision-language models one level deeper (`model.layers` became `model.language_model.layers`), so levels that only group are
ignored in the comparison. Embedding rows: MulCoT-RD's code cuts the embeddings to the tokenizer's length before training
(Qwen2.5-VL: 151,936 rows to 151,665). The removed rows belong to no token and LoRA does not train them, so the model keeps
its own.
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
# Levels of a name that only group, and the adapter's name.
_GROUPS = frozenset({"base_model", "model", "language_model", "vision_model", "base_layer", "default"})
_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")
# Number of names in an error message.
_SHOWN = 5


def load_released_adapter(
    model: PreTrainedModel, path: str | os.PathLike[str], *, config: LoraConfig | None = None, check_base: bool = True
) -> PeftModel:
    """Load a released adapter onto its base model.

    Args:
        model: the base model; it is changed in place, as by `get_peft_model`.
        path: the `.pt` file.
        config: the LoRA configuration. By default rank and modules are taken from the file, and alpha, which the file does
            not contain, is twice the rank, MulCoT-RD's ratio.
        check_base: whether base weights in the file, if there are any, must be the model's (to the precision of bfloat16).

    Returns:
        The PEFT model, in evaluation mode; its `save_pretrained` writes a folder that PEFT and vLLM read.

    Raises:
        ValueError: if the file contains anything but tensors, or no LoRA weights; naming the weights, if names or shapes do
            not match the model's, or the file's base weights are those of another model.
        FileNotFoundError: if there is no such file.

    Example:
        ```python
        base = AutoModelForImageTextToText.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct")
        model = load_released_adapter(base, "MulCoT-RD-3B.pt")
        model.save_pretrained("mulcot-rd-3b")
        ```
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
    for names, what in ((own.keys() - given.keys(), "lacks"), (given.keys() - own.keys(), "has, but the model does not have,")):
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
    """Read a file of named tensors without executing anything in it.

    Args:
        path: the file.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file has anything but named tensors.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {os.fspath(path)!r}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is not a plain file of tensors, and other contents are not executed: {str(error)[:200]}. Ask its authors "
            "for a state_dict, or better for a safetensors file"
        ) from error
    if isinstance(state, Mapping) and len(state) == 1 and isinstance(inner := next(iter(state.values())), Mapping):
        state = inner  # {"state_dict": {...}} and the like
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    ):
        raise ValueError(f"{path} has contents that are not named tensors: save model.state_dict() only")
    return dict(state)


def _check_base(model: PreTrainedModel, state: Mapping[str, torch.Tensor], path: Any) -> None:
    """Check that the file's base weights are the model's; of embeddings, the rows that both have."""
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
                "%s: %s has %d rows, and the model %d: it was cut to the tokenizer's length. The model keeps its own rows; the "
                "last of them belong to no token.",
                path,
                name,
                len(theirs),
                len(ours),
            )
            ours = ours[: len(theirs)]
        # Compared as bfloat16 stores them: either side may have been saved so.
        if not torch.allclose(theirs.to(ours.device).float(), ours.float(), rtol=2**-7, atol=1e-6):
            raise ValueError(f"{path}: {name} differs from the model's, so the file was trained on another model. {_REMEDY}")


_REMEDY = "Load it onto the model it was trained on; check_base=False uses the LoRA weights without checking the base weights"


def _by_plain_name(state: Mapping[str, torch.Tensor], where: Any) -> dict[str, torch.Tensor]:
    """Return tensors by their names without grouping levels.

    Raises:
        ValueError: if two names become equal.
    """
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        short = ".".join(part for part in name.split(".") if part not in _GROUPS)
        if short in plain:
            raise ValueError(f"{where}: two weights have the name {short!r} without grouping levels, one of them {name!r}")
        plain[short] = tensor
    return plain


def _listed(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
