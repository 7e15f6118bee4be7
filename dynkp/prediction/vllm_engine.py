"""The vLLM engine (extra `vllm`), with the prompts and the reading of outputs of the transformers engine.

It is written against vLLM's published interface (`LLM`, `SamplingParams`, `LoRARequest`, prompts of token ids with
`multi_modal_data`), and tested against a stand-in with that interface, not against vLLM itself, which cannot be installed
where the tests run.

Guarantees: prompts are the tokens that the transformers engine gives the model, before image placeholders are multiplied,
which both engines leave to the model's processor.

A difference to the transformers engine: vLLM has no rule for the beginning of an output only, so with mode "direct" the
tokens that `<think>` could begin with (often "<") are forbidden everywhere in an output.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from dynkp.models.checkpoints import Checkpoint
from dynkp.prediction.engine import derived_seed
from dynkp.prediction.generation_tasks import GenerationTask

# LoRA ranks that vLLM has kernels for.
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# The lowest bias that vLLM allows for a logit.
_FORBIDDEN = -100.0


class VllmEngine:
    """Generates with vLLM; it is called as [`~dynkp.prediction.transformers_engine.TransformersEngine`] is.

    Args:
        checkpoint: the model and its adapter, which vLLM applies without merging.
        task: the prompts, and the reading of outputs.
        max_new_tokens: the greatest number of tokens of an output.
        num_images: the greatest number of images of a post.
        dtype: as for `load_model`.
        temperature: of sampling; 0 is greedy decoding.
        top_p: sample from the likeliest tokens with this total probability, in (0, 1].
        llm_options: further arguments of `vllm.LLM`, such as `tensor_parallel_size`.
        merged_model: the temporary folder of a merged model that `checkpoint` names, kept as long as the engine.

    Attributes:
        task: the task.
        stop_ids: ids that end an output.
        llm: the `vllm.LLM`.
        options: arguments of `vllm.SamplingParams`.

    Raises:
        ImportError: if vLLM is not installed.
        ValueError: if vLLM cannot apply the adapter.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        task: GenerationTask,
        *,
        max_new_tokens: int = 512,
        num_images: int = 1,
        dtype: str = "auto",
        temperature: float = 0.0,
        top_p: float = 1.0,
        llm_options: Mapping[str, Any] | None = None,
        merged_model: Any = None,
    ):
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise ImportError(
                "backend='vllm' needs vLLM, which is not installed: pip install 'dynkp[vllm]', on a machine with a GPU, or "
                "use the backend 'transformers'."
            ) from error
        self.task = task
        self.stop_ids = task.stop_ids(_eos_token_id(checkpoint.model))
        self._merged_model = merged_model
        options: dict[str, Any] = {"model": checkpoint.model, "dtype": dtype}
        if task.renderer.takes_images:
            options["limit_mm_per_prompt"] = {"image": max(1, num_images)}
        self.lora_request = None
        if checkpoint.adapter is not None:
            from vllm.lora.request import LoRARequest

            options |= {"enable_lora": True, "max_lora_rank": _lora_rank(checkpoint.adapter)}
            self.lora_request = LoRARequest("adapter", 1, checkpoint.adapter)
        self.llm = LLM(**{**options, **(llm_options or {})})
        bias = None
        if (forbidden := task.forbidden_tokens()) is not None:
            bias = dict.fromkeys(sorted(forbidden.at_start | forbidden.anywhere), _FORBIDDEN)
        self._sampling_params = SamplingParams
        self.options = {
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "stop_token_ids": sorted(self.stop_ids),
            "logit_bias": bias,
            "detokenize": False,  # outputs are read from their tokens, as those of the transformers engine are
        }

    def __call__(self, rows: Sequence[Mapping[str, Any]], seed: int | None = None) -> list[Any]:
        """Predict a batch of posts.

        Args:
            rows: at least one post, as `prompt_columns` returns them.
            seed: of sampling. With a seed, the draws for a post depend on it and on the post's id alone.

        Returns:
            One prediction per post, in the posts' order, as `GenerationTask.read` returns it.
        """
        renderer = self.task.renderer
        prompts, parameters = [], []
        for row in rows:
            images = renderer.images(row)
            text = renderer.prompt(row, len(images))
            # As tokens: for a string, vLLM would put a second BOS token in front of the prompt's.
            tokens = renderer.tokenizer(text, add_special_tokens=renderer.add_special_tokens)["input_ids"]
            prompt: dict[str, Any] = {"prompt_token_ids": [*tokens, *renderer.opening_ids]}
            if images:
                prompt["multi_modal_data"] = {"image": images}
            prompts.append(prompt)
            own_seed = None if seed is None else derived_seed(seed, row["id"])
            parameters.append(self._sampling_params(**self.options, seed=own_seed))
        outputs = self.llm.generate(prompts, parameters, lora_request=self.lora_request, use_tqdm=False)
        return [
            self.task.prediction(row["id"], len(output.prompt_token_ids), list(output.outputs[0].token_ids), self.stop_ids)
            for row, output in zip(rows, outputs, strict=True)
        ]


def _eos_token_id(model: str) -> int | list[int] | None:
    try:
        return GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # a checkpoint need not have one
        return None


def _lora_rank(adapter: str) -> int:
    """Return the rank that vLLM must reserve, and refuse adapters that its LoRA support cannot apply."""
    file = Path(adapter, "adapter_config.json")
    if not os.path.isfile(file):
        raise ValueError(f"adapter={adapter!r} must be a folder for vLLM; download it first, or merge it (--merge-adapter)")
    config = json.loads(file.read_text(encoding="utf-8"))
    if modules := config.get("modules_to_save"):
        raise ValueError(
            f"adapter={adapter!r} has modules trained in full ({', '.join(modules)}), which vLLM cannot put into a model: "
            "merge it (--merge-adapter)"
        )
    ranks = [config.get("r") or 0, *(config.get("rank_pattern") or {}).values()]
    for rank in _LORA_RANKS:
        if rank >= max(ranks):
            return rank
    raise ValueError(
        f"adapter={adapter!r} has rank {max(ranks)}, and vLLM's greatest is {_LORA_RANKS[-1]}: merge it (--merge-adapter)"
    )
