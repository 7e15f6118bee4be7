"""Predicted keyphrases: batched, left-padded generation with transformers.

Given a model, its processor and posts, gives one prediction per post, in the posts' order. Holds: a prompt is rendered
by the renderer that training uses, from the post's text and pictures alone, never from its keyphrases or rationale;
a prediction does not depend on the batch size beyond floating-point noise; the model is left in the modes it was in.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from dynkp.data.collators import PairedTargetCollator
from dynkp.data.prompts import TAGS, KeyphraseTask, count_words

logger = logging.getLogger(__name__)

Modality = Literal["both", "text", "image"]

# All that a prompt may be made of: gold columns do not come near it.
_PROMPT_COLUMNS = ("id", "text", "images", "image", "prompt")
# Batches whose posts are sorted by length together: enough for little padding, few enough to hold in memory.
_BATCHES_PER_WINDOW = 32


class Prediction(TypedDict):
    """What a model said about one post.

    Attributes:
        id: the post's.
        keyphrases: as `parse_answer` reads them, in the order generated.
        raw: the whole output, with the tags of reasoning and answer, without control tokens.
        reasoned: whether it holds reasoning.
        output_tokens: generated tokens, the end of turn not counted.
        output_words: blank-separated words of `raw`, tags not counted.
    """

    id: str
    keyphrases: list[str]
    raw: str
    reasoned: bool
    output_tokens: int
    output_words: int


def generate_keyphrases(
    model: PreTrainedModel,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    posts: Iterable[Mapping[str, Any]],
    *,
    task: KeyphraseTask | str = "dynamic_cot",
    batch_size: int = 8,
    max_new_tokens: int = 512,
    modality: Modality = "both",
    progress: bool = True,
    generation_kwargs: Mapping[str, Any] | None = None,
) -> Iterator[Prediction]:
    """Predict the keyphrases of posts, greedily unless told otherwise.

    Posts are batched with others of the same number of pictures and a similar length of text, since placeholders of
    pictures are most of a prompt's tokens. Predictions come in the posts' order, some batches at a time; a stream is
    never held in memory as a whole.

    Args:
        model: a model that generates, on its device; PEFT models too.
        processor: its processor, or the tokenizer of a text model.
        posts: rows with `id`, `text` and `images`, or TRL's conversational `prompt` and `images`; a stream will do.
        task: the prompt's template and the answer's separator.
        batch_size: posts per call of `model.generate`, at least 1.
        max_new_tokens: longest output in tokens; one that is cut off inside its reasoning has no keyphrases.
        modality: "text" leaves the pictures out of the prompts, "image" the text.
        progress: whether to show a progress bar with posts per second.
        generation_kwargs: for `model.generate`, such as `num_beams`; these win over all of the above.

    Returns:
        An iterator of predictions. Nothing is generated before it is asked for.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> posts = [{"id": "1", "text": "puppy at the park", "images": []}]
        >>> [row["id"] for row in generate_keyphrases(model, processor, posts, max_new_tokens=8)]
        ['1']
    """
    options = dict(generation_kwargs or {})
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if modality not in ("both", "text", "image"):
        raise ValueError(f"modality={modality!r} is not known: use 'both', 'text' or 'image'")
    if options.get("num_return_sequences", 1) != 1:
        raise ValueError("generation_kwargs: num_return_sequences must be 1, a post has one prediction")
    generator = _Generator(model, processor, task, {"max_new_tokens": max_new_tokens, **options})
    return _predictions(generator, posts, batch_size, modality, progress)


def _predictions(
    generator: _Generator, posts: Iterable[Mapping[str, Any]], batch_size: int, modality: Modality, progress: bool
) -> Iterator[Prediction]:
    total = len(posts) if isinstance(posts, Sized) else None
    rows = (_prompt_row(row, index, modality) for index, row in enumerate(posts))
    with tqdm(total=total, desc="Predicting", unit="post", disable=not progress) as bar:
        while window := list(islice(rows, batch_size * _BATCHES_PER_WINDOW)):
            # Longest first: what does not fit into memory fails at once.
            order = sorted(range(len(window)), key=lambda index: _size(window[index]), reverse=True)
            predictions: dict[int, Prediction] = {}
            while order:
                pictures = _size(window[order[0]])[0]
                batch = [index for index in order[:batch_size] if _size(window[index])[0] == pictures]
                order = order[len(batch) :]
                outputs = generator([window[index] for index in batch])
                predictions.update(zip(batch, outputs, strict=True))
                bar.update(len(batch))
            yield from (predictions[index] for index in range(len(window)))
    if generator.cut_off:
        logger.warning(
            "%d outputs were cut off at %d tokens; raise max_new_tokens if their reasoning was longer than that.",
            generator.cut_off,
            generator.options["max_new_tokens"],
        )


def _prompt_row(row: Mapping[str, Any], index: int, modality: Modality) -> dict[str, Any]:
    kept = {column: row[column] for column in _PROMPT_COLUMNS if column in row}
    kept["id"] = str(kept.get("id", index))
    if modality != "both":
        if kept.get("prompt") is not None:
            raise ValueError(
                f"post {kept['id']!r}: modality={modality!r} needs rows with `text` and `images`; "
                "a written-out `prompt` cannot be taken apart"
            )
        if modality == "image":
            kept["text"] = ""
        else:
            kept["images"] = []
    return kept


def _size(row: Mapping[str, Any]) -> tuple[int, int]:
    """Pictures and characters: a stand-in for the prompt's length that neither reads pictures nor tokenizes."""
    pictures = row.get("images")
    count = len(pictures) if pictures is not None else int(row.get("image") is not None)
    return count, len(str(row.get("prompt") or row.get("text") or ""))


class _Generator:
    """One model with its way of stopping and decoding; called with the rows of a batch."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin | PreTrainedTokenizerBase,
        task: KeyphraseTask | str,
        options: Mapping[str, Any],
    ):
        self.model = model
        self.collator = PairedTargetCollator(processor, task=task)
        self.renderer = self.collator.renderer
        tokenizer = self.tokenizer = self.renderer.tokenizer
        self.stop_ids = self._stop_ids()
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        # A vocabulary may hold the tags as special tokens; without them the answer could not be read.
        self.dropped_ids = special - {index for tag, index in tokenizer.get_added_vocab().items() if tag in TAGS}
        self.options = {
            "do_sample": False,
            "use_cache": True,  # trainers turn it off in the model's config while gradients are checkpointed
            "eos_token_id": sorted(self.stop_ids),
            "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **options,
        }
        self.cut_off = 0

    def _stop_ids(self) -> set[int]:
        """The checkpoint's own end tokens, and the one that training puts behind every answer."""
        eos = self.model.generation_config.eos_token_id
        stop_ids = set(eos) if isinstance(eos, list) else {eos}
        stop_ids.add(self.tokenizer.eos_token_id)
        target = self.renderer.direct_target({"text": "", "keyphrases": ["keyphrase"]}, 0)
        end_of_turn = self.tokenizer(target.rpartition("keyphrase")[2], add_special_tokens=False)["input_ids"]
        stop_ids.add(next((index for index in end_of_turn if index in self.tokenizer.added_tokens_decoder), None))
        return stop_ids - {None}

    def __call__(self, rows: list[dict[str, Any]]) -> list[Prediction]:
        prompts = self.collator.collate_prompts(rows, [self.renderer.images(row) for row in rows])
        inputs = {name: self._placed(value) for name, value in prompts.items()}
        with _evaluating(self.model):
            outputs = self.model.generate(**inputs, **self.options)
        width = inputs["input_ids"].shape[1]
        new_tokens = outputs[:, width:].tolist()
        return [self._prediction(row["id"], tokens) for row, tokens in zip(rows, new_tokens, strict=True)]

    def _placed(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        # Pictures come as float32, whatever the model computes in.
        return value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)

    def _prediction(self, post_id: str, tokens: list[int]) -> Prediction:
        end = next((position for position, token in enumerate(tokens) if token in self.stop_ids), None)
        self.cut_off += end is None
        tokens = tokens[:end]
        raw = self.tokenizer.decode([token for token in tokens if token not in self.dropped_ids])
        answer = self.renderer.task.parse(raw)
        return Prediction(
            id=post_id,
            keyphrases=answer.keyphrases,
            raw=raw,
            reasoned=answer.reasoned,
            output_tokens=len(tokens),
            output_words=count_words(raw),
        )


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode within the block, then each module as it was: a frozen tower may be in evaluation mode alone."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def write_predictions(path: str | os.PathLike[str], predictions: Iterable[Mapping[str, Any]]) -> int:
    """Write predictions as JSONL, one a row; the file appears, or is replaced, only when it is complete.

    Args:
        path: the file; missing folders are made.
        predictions: rows such as `generate_keyphrases` yields, with more columns if you like.

    Returns:
        The number of rows.

    Example:
        >>> write_predictions("out/predictions.jsonl", generate_keyphrases(model, processor, posts))
        5372
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, since a rename across file systems is not atomic.
    partial = path.with_name(f".{path.name}.partial")
    count = 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            for row in predictions:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count
