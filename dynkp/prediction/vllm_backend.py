"""Predictions by vLLM (extra `vllm`), with the prompts and the reading of outputs of the transformers backend.

Written against vLLM's published interface (`LLM`, `SamplingParams`, `LoRARequest`, prompts of token ids with
`multi_modal_data`), and tested against a stand-in with that interface, not against vLLM itself, which cannot be installed
where the tests run. Holds: prompts are the tokens that the transformers backend gives the model, before placeholders of
pictures are multiplied, which both leave to the model's processor.

Differs from the transformers backend in that vLLM has no rule for the beginning of an output alone: with mode "direct",
the tokens that `<think>` could begin with (often "<") are forbidden everywhere in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from dynkp.models.checkpoints import Checkpoint
from dynkp.prediction.generation import Dialogue, PostDialogue, derived_seed

# Ranks that vLLM has kernels for.
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# As far as vLLM lets a logit be lowered.
_FORBIDDEN = -100.0


class VllmGenerator:
    """A model in vLLM; called with the rows of a batch, as [`TransformersGenerator`] is.

    Args:
        checkpoint: the model and its adapter, which vLLM applies without merging.
        dialogue: the prompts, and the reading of outputs.
        max_new_tokens: longest output in tokens.
        num_images: the most pictures of a post.
        dtype: as for `load_model`.
        temperature: of sampling; 0 is greedy.
        top_p: the smallest share of probability to sample from.
        llm_options: more arguments for `vllm.LLM`, such as `tensor_parallel_size`.

    Raises:
        ImportError: if vLLM is not installed.
        ValueError: if vLLM cannot apply the adapter.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dialogue: Dialogue,
        *,
        max_new_tokens: int = 512,
        num_images: int = 1,
        dtype: str = "auto",
        temperature: float = 0.0,
        top_p: float = 1.0,
        llm_options: Mapping[str, Any] | None = None,
    ):
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise ImportError(
                "backend='vllm' needs vLLM, which is not installed: pip install 'dynkp[vllm]', on a machine with a GPU, or "
                "take the backend 'transformers'."
            ) from error
        self.dialogue = dialogue
        self.stop_ids = dialogue.stop_ids(_eos_token_id(checkpoint.model))
        options: dict[str, Any] = {"model": checkpoint.model, "dtype": dtype}
        if dialogue.renderer.takes_images:
            options["limit_mm_per_prompt"] = {"image": max(1, num_images)}
        self.lora_request = None
        if checkpoint.adapter is not None:
            from vllm.lora.request import LoRARequest

            options |= {"enable_lora": True, "max_lora_rank": _lora_rank(checkpoint.adapter)}
            self.lora_request = LoRARequest("adapter", 1, checkpoint.adapter)
        self.merged: Any = None  # the folder of a merged model, if one was made for this
        self.llm = LLM(**{**options, **(llm_options or {})})
        bias = None
        if isinstance(dialogue, PostDialogue) and dialogue.mode == "direct":
            start, anywhere, _ = dialogue.forbidden_ids()
            bias = {index: _FORBIDDEN for index in sorted(start | anywhere)}
        self._sampling_params = SamplingParams
        self.options = {
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "stop_token_ids": sorted(self.stop_ids),
            "logit_bias": bias,
            "detokenize": False,  # outputs are read from their tokens, as the other backend's are
        }

    def __call__(self, rows: Sequence[Mapping[str, Any]], seed: int | None = None) -> list[Any]:
        """Predict a batch of rows, as `TransformersGenerator` does; with a seed, each post's draws depend on its id alone."""
        renderer = self.dialogue.renderer
        prompts, parameters = [], []
        for row in rows:
            images = renderer.images(row)
            text = renderer.prompt(row, len(images))
            # As tokens: given a text, vLLM would put a second BOS token before the template's.
            prompt: dict[str, Any] = {"prompt_token_ids": renderer.tokenizer(text, add_special_tokens=False)["input_ids"]}
            if images:
                prompt["multi_modal_data"] = {"image": images}
            prompts.append(prompt)
            own_seed = None if seed is None else derived_seed(seed, row["id"])
            parameters.append(self._sampling_params(**self.options, seed=own_seed))
        outputs = self.llm.generate(prompts, parameters, lora_request=self.lora_request, use_tqdm=False)
        return [
            self.dialogue.prediction(row["id"], len(output.prompt_token_ids), list(output.outputs[0].token_ids), self.stop_ids)
            for row, output in zip(rows, outputs, strict=True)
        ]


def _eos_token_id(model: str) -> int | list[int] | None:
    try:
        return GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # a checkpoint need not have one
        return None


def _lora_rank(adapter: str) -> int:
    """The rank vLLM must make room for; an error for what its LoRA support leaves out."""
    file = Path(adapter, "adapter_config.json")
    if not os.path.isfile(file):
        raise ValueError(f"adapter={adapter!r} must be a folder for vLLM; download it first, or merge it")
    config = json.loads(file.read_text(encoding="utf-8"))
    if modules := config.get("modules_to_save"):
        raise ValueError(
            f"adapter={adapter!r} holds modules trained in full ({', '.join(modules)}), which vLLM cannot put into a model: "
            "merge it (--merge-adapter)"
        )
    ranks = [config.get("r") or 0, *(config.get("rank_pattern") or {}).values()]
    for rank in _LORA_RANKS:
        if rank >= max(ranks):
            return rank
    raise ValueError(f"adapter={adapter!r} has rank {max(ranks)}, and vLLM goes up to {_LORA_RANKS[-1]}: merge it")
