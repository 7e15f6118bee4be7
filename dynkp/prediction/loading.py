"""Engines, loaded from a checkpoint: what `dynkp predict` generates with.

Given   a checkpoint, a task and how to decode.
Gives   a [`TransformersEngine`] or a [`VllmEngine`], and the settings that its outputs depend on, for the record of a run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dynkp.data.reasoning_tasks import ReasoningTask
from dynkp.data.tasks import KeyphraseTask
from dynkp.models.checkpoints import Checkpoint, load_model, load_processor
from dynkp.models.fingerprints import weights_fingerprint
from dynkp.prediction.engine import Engine
from dynkp.prediction.generation_tasks import (
    GenerationTask,
    KeyphraseGenerationTask,
    Modality,
    Mode,
    ReasoningGenerationTask,
)
from dynkp.prediction.transformers_engine import TransformersEngine


@dataclass(frozen=True)
class EngineSettings:
    """How a checkpoint is loaded and how it decodes.

    Args:
        max_new_tokens: the greatest number of tokens of an output.
        num_beams: number of beams; 1 for none.
        do_sample: whether to sample.
        temperature: of sampling; None for 1.
        top_p: sample from the likeliest tokens with this total probability, in (0, 1]; None for 1.
        dtype: of the weights, as for `load_model`.
        merge_adapter: whether to add the adapter to the weights first.
        engine: `"transformers"` or `"vllm"`.
        vllm_options: further arguments of `vllm.LLM`.
    """

    max_new_tokens: int = 512
    num_beams: int = 1
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    dtype: str = "auto"
    merge_adapter: bool = False
    engine: str = "transformers"
    vllm_options: Mapping[str, Any] = field(default_factory=dict)

    def sampling(self) -> dict[str, float]:
        """Return temperature and top-p; empty if nothing is sampled."""
        if not self.do_sample:
            return {}
        return {"temperature": self.temperature or 1.0, "top_p": self.top_p or 1.0}


@dataclass(frozen=True)
class Question:
    """What a model is asked about each post.

    Args:
        task: the task.
        mode: of a keyphrase task, whether to reason.
        prompt: of a reasoning task, `"label"` or `"chain"`.
        modality: what of a post to show.
    """

    task: KeyphraseTask | ReasoningTask
    mode: Mode = "auto"
    prompt: Any = "label"
    modality: Modality = "both"

    def settings(self) -> dict[str, Any]:
        """Return what the prompts contain besides the post, as JSON values."""
        task = self.task
        if isinstance(task, KeyphraseTask):
            return {"name": task.name, "instruction": task.instruction, "separator": task.separator}
        fields = {"fields": dict(task.analyses)} if self.prompt == "chain" else {}
        return {"name": task.name, "prompt": self.prompt, "question": task.question, **fields}

    def generation_task(self, processor: Any) -> GenerationTask:
        """Return the prompts and the reading of outputs for a processor."""
        if isinstance(self.task, KeyphraseTask):
            return KeyphraseGenerationTask(processor, self.task, mode=self.mode, modality=self.modality)
        return ReasoningGenerationTask(processor, self.task, prompt=self.prompt, modality=self.modality)


def run_settings(checkpoint: Checkpoint, question: Question, settings: EngineSettings) -> dict[str, Any]:
    """Collect what a prediction depends on besides its post, for [`PredictionRun`].

    The batch size is not among them: a run that ran out of memory may be continued with a smaller one.
    """
    return {
        "model": weights_fingerprint(checkpoint.model),
        "adapter": checkpoint.adapter and weights_fingerprint(checkpoint.adapter),
        "merge_adapter": settings.merge_adapter,
        "task": question.settings(),
        "mode": question.mode,
        "max_new_tokens": settings.max_new_tokens,
        "num_beams": settings.num_beams,
        "do_sample": settings.do_sample,
        "temperature": settings.sampling().get("temperature"),
        "top_p": settings.sampling().get("top_p"),
        "dtype": settings.dtype,
        "backend": settings.engine,  # the name under which earlier runs recorded it
        "vllm_options": dict(settings.vllm_options),
    }


def load_engine(
    checkpoint: Checkpoint,
    question: Question,
    settings: EngineSettings,
    *,
    device: torch.device | str = "cpu",
    num_images: int = 0,
) -> Engine:
    """Load a checkpoint into an engine.

    Args:
        checkpoint: the model, or the adapter and its base model.
        question: what is asked about each post.
        settings: how to load and decode.
        device: where the model is put; vLLM chooses itself.
        num_images: the greatest number of images of a post, which vLLM wants to know.

    Raises:
        ImportError: if vLLM is asked for and not installed.
        ValueError: if checkpoint, question and settings do not fit together.
    """
    task = question.generation_task(load_processor(checkpoint))
    if settings.engine == "vllm":
        return _load_vllm_engine(checkpoint, task, settings, num_images)
    model = load_model(checkpoint, dtype=settings.dtype, device=device, merge_adapter=settings.merge_adapter)
    sampling: dict[str, Any] = settings.sampling()
    if sampling:
        sampling |= {"do_sample": True, "top_k": 0}
    return TransformersEngine(model, task, max_new_tokens=settings.max_new_tokens, num_beams=settings.num_beams, **sampling)


def _load_vllm_engine(checkpoint: Checkpoint, task: GenerationTask, settings: EngineSettings, num_images: int) -> Engine:
    from dynkp.prediction.vllm_engine import VllmEngine

    folder = None
    if settings.merge_adapter:
        folder = tempfile.TemporaryDirectory(prefix="dynkp-merged-")
        load_model(checkpoint, dtype=settings.dtype, merge_adapter=True).save_pretrained(folder.name)
        task.renderer.processor.save_pretrained(folder.name)
        checkpoint = Checkpoint(folder.name)
    return VllmEngine(
        checkpoint,
        task,
        max_new_tokens=settings.max_new_tokens,
        num_images=num_images,
        dtype=settings.dtype,
        temperature=settings.sampling().get("temperature", 0.0),
        top_p=settings.sampling().get("top_p", 1.0),
        llm_options=settings.vllm_options,
        merged_model=folder,
    )
