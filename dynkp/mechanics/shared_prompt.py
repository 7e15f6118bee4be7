"""One prompt, several targets: the prompt and its pictures are computed once and continued per target.

Given   a causal (vision-)language model and a batch of left-padded prompts.
Gives   `log_probs(targets, rows)`: log-probabilities of each target token under the prompts of `rows`, in one graph,
        so that one backward reaches the prompt through every continuation.
Holds   values and gradients equal those of [`PlainPrompt`], the twin that runs prompt and target in one ordinary
        forward per call: to rounding, for unequal lengths, with and without gradient checkpointing. The prompt's
        keys and values are written once and only read afterwards, so the replay of a checkpointed layer finds what
        its first run found.

The prompt pass leaves out the prompt's last token; every continuation starts with it, because it predicts the
target's first token. Positions are explicit everywhere: a left-padded prompt shifts slots, never positions.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from dynkp.batches.targets import CONTINUED_INPUTS, SEQUENCE_INPUTS, Targets, select, targets_of

REENTRANT = "reentrant gradient checkpointing drops the graph of a layer's keys and values (set use_reentrant=False)"

# Options of models (Gemma 2, Cohere, Granite, Falcon-H1, ...) that change the logits behind the LM head.
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")

Scorer = Callable[[nn.Module, dict[str, Any], torch.Tensor, torch.Tensor], torch.Tensor]


def score_targets(
    model: nn.Module, inputs: dict[str, Any], target_ids: torch.Tensor, target_mask: torch.Tensor
) -> torch.Tensor:
    """Log-probabilities of `target_ids`, predicted by the last T positions of `inputs`.

    Only positions with a target are projected through the LM head, unless the model transforms its logits afterwards.

    Args:
        model: causal language model, or a PEFT model around one.
        inputs: model inputs with at least T columns.
        target_ids (`torch.Tensor` of shape `(B, T)`): next token of each of the last T positions.
        target_mask (`torch.Tensor` of shape `(B, T)`): bool, False where there is no target.

    Returns:
        `torch.Tensor` of shape `(B, T)`: nats, zero where the mask is False; float32, or float64 for a float64 model.
    """
    logits = target_logits(model, inputs, target_mask)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    picked = torch.nn.functional.cross_entropy(logits, target_ids[target_mask], reduction="none").neg()
    return picked.new_zeros(target_mask.shape).masked_scatter(target_mask, picked)


def target_logits(model: nn.Module, inputs: dict[str, Any], target_mask: torch.Tensor) -> torch.Tensor:
    """Logits at those of the last T positions of `inputs` where `target_mask` (B, T) is True: (N, V), in reading order."""
    causal_lm = causal_lm_of(model)
    length = target_mask.shape[1]
    if any(getattr(_text_config(model), name, None) is not None for name in LOGIT_TRANSFORMS):
        return causal_lm(**inputs, logits_to_keep=length).logits[target_mask]
    hidden = causal_lm.base_model(**inputs).last_hidden_state[:, -length:]
    return causal_lm.get_output_embeddings()(hidden[target_mask])


class SharedPrefix:
    """The beginning of a batch of inputs, run once and kept in the graph, ready to be continued again and again.

    Args:
        model: causal language model (or a PEFT model around one) that [`unsupported_reason`] has no objection to.
        inputs (`dict`): model inputs, left-padded: `input_ids` (B, P), `attention_mask` (B, P), pixels, grids, token types.
        positions (`torch.Tensor` of shape `(B, P)` or `(3, B, P)`): explicit position ids.
        score ([`Scorer`], *optional*): how the last positions' hidden states become log-probabilities.

    Raises:
        RuntimeError: if the model did not put the prefix's keys and values into the cache it was handed.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Any], positions: torch.Tensor, score: Scorer = score_targets):
        self.model, self.score = model, score
        self.attention_mask = inputs["attention_mask"]
        self._layers: list[_PromptLayer] = []
        if inputs["input_ids"].shape[1] == 0:
            return
        cache = Cache(layer_class_to_replicate=_PromptLayer)
        with cache_survives_checkpointing(model):
            causal_lm_of(model).base_model(**inputs, position_ids=positions, past_key_values=cache, use_cache=False)
        config = _text_config(model)
        # Mllama's cross-attention layers stay empty when no post of the batch has a picture.
        expected = set(range(config.num_hidden_layers)) - set(getattr(config, "cross_attention_layers", None) or ())
        written = {index for index, layer in enumerate(cache.layers) if layer.is_initialized}
        if missing := expected - written:
            raise RuntimeError(
                f"{type(model).__name__} did not write layers {sorted(missing)} into the cache it was handed, so the "
                "prompt cannot be shared between targets. Use `prompt_backend='plain'`."
            )
        self._layers = cache.layers

    def close(self) -> None:
        """Let go of the keys and values, once all continuations ran backward.

        A checkpointed layer keeps the cache it was called with, and the cache the layer's graph: with a graph that is retained,
        a circle that nobody collects.
        """
        for layer in self._layers:
            layer.keys = layer.values = layer.keys.new_empty(0) if layer.is_initialized else layer.keys
        self._layers = []

    def log_probs(
        self, rest: dict[str, torch.Tensor], positions: torch.Tensor, targets: Targets, rows: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Log-probabilities of targets behind the prefix and the rest of the prompt, which each continuation brings along.

        Args:
            rest (`dict`): `input_ids` (R, W), `attention_mask` (R, W) and, for Mllama, `cross_attention_mask`, left-padded;
                no pictures. Its last column predicts the first target token.
            positions (`torch.Tensor` of shape `(R, W)` or `(3, R, W)`): of the rest.
            targets ([`Targets`]): R targets.
            rows (`Sequence[int]`, *optional*): which prefix each of the R continues; all B in order, if `None`.

        Returns:
            `torch.Tensor` of shape `(R, T)`: nats, zero at padding; T is the longest target.
        """
        length = max(targets["lengths"], default=0)
        ids, mask = targets["input_ids"][:, :length], targets["mask"][:, :length]
        if ids.numel() == 0:
            return torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        before = select(self.attention_mask, rows)
        inputs: dict[str, Any] = {
            "input_ids": torch.cat([rest["input_ids"], ids[:, :-1]], dim=1),
            "attention_mask": torch.cat([before, rest["attention_mask"], mask[:, :-1].to(before.dtype)], dim=1),
            "position_ids": torch.cat([positions, following_positions(positions, length)[..., 1:]], dim=-1),
            "use_cache": False,
        }
        if "cross_attention_mask" in rest:  # Mllama: a target sees the pictures its prompt's end sees
            last = rest["cross_attention_mask"][:, -1:].expand(-1, length - 1, -1, -1)
            inputs["cross_attention_mask"] = torch.cat([rest["cross_attention_mask"], last], dim=1)
        if self._layers:
            inputs["past_key_values"] = Cache(layers=[_ContinuationLayer(layer, rows) for layer in self._layers])
        with cache_survives_checkpointing(self.model):
            return self.score(self.model, inputs, ids, mask)


class SharedPrompt:
    """The prompts of a batch, computed once, ready to be continued with several targets.

    Args:
        model: causal language model (or a PEFT model around one) that [`unsupported_reason`] has no objection to.
        prompt (`dict`): what the processor gives for the prompts, left-padded: `input_ids` (B, P), `attention_mask`
            (B, P), pixels, grids, token types.
        score ([`Scorer`], *optional*): how the last positions' hidden states become log-probabilities.

    Raises:
        RuntimeError: if the model did not put the prompt's keys and values into the cache it was handed.
    """

    def __init__(self, model: nn.Module, prompt: dict[str, Any], score: Scorer = score_targets):
        positions = prompt_positions(model, prompt)
        beginning = {key: value[:, :-1] if key in SEQUENCE_INPUTS else value for key, value in prompt.items()}
        self.prefix = SharedPrefix(model, beginning, positions[..., :-1], score)
        self.last = {key: value[:, -1:] for key, value in prompt.items() if key in CONTINUED_INPUTS}
        self.last_position = positions[..., -1:]

    def log_probs(self, targets: Targets, rows: Sequence[int] | None = None) -> torch.Tensor:
        """Log-probabilities of the targets' tokens.

        Args:
            targets ([`Targets`]): B targets.
            rows (`Sequence[int]`, *optional*): the posts to continue; the others cost nothing. All, if `None`.

        Returns:
            `torch.Tensor` of shape `(len(rows), T)`: nats, zero at padding; T is the longest target among `rows`.
        """
        last = {key: select(value, rows) for key, value in self.last.items()}
        return self.prefix.log_probs(last, select(self.last_position, rows, dim=-2), targets_of(targets, rows), rows)


class PlainPrompt:
    """The plain twin of [`SharedPrompt`]: prompt and target in one ordinary forward per call.

    It is the oracle of the tests and serves models and settings that cannot share a prompt. Every call computes all
    posts of the batch, pictures included; posts outside `rows` are computed and their results dropped.

    Args:
        model, prompt, score: as for [`SharedPrompt`].
        positions (`torch.Tensor` of shape `(B, P)` or `(3, B, P)`, *optional*): the prompt's position ids where they do
            not follow from its attention mask, as when tokens are masked or left out.
    """

    def __init__(
        self,
        model: nn.Module,
        prompt: dict[str, Any],
        score: Scorer = score_targets,
        positions: torch.Tensor | None = None,
    ):
        self.model, self.prompt, self.score = model, prompt, score
        self.positions = prompt_positions(model, prompt) if positions is None else positions

    def log_probs(self, targets: Targets, rows: Sequence[int] | None = None) -> torch.Tensor:
        """As [`SharedPrompt.log_probs`]."""
        length = max(targets_of(targets, rows)["lengths"], default=0)
        ids, mask = targets["input_ids"][:, :length], targets["mask"][:, :length]
        if ids.numel() == 0:
            return torch.zeros(select(ids, rows).shape, dtype=torch.float32, device=ids.device)

        inputs = dict(self.prompt)
        # The last target token predicts nothing, so it is left out.
        for key, continuation in (("input_ids", ids), ("attention_mask", mask)):
            inputs[key] = torch.cat([inputs[key], continuation[:, :-1].to(inputs[key].dtype)], dim=1)
        for key in ("token_type_ids", "mm_token_type_ids"):
            if key in inputs:
                inputs[key] = torch.cat([inputs[key], torch.zeros_like(ids[:, :-1])], dim=1)
        if "cross_attention_mask" in inputs:
            last = inputs["cross_attention_mask"][:, -1:].expand(-1, length - 1, -1, -1)
            inputs["cross_attention_mask"] = torch.cat([inputs["cross_attention_mask"], last], dim=1)
        following = following_positions(self.positions, length)[..., 1:]
        inputs["position_ids"] = torch.cat([self.positions, following], dim=-1)
        return select(self.score(self.model, {**inputs, "use_cache": False}, ids, mask), rows)


def unsupported_reason(model: nn.Module) -> str | None:
    """Why this model, as it is configured, cannot share a prompt; `None` if it can.

    Example: `unsupported_reason(llava)` is `None`; after
    `llava.gradient_checkpointing_enable({"use_reentrant": True})` it names reentrant checkpointing.
    """
    for layer in checkpointed_layers(model):
        function = getattr(layer, "_gradient_checkpointing_func", None)
        if isinstance(function, functools.partial) and function.keywords.get("use_reentrant", False):
            return REENTRANT
    text_config = _text_config(model)
    kinds = set(getattr(text_config, "layer_types", None) or ["full_attention"])
    if unknown := kinds - {"full_attention", "sliding_attention", "cross_attention"}:
        return f"its layers of type {', '.join(sorted(unknown))} keep a state other than keys and values"
    if getattr(causal_lm_of(model), "_is_stateful", False):
        return "it keeps a state other than keys and values"
    return None


def prompt_positions(model: nn.Module, prompt: dict[str, Any]) -> torch.Tensor:
    """Position ids of left-padded prompts: `(B, P)`, or `(3, B, P)` for models with 3-D rotary positions (Qwen-VL)."""
    attention_mask = prompt["attention_mask"]
    backbone = causal_lm_of(model).base_model
    get_rope_index = getattr(backbone, "get_rope_index", None)
    if get_rope_index is not None and prompt.get("image_grid_thw") is not None:
        return get_rope_index(
            prompt["input_ids"],
            image_grid_thw=prompt["image_grid_thw"],
            attention_mask=attention_mask,
            mm_token_type_ids=prompt.get("mm_token_type_ids"),
        )[0]
    positions = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
    return positions if get_rope_index is None else positions.expand(3, -1, -1)


def following_positions(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Positions of the prompt's last token and the `length - 1` text tokens behind it."""
    return positions[..., -1:] + torch.arange(length, device=positions.device)


class _PromptLayer(DynamicLayer):
    """Keeps the first keys and values it is given, in the graph; a checkpoint's replay writes nothing."""

    is_initialized: bool

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states

    def get_seq_length(self) -> int:
        # While the prompt pass runs (and is replayed) there is no past: masks are those of an ordinary forward.
        return 0


class _ContinuationLayer(DynamicLayer):
    """The prompt's keys and values for some rows; `update` appends to what it returns, never to what it keeps."""

    def __init__(self, prompt: _PromptLayer, rows: Sequence[int] | None):
        super().__init__()
        self.is_initialized = prompt.is_initialized
        if prompt.is_initialized:
            self.keys, self.values = select(prompt.keys, rows), select(prompt.values, rows)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


@contextlib.contextmanager
def cache_survives_checkpointing(model: nn.Module) -> Iterator[None]:
    """Let checkpointed layers keep the cache they are handed, which transformers otherwise takes from them.

    transformers reserves `_can_checkpoint_with_cache` for layers that only read a cache; ours may be written to once
    and is only read in the replay, which is as safe.
    """
    layers = list(checkpointed_layers(model))
    for layer in layers:
        layer._can_checkpoint_with_cache = True
    try:
        yield
    finally:
        for layer in layers:
            del layer._can_checkpoint_with_cache


def checkpointed_layers(model: nn.Module) -> Iterator[GradientCheckpointingLayer]:
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            yield module


def causal_lm_of(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _text_config(model: nn.Module) -> Any:
    return causal_lm_of(model).config.get_text_config()
