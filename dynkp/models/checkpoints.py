"""Loading of saved models: a model, or an adapter on its base model, with the processor that it was trained with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from dynkp.data.choices import did_you_mean
from dynkp.data.paths import check_path
from dynkp.models.released_adapters import SUFFIXES, load_released_adapter

# Every saved model has the first, every saved adapter the second.
_CONFIGURATIONS = ("config.json", "adapter_config.json")


class Checkpoint(NamedTuple):
    """The names of a model and its adapter.

    Attributes:
        model: folder or Hub id of the model; the adapter's base model if there is an adapter.
        adapter: folder or Hub id of a PEFT adapter, a released `.pt` file, or None.
    """

    model: str
    adapter: str | None = None


def find_checkpoint(model: str, adapter: str | None = None) -> Checkpoint:
    """Find the model and the adapter that a name refers to: training with PEFT saves a folder with only the adapter.

    Args:
        model: folder or Hub id of a model; or a folder with only an adapter, which refers to the adapter and to the base
            model that it names.
        adapter: folder or Hub id of an adapter on `model`, or a `.pt` file (see `dynkp.models.released_adapters`).

    Returns:
        The names of the model and of its adapter.

    Raises:
        FileNotFoundError: if a path does not exist, or a folder has neither a model nor an adapter.
        ValueError: if both arguments name an adapter, or an adapter names no base model.

    Example:
        >>> import json, pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:  # as LoRA training saves it
        ...     config = {"base_model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct"}
        ...     _ = pathlib.Path(folder, "adapter_config.json").write_text(json.dumps(config))
        ...     checkpoint = find_checkpoint(folder)
        >>> checkpoint.model, checkpoint.adapter == folder
        ('Qwen/Qwen2.5-VL-3B-Instruct', True)
    """
    is_file = adapter is not None and adapter.endswith(SUFFIXES)
    if is_file and not os.path.isfile(str(adapter)):
        raise FileNotFoundError(f"adapter={adapter!r}: there is no such file")
    for name, value in (("model", model), ("adapter", None if is_file else adapter)):
        if value is not None:
            check_path(value, name, "folder")
    if not os.path.isdir(model) or os.path.isfile(os.path.join(model, "config.json")):
        return Checkpoint(model, adapter)
    file = Path(model, "adapter_config.json")
    if not file.is_file():
        raise FileNotFoundError(f"model={model!r} has neither a config.json nor an adapter_config.json; name a saved model")
    if adapter is not None:
        raise ValueError(f"model={model!r} is an adapter, and adapter={adapter!r} is another; name the base model as the model")
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"model={model!r} is an adapter that names no base model; give that as model, and this as adapter")
    return Checkpoint(base, model)


def check_available(name: str, option: str = "model", revision: str | None = None) -> None:
    """Refuse a model that is neither in a folder nor on the Hub, in one sentence and before anything is loaded.

    Args:
        name: folder or Hub id of a model or of an adapter.
        option: how the error calls it.
        revision: on the Hub.

    Raises:
        FileNotFoundError: if the folder does not exist or holds no model, or the Hub does not have the model or cannot be
            asked for one that was not downloaded before.
    """
    check_path(name, option, "folder")
    if os.path.isdir(name):
        if not any(os.path.isfile(os.path.join(name, file)) for file in _CONFIGURATIONS):
            raise FileNotFoundError(f"{option}={name!r} has neither a {' nor an '.join(_CONFIGURATIONS)}; name a saved model")
        return
    try:
        if any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in _CONFIGURATIONS):
            return
        HfApi().model_info(name, revision=revision, timeout=10)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        reason = "the Hub has no such model; check the spelling, or log in with `hf auth login` if it is private"
    except HFValidationError:
        reason = "this is not a Hub id; check the spelling"
    except Exception:  # offline mode, no network, or no answer: an error of whatever the HTTP client's own class is
        reason = "the Hub cannot be reached; name a folder, or download the model first"
    else:
        return
    hint = did_you_mean(name, (entry for entry in os.listdir() if os.path.isdir(entry)))
    raise FileNotFoundError(f"{option}={name!r}: there is no such folder, and {reason}.{hint}")


def load_processor_by_name(
    name: str, *, trust_remote_code: bool = False, **options: Any
) -> ProcessorMixin | PreTrainedTokenizerBase:
    """Load a processor with `AutoProcessor.from_pretrained`, with a clear error if torchvision is missing.

    Args:
        name: folder or Hub id.
        trust_remote_code: as in `from_pretrained`.
        **options: as in `from_pretrained`.

    Raises:
        ImportError: if the processor needs torchvision, which is not installed.
    """
    try:
        return AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except ImportError as error:
        if "torchvision" in str(error).lower():
            raise ImportError(
                f"The processor of {name!r} needs torchvision, which is not installed: pip install 'dynkp[vision]'."
            ) from error
        raise


def pad_images_to_squares(processor: Any) -> None:
    """Make LLaVA's processor pad images to squares, as in the training of LLaVA-1.5; the published one crops them.

    Args:
        processor: a `LlavaProcessor`; it is changed in place.

    Raises:
        ValueError: for a processor of another family.
    """
    if not isinstance(processor, LlavaProcessor):
        raise ValueError(
            f"`pad_images_to_squares` is True, but it is an option of LLaVA's processor, and this is a "
            f"{type(processor).__name__}. Set it to False."
        )
    published = processor.image_processor
    # Without torchvision, `LlavaImageProcessor` is the Pil class too, but warns about it, although there is no choice.
    name = "LlavaImageProcessorPil" if type(published).__name__.endswith("Pil") else "LlavaImageProcessor"
    padding = getattr(transformers, name)
    options = {key: value for key, value in published.to_dict().items() if key not in ("image_processor_type", "do_pad")}
    processor.image_processor = padding(**options, do_pad=True)


def load_processor(checkpoint: Checkpoint) -> ProcessorMixin | PreTrainedTokenizerBase:
    """Load the processor of a checkpoint, or the tokenizer of a text model.

    Args:
        checkpoint: what `find_checkpoint` returns.

    Returns:
        The processor that was saved with the adapter, if there is one, else the model's. Its tokenizer has a pad token.
    """
    own = checkpoint.adapter is not None and os.path.isfile(os.path.join(checkpoint.adapter, "tokenizer_config.json"))
    processor = load_processor_by_name(cast(str, checkpoint.adapter) if own else checkpoint.model)
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.pad_token is None:  # Llama's has none; padding is masked, so any token is suitable
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def load_model(
    checkpoint: Checkpoint, *, dtype: str = "auto", device: torch.device | str = "cpu", merge_adapter: bool = False
) -> PreTrainedModel:
    """Load a model that generates.

    Args:
        checkpoint: what `find_checkpoint` returns.
        dtype: "auto" for the checkpoint's own, or "float32", "bfloat16", "float16".
        device: where to put it.
        merge_adapter: whether to add the adapter to the weights, which makes generation faster and, in a type below
            float32, changes outputs by rounding.

    Returns:
        The model in evaluation mode; with an adapter that is not merged, a PEFT model.

    Raises:
        ValueError: if there is no adapter to merge, or a file of weights is damaged.
    """
    if merge_adapter and checkpoint.adapter is None:
        raise ValueError(
            f"merge_adapter=True, but there is no adapter for {checkpoint.model!r}; name one, or leave merge_adapter out"
        )
    try:
        model = _load_weights(checkpoint, dtype, merge_adapter)
    except SafetensorError as error:
        raise ValueError(
            f"{_damaged_file(checkpoint)} is no file of weights ({error}): it is damaged, or a pointer of Git LFS; copy or "
            "download it again."
        ) from error
    return model.to(device).eval()


def _load_weights(checkpoint: Checkpoint, dtype: str, merge_adapter: bool) -> Any:
    config = AutoConfig.from_pretrained(checkpoint.model)
    takes_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    family: Any = AutoModelForImageTextToText if takes_images else AutoModelForCausalLM
    model = family.from_pretrained(checkpoint.model, dtype=dtype)
    if checkpoint.adapter is not None:
        from peft import PeftModel

        if checkpoint.adapter.endswith(SUFFIXES):
            model = load_released_adapter(model, checkpoint.adapter)
        else:
            model = PeftModel.from_pretrained(model, checkpoint.adapter)
        if merge_adapter:
            model = model.merge_and_unload()
    return model


def _damaged_file(checkpoint: Checkpoint) -> str:
    """The first file of a local model or adapter that safetensors cannot open, or the model's name."""
    for folder in (checkpoint.model, checkpoint.adapter):
        for file in sorted(Path(folder).glob("*.safetensors")) if folder and os.path.isdir(folder) else ():
            try:
                with safe_open(file, framework="pt"):
                    pass
            except SafetensorError:
                return str(file)
    return f"a safetensors file of {checkpoint.adapter or checkpoint.model!r}"
