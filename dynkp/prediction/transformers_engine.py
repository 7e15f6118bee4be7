"""The transformers engine: batched generation, with prompts padded on the left.

Guarantees: a prediction does not depend on the batch size beyond floating-point rounding; the modules of the model are left
in the modes (training or evaluation) that they were in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from dynkp.prediction.engine import derived_seed
from dynkp.prediction.generation_tasks import ForbiddenTokens, GenerationTask


class TransformersEngine:
    """Generates with a transformers model: one model with its way of stopping and decoding.

    Args:
        model: a model that generates, on its device; PEFT models included.
        task: the prompts, and the reading of outputs.
        max_new_tokens: the greatest number of tokens of an output, at least 1.
        **options: options of `model.generate`; they take precedence over `max_new_tokens`.

    Attributes:
        model: the model.
        task: the task.
        stop_ids: ids that end an output.
        options: the options that `model.generate` gets.

    Raises:
        ValueError: if `max_new_tokens` is below 1 or `num_return_sequences` is not 1.
    """

    def __init__(self, model: PreTrainedModel, task: GenerationTask, *, max_new_tokens: int = 512, **options: Any):
        self.model = model
        self.task = task
        tokenizer = task.tokenizer
        self.stop_ids = task.stop_ids(model.generation_config.eos_token_id)
        self.options = {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            # The generation config of some checkpoints is not plain decoding (Qwen2.5-VL's penalises repetition).
            "num_beams": 1,
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "use_cache": True,  # trainers turn it off in the model's config while gradients are checkpointed
            "eos_token_id": sorted(self.stop_ids),
            "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **options,
        }
        if self.options["max_new_tokens"] < 1:
            raise ValueError(f"max_new_tokens={self.options['max_new_tokens']} must be at least 1")
        if options.get("num_return_sequences", 1) != 1:
            raise ValueError("generation_kwargs: num_return_sequences must be 1, since a post has one prediction")
        self._forbidden = task.forbidden_tokens()

    def __call__(self, rows: Sequence[Mapping[str, Any]], seed: int | None = None) -> list[Any]:
        """Predict a batch of posts.

        Args:
            rows: at least one post, as `prompt_columns` returns them.
            seed: of sampling. With a seed, the draws depend on it and on the ids of the batch alone, and PyTorch's global
                random generator keeps its state.

        Returns:
            One prediction per post, in the posts' order, as `GenerationTask.read` returns it.
        """
        prompts = self.task.collator.collate_prompts(rows, [self.task.renderer.images(row) for row in rows])
        inputs = {name: self._placed(value) for name, value in prompts.items()}
        prompt_tokens = prompts["attention_mask"].sum(dim=1).tolist()
        width = inputs["input_ids"].shape[1]
        options = dict(self.options)
        if self._forbidden is not None:
            own = options.pop("logits_processor", None) or []
            options["logits_processor"] = LogitsProcessorList([*own, _ForbidTokens(width, self._forbidden)])
        seed = None if seed is None else derived_seed(seed, *(row["id"] for row in rows))
        with _evaluating(self.model), _seeded(seed, self.model.device):
            outputs = self.model.generate(**inputs, **options)
        new_tokens = outputs[:, width:].tolist()
        return [
            self.task.prediction(row["id"], count, tokens, self.stop_ids)
            for row, count, tokens in zip(rows, prompt_tokens, new_tokens, strict=True)
        ]

    def _placed(self, value: Any) -> Any:
        """Move a tensor to the model's device."""
        if not isinstance(value, torch.Tensor):
            return value
        # Processors return images in float32, whatever the model computes in.
        return value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)


class _ForbidTokens(LogitsProcessor):
    """Sets the scores of forbidden tokens to minus infinity."""

    def __init__(self, prompt_width: int, forbidden: ForbiddenTokens):
        self.prompt_width = prompt_width
        self.at_start, self.anywhere, self.whitespace = (torch.tensor(sorted(ids), dtype=torch.long) for ids in forbidden)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        device = scores.device
        written = input_ids[:, self.prompt_width :]
        at_start = torch.isin(written, self.whitespace.to(device)).all(dim=1).nonzero()
        scores = scores.clone()
        scores[:, self.anywhere.to(device)] = -torch.inf
        scores[at_start, self.at_start.to(device)] = -torch.inf
        return scores


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's random generator within the block, and restore its state afterwards."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode within the block, then restore the mode of each module: a frozen tower may differ."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
