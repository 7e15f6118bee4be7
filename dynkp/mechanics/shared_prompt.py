"""One prompt, several targets: prompts and images are computed once and continued with each target.

Given a causal (vision-)language model and a batch of left-padded prompts, a [`Prompt`] computes the losses of several targets
of each post, in one graph, so that one backward pass reaches the prompt through every continuation.

Guarantees:

- [`SharedPrompt`] equals [`PlainPrompt`], the reference that runs prompt and target in one ordinary forward pass per call, in
  values and gradients: to rounding, for unequal lengths, with and without gradient checkpointing.
- The prompt's keys and values are written once and only read afterwards, so the replay of a checkpointed layer reads what its
  first run read.

The pass over the prompts leaves out their last token; every continuation starts with it, because it predicts the target's
first token. Position ids are explicit everywhere: left padding shifts columns, never positions.
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
from dynkp.objectives.token_loss import TargetLoss, target_loss

REENTRANT = "reentrant gradient checkpointing drops the graph of a layer's keys and values (set use_reentrant=False)"

# Options of models (Gemma 2, Cohere, Granite, Falcon-H1, ...) that change the logits behind the LM head.
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")

Scorer = Callable[[nn.Module, dict[str, Any], torch.Tensor, torch.Tensor], torch.Tensor]
"""Computes log-probabilities of target tokens from model inputs; see [`score_targets`] for the arguments."""


def score_targets(
    model: nn.Module, inputs: dict[str, Any], target_ids: torch.Tensor, target_mask: torch.Tensor
) -> torch.Tensor:
    """Compute the log-probabilities of the tokens that the last T positions of `inputs` predict.

    Only positions with a target go through the LM head, unless the model transforms its logits afterwards.

    Args:
        model (`torch.nn.Module`): causal language model, or a PEFT model around one.
        inputs (`dict`): model inputs with at least T columns.
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
    """Compute the logits at those of the last T positions that predict a target token.

    Args:
        model (`torch.nn.Module`): causal language model, or a PEFT model around one.
        inputs (`dict`): model inputs with at least T columns.
        target_mask (`torch.Tensor` of shape `(B, T)`): bool, N entries of which are True.

    Returns:
        `torch.Tensor` of shape `(N, V)`: in reading order.
    """
    causal_lm = causal_lm_of(model)
    length = target_mask.shape[1]
    if any(getattr(_text_config(model), name, None) is not None for name in LOGIT_TRANSFORMS):
        return causal_lm(**inputs, logits_to_keep=length).logits[target_mask]
    hidden = causal_lm.base_model(**inputs).last_hidden_state[:, -length:]
    return causal_lm.get_output_embeddings()(hidden[target_mask])


class SharedPrefix:
    """The first tokens of a batch of inputs, computed once and kept in the graph for any number of continuations.

    Args:
        model (`torch.nn.Module`): causal language model (or a PEFT model around one) for which
            [`why_prompts_cannot_be_shared`] returns `None`.
        inputs (`dict`): model inputs, left-padded: `input_ids` (B, P), `attention_mask` (B, P), pixels, grids, token types.
        positions (`torch.Tensor` of shape `(B, P)` or `(3, B, P)`): explicit position ids.
        score ([`Scorer`], *optional*): computes log-probabilities from the inputs of a continuation.

    Raises:
        RuntimeError: if the model did not write the prefix's keys and values into the given cache.
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
        # Mllama's cross-attention layers stay empty when no post of the batch has an image.
        expected = set(range(config.num_hidden_layers)) - set(getattr(config, "cross_attention_layers", None) or ())
        written = {index for index, layer in enumerate(cache.layers) if layer.is_initialized}
        if missing := expected - written:
            raise RuntimeError(
                f"{type(model).__name__} did not write layers {sorted(missing)} into the cache it was given, so the prompt "
                "cannot be shared between targets. Use `prompt_backend='plain'`."
            )
        self._layers = cache.layers

    def close(self) -> None:
        """Release the keys and values, once all continuations have run backward.

        A checkpointed layer keeps the cache it was called with, and the cache keeps the layer's graph. With a retained graph
        that is a reference cycle which Python's garbage collector does not find.
        """
        for layer in self._layers:
            layer.keys = layer.values = layer.keys.new_empty(0) if layer.is_initialized else layer.keys
        self._layers = []

    def log_probs(
        self, rest: dict[str, torch.Tensor], positions: torch.Tensor, targets: Targets, indices: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Compute the log-probabilities of targets behind the prefix and the rest of the prompt.

        Args:
            rest (`dict`): the rest of each prompt: `input_ids` (R, W), `attention_mask` (R, W) and, for Mllama,
                `cross_attention_mask`, left-padded; no images. Its last column predicts the first target token.
            positions (`torch.Tensor` of shape `(R, W)` or `(3, R, W)`): position ids of the rest.
            targets ([`~dynkp.batches.targets.Targets`]): R targets.
            indices (`Sequence[int]`, *optional*): which of the B prefixes each of the R rests continues; all of them in
                order, if `None`.

        Returns:
            `torch.Tensor` of shape `(R, T)`: nats, zero at padding; T is the length of the longest target.
        """
        length = max(targets["lengths"], default=0)
        ids, mask = targets["input_ids"][:, :length], targets["mask"][:, :length]
        if ids.numel() == 0:
            return torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        before = select(self.attention_mask, indices)
        inputs: dict[str, Any] = {
            "input_ids": torch.cat([rest["input_ids"], ids[:, :-1]], dim=1),
            "attention_mask": torch.cat([before, rest["attention_mask"], mask[:, :-1].to(before.dtype)], dim=1),
            "position_ids": torch.cat([positions, following_positions(positions, length)[..., 1:]], dim=-1),
            "use_cache": False,
        }
        if "cross_attention_mask" in rest:  # Mllama: a target attends to the images that the end of its prompt attends to
            last = rest["cross_attention_mask"][:, -1:].expand(-1, length - 1, -1, -1)
            inputs["cross_attention_mask"] = torch.cat([rest["cross_attention_mask"], last], dim=1)
        if self._layers:
            inputs["past_key_values"] = Cache(layers=[_ContinuationLayer(layer, indices) for layer in self._layers])
        with cache_survives_checkpointing(self.model):
            return self.score(self.model, inputs, ids, mask)


class Prompt:
    """The prompts of a batch, ready for the computation of targets: the interface of its two implementations.

    [`SharedPrompt`] computes the prompts once for all targets, [`PlainPrompt`] once per call.
    """

    def log_probs(self, targets: Targets, indices: Sequence[int] | None = None) -> torch.Tensor:
        """Compute the log-probabilities of the targets' tokens.

        Args:
            targets ([`~dynkp.batches.targets.Targets`]): B targets.
            indices (`Sequence[int]`, *optional*): posts whose targets are computed; all, if `None`.

        Returns:
            `torch.Tensor` of shape `(len(indices), T)`: nats, zero at padding; T is the length of the longest target among
            `indices`.
        """
        raise NotImplementedError

    def loss(self, targets: Targets, mask: torch.Tensor | None = None) -> TargetLoss:
        """Compute NLL(y | x), the loss of each post's target y given its prompt x.

        Args:
            targets ([`~dynkp.batches.targets.Targets`]): B targets.
            mask (`torch.Tensor` of shape `(B,)`, *optional*): bool, the posts whose targets are computed; all, if `None`.
                With [`SharedPrompt`] the other posts cost nothing.

        Returns:
            [`~dynkp.objectives.token_loss.TargetLoss`]: parts of shape (B,); exactly zero, and without gradient, where `mask`
            is False or the post has no such target.
        """
        if mask is None or mask.all():
            return loss_of_log_probs(self.log_probs(targets), targets)
        indices = mask.nonzero().flatten().tolist()
        loss = loss_of_log_probs(self.log_probs(targets, indices), targets, indices)
        return TargetLoss(*(part.new_zeros(mask.shape).masked_scatter(mask, part) for part in loss))


class SharedPrompt(Prompt):
    """The prompts of a batch, computed once, to be continued with several targets.

    Args:
        model (`torch.nn.Module`): causal language model (or a PEFT model around one) for which
            [`why_prompts_cannot_be_shared`] returns `None`.
        prompt (`dict`): the processor's output for B prompts, left-padded: `input_ids` (B, P), `attention_mask` (B, P),
            pixels, grids, token types.
        score ([`Scorer`], *optional*): computes log-probabilities from model inputs.

    Raises:
        RuntimeError: if the model did not write the prompt's keys and values into the given cache.

    Example:
    ```python
    prompt = SharedPrompt(model, batch["prompt"])
    direct = prompt.loss(batch["direct"])
    easy = direct.mean < 0.4
    reasoning = prompt.loss(batch["reasoning"], easy)  # of the easy posts only
    ```
    """

    def __init__(self, model: nn.Module, prompt: dict[str, Any], score: Scorer = score_targets):
        positions = prompt_positions(model, prompt)
        beginning = {key: value[:, :-1] if key in SEQUENCE_INPUTS else value for key, value in prompt.items()}
        self.prefix = SharedPrefix(model, beginning, positions[..., :-1], score)
        self.last = {key: value[:, -1:] for key, value in prompt.items() if key in CONTINUED_INPUTS}
        self.last_position = positions[..., -1:]

    def log_probs(self, targets: Targets, indices: Sequence[int] | None = None) -> torch.Tensor:
        """Compute the log-probabilities of the targets' tokens; see [`Prompt.log_probs`]."""
        last = {key: select(value, indices) for key, value in self.last.items()}
        position = select(self.last_position, indices, dim=-2)
        return self.prefix.log_probs(last, position, targets_of(targets, indices), indices)


class PlainPrompt(Prompt):
    """The reference of [`SharedPrompt`]: prompt and target in one ordinary forward pass per call.

    The tests compare with it, and it serves models and settings that cannot share a prompt, and prompts with a single target.
    Every call computes all posts of the batch, images included; the results of posts that are not asked for are dropped.

    Args:
        model (`torch.nn.Module`): causal language model, or a PEFT model around one.
        prompt (`dict`): as for [`SharedPrompt`].
        score ([`Scorer`], *optional*): as for [`SharedPrompt`].
        positions (`torch.Tensor` of shape `(B, P)` or `(3, B, P)`, *optional*): the prompt's position ids, where they do not
            follow from its attention mask, as when tokens are masked or left out.
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

    def log_probs(self, targets: Targets, indices: Sequence[int] | None = None) -> torch.Tensor:
        """Compute the log-probabilities of the targets' tokens; see [`Prompt.log_probs`]."""
        length = max(targets_of(targets, indices)["lengths"], default=0)
        ids, mask = targets["input_ids"][:, :length], targets["mask"][:, :length]
        if ids.numel() == 0:
            return torch.zeros(select(ids, indices).shape, dtype=torch.float32, device=ids.device)

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
        return select(self.score(self.model, {**inputs, "use_cache": False}, ids, mask), indices)


def why_prompts_cannot_be_shared(model: nn.Module) -> str | None:
    """Return the reason why a model, as it is configured, cannot share a prompt between targets.

    Args:
        model (`torch.nn.Module`): causal language model, or a PEFT model around one.

    Returns:
        `str` or `None`: a clause such as "its layers of type linear_attention keep a state other than keys and values";
        `None` if the model can share a prompt.
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
    """Compute the position ids of left-padded prompts.

    Args:
        model (`torch.nn.Module`): causal language model, or a PEFT model around one.
        prompt (`dict`): the processor's output for B prompts of P columns.

    Returns:
        `torch.Tensor` of shape `(B, P)`; `(3, B, P)` for models with 3-D rotary positions (Qwen-VL).
    """
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
    """Compute the position ids of a prompt's last token and of the `length - 1` text tokens behind it.

    Args:
        positions (`torch.Tensor` of shape `(..., P)`): position ids of the prompt.
        length (`int`): number of positions wanted.

    Returns:
        `torch.Tensor` of shape `(..., length)`.

    Example:
        >>> following_positions(torch.tensor([[0, 1, 2]]), 3)
        tensor([[2, 3, 4]])
    """
    return positions[..., -1:] + torch.arange(length, device=positions.device)


def loss_of_log_probs(log_probs: torch.Tensor, targets: Targets, indices: Sequence[int] | None = None) -> TargetLoss:
    """Sum the token losses of some posts' targets, given their log-probabilities.

    Args:
        log_probs (`torch.Tensor` of shape `(len(indices), T)`): as [`Prompt.log_probs`] returns them, as wide as the longest
            target among `indices`.
        targets ([`~dynkp.batches.targets.Targets`]): B targets, as wide as the longest of them.
        indices (`Sequence[int]`, *optional*): the posts; all, if `None`.

    Returns:
        [`~dynkp.objectives.token_loss.TargetLoss`]: parts of shape (len(indices),).
    """
    return target_loss(log_probs, select(targets["weights"], indices)[:, : log_probs.shape[1]])


class _PromptLayer(DynamicLayer):
    """Stores the first keys and values it is given, in the graph; the replay of a checkpointed layer stores nothing."""

    is_initialized: bool

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states

    def get_seq_length(self) -> int:
        # While the prompt is computed (and replayed) there is no past: masks are those of an ordinary forward pass.
        return 0


class _ContinuationLayer(DynamicLayer):
    """The prompt's keys and values for some posts; `update` appends to what it returns, never to what it stores."""

    def __init__(self, prompt: _PromptLayer, indices: Sequence[int] | None):
        super().__init__()
        self.is_initialized = prompt.is_initialized
        if prompt.is_initialized:
            self.keys, self.values = select(prompt.keys, indices), select(prompt.values, indices)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


@contextlib.contextmanager
def cache_survives_checkpointing(model: nn.Module) -> Iterator[None]:
    """Within the block, checkpointed layers keep the cache they are called with.

    transformers drops the cache unless a layer has `_can_checkpoint_with_cache`, which it reserves for layers that only read
    a cache. Our caches are written once, in the first run, and only read in the replay, which is as safe.

    Args:
        model (`torch.nn.Module`): causal language model, or a PEFT model around one.
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
    """Iterate over the layers of a model that use gradient checkpointing.

    Args:
        model (`torch.nn.Module`): any model.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            yield module


def causal_lm_of(model: Any) -> Any:
    """Return the transformers model inside a PEFT model, or the model itself.

    Args:
        model (`torch.nn.Module`): causal language model, or a PEFT model around one.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _text_config(model: nn.Module) -> Any:
    return causal_lm_of(model).config.get_text_config()
