"""Predictions for posts in memory or in a stream: `generate_keyphrases` and `generate_reasoning`.

For files, and for runs that may be interrupted, see [`~dynkp.prediction.run.PredictionRun`].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from dynkp.batches.reasoning_renderer import PromptKind
from dynkp.batches.renderers import Processor
from dynkp.data.reasoning_tasks import ReasoningTask
from dynkp.data.tasks import KeyphraseTask
from dynkp.prediction.batch_plan import plan_batches, prompt_size
from dynkp.prediction.generation_tasks import (
    KeyphraseGenerationTask,
    KeyphrasePrediction,
    Modality,
    Mode,
    ReasoningGenerationTask,
    ReasoningPrediction,
    prompt_columns,
)
from dynkp.prediction.transformers_engine import TransformersEngine

# Batches whose posts are sorted by length together: enough for little padding, few enough to hold in memory.
_BATCHES_PER_WINDOW = 32


def generate_keyphrases(
    model: PreTrainedModel,
    processor: Processor,
    posts: Iterable[Mapping[str, Any]],
    *,
    task: KeyphraseTask | str = "dynamic_cot",
    batch_size: int = 8,
    max_new_tokens: int = 512,
    modality: Modality = "both",
    mode: Mode = "auto",
    progress: bool = True,
    generation_kwargs: Mapping[str, Any] | None = None,
) -> Iterator[KeyphrasePrediction]:
    """Predict the keyphrases of posts; by default with greedy decoding.

    Posts are batched with others of the same number of images and a similar length of text, since image placeholders are
    most of a prompt's tokens. Predictions are yielded in the posts' order, some batches at a time; a stream is never held in
    memory as a whole.

    Args:
        model: a model that generates, on its device; PEFT models included.
        processor: its processor, or the tokenizer of a text model.
        posts: posts with `id`, `text` and `images`, or with TRL's conversational `prompt` and `images`; a dataset, a list or
            a stream.
        task: the instruction of the prompt and the separator of the answer; a name is looked up in `TASKS`.
        batch_size: number of posts per call of `model.generate`, at least 1.
        max_new_tokens: the greatest number of tokens of an output, at least 1; an output that is cut off inside its
            reasoning has no keyphrases.
        modality: "text" leaves the images out of the prompts, "image" the text; "both" shows both.
        mode: "think" makes the model reason first, "direct" answer at once; "auto" lets it decide.
        progress: whether to show a progress bar with posts per second.
        generation_kwargs: options of `model.generate`, such as `num_beams`; they take precedence over all of the above.

    Yields:
        One `KeyphrasePrediction` per post. Nothing is generated before the first one is asked for.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> from dynkp.synthetic.tiny_model import build_tiny_vlm
        >>> model, processor = build_tiny_vlm(["puppy at the park"])
        >>> posts = [{"id": "1", "text": "puppy at the park", "images": []}]
        >>> predictions = generate_keyphrases(model, processor, posts, max_new_tokens=8, progress=False)
        >>> [prediction["id"] for prediction in predictions]
        ['1']
    """
    generation_task = KeyphraseGenerationTask(processor, task, mode=mode, modality=modality)
    engine = TransformersEngine(model, generation_task, **{"max_new_tokens": max_new_tokens, **(generation_kwargs or {})})
    return _generate(engine, posts, _checked_batch_size(batch_size), progress)


def generate_reasoning(
    model: PreTrainedModel,
    processor: Processor,
    posts: Iterable[Mapping[str, Any]],
    *,
    task: ReasoningTask | str,
    prompt: PromptKind = "label",
    batch_size: int = 8,
    max_new_tokens: int = 512,
    modality: Modality = "both",
    progress: bool = True,
    generation_kwargs: Mapping[str, Any] | None = None,
) -> Iterator[ReasoningPrediction]:
    """Answer one of the prompts of a reasoning task for posts; by default with greedy decoding.

    Args:
        model: as in `generate_keyphrases`.
        processor: as in `generate_keyphrases`.
        posts: posts with `id`, `text`, `images` and, if the task takes one, `aspect`.
        task: a reasoning task; a name is looked up in `REASONING_TASKS`.
        prompt: "label" asks for the prediction alone, from which classification is scored; "chain" for the response chain.
        batch_size: as in `generate_keyphrases`.
        max_new_tokens: the greatest number of tokens of an output, at least 1.
        modality: as in `generate_keyphrases`.
        progress: as in `generate_keyphrases`.
        generation_kwargs: as in `generate_keyphrases`.

    Yields:
        One `ReasoningPrediction` per post, in the posts' order. Nothing is generated before the first one is asked for.

    Raises:
        ValueError: if an argument is out of its range; naming the post, if its aspect is missing.

    Example:
        >>> from dynkp.synthetic.tiny_model import build_tiny_vlm
        >>> model, processor = build_tiny_vlm(["Go Cubs"])
        >>> posts = [{"id": "1", "text": "Go Cubs", "images": [], "aspect": "Cubs"}]
        >>> predictions = generate_reasoning(model, processor, posts, task="masc", max_new_tokens=8, progress=False)
        >>> [prediction["prediction"] for prediction in predictions]  # the tiny model is untrained
        [None]
    """
    generation_task = ReasoningGenerationTask(processor, task, prompt=prompt, modality=modality)
    engine = TransformersEngine(model, generation_task, **{"max_new_tokens": max_new_tokens, **(generation_kwargs or {})})
    return _generate(engine, posts, _checked_batch_size(batch_size), progress)


def _checked_batch_size(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    return batch_size


def _generate(engine: TransformersEngine, posts: Iterable[Mapping[str, Any]], batch_size: int, progress: bool) -> Iterator[Any]:
    total = len(posts) if isinstance(posts, Sized) else None
    rows = (prompt_columns(row, index, engine.task.modality) for index, row in enumerate(posts))
    with tqdm(total=total, desc="Predicting", unit="post", disable=not progress) as bar:
        while window := list(islice(rows, batch_size * _BATCHES_PER_WINDOW)):
            predictions: dict[int, Any] = {}
            for batch in plan_batches([prompt_size(row) for row in window], batch_size):
                outputs = engine([window[index] for index in batch])
                predictions.update(zip(batch, outputs, strict=True))
                bar.update(len(batch))
            yield from (predictions[index] for index in range(len(window)))
    engine.task.warn_about_cut_off_outputs(engine.options["max_new_tokens"])
