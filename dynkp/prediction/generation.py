"""Predictions for posts: batched, left-padded generation with transformers.

Given a model, its processor and posts, gives one prediction per post, in the posts' order: keyphrases (`PostDialogue`), or
the answer to a prompt of a reasoning task (`ReasoningDialogue`). Holds: a prompt is rendered by the renderer that training
uses, from the post's text, pictures and aspect alone, never from its keyphrases, label or rationale; a prediction does not
depend on the batch size beyond floating-point noise; the model is left in the modes it was in.

Asked for keyphrases, the model decides whether to reason (mode "auto"), or is made to. "think" writes `<think>` behind the
rendered prompt, as it stands in front of a reasoning target, and the model goes on from there. "direct" takes from the
model, as long as it has written nothing but blanks, every token that `<think>` could begin with, and everywhere the tags of
reasoning that are tokens of their own.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal, TypedDict

import torch
from tqdm.auto import tqdm
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from dynkp.batches.collators import ChatCollator
from dynkp.batches.keyphrase_renderer import KeyphraseRenderer
from dynkp.batches.reasoning_renderer import PromptKind, ReasoningRenderer
from dynkp.batches.renderers import ChatRenderer
from dynkp.data.reasoning_tasks import KeyphraseReasoningTask, ReasoningTask
from dynkp.data.tasks import END_THINK, TAGS, THINK, KeyphraseTask, count_words

logger = logging.getLogger(__name__)

Modality = Literal["both", "text", "image"]
Mode = Literal["auto", "think", "direct"]

# All that a prompt may be made of: gold columns do not come near it.
_PROMPT_COLUMNS = ("id", "text", "images", "image", "aspect", "prompt")
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
        prompt_tokens: tokens of the prompt, image placeholders included.
        output_words: blank-separated words of `raw`, tags not counted.
        mode: "auto", "think" or "direct".
        modality: "both", "text" or "image".
    """

    id: str
    keyphrases: list[str]
    raw: str
    reasoned: bool
    output_tokens: int
    prompt_tokens: int
    output_words: int
    mode: str
    modality: str


class _Answered(TypedDict):
    id: str
    prediction: str | None
    raw: str
    output_tokens: int
    prompt_tokens: int
    output_words: int
    prompt: str
    modality: str


class ReasoningPrediction(_Answered, total=False):
    """What a model answered to a prompt of a reasoning task.

    Attributes:
        id: the post's.
        prediction: as `ReasoningTask.parse` reads it; None where the output predicts nothing.
        raw: the whole output, a chain or the field Prediction, without control tokens.
        output_tokens, prompt_tokens, output_words, modality: as in `Prediction`.
        prompt: "label" or "chain".
        keyphrases: the prediction as a list; of the task of keyphrases alone.
    """

    keyphrases: list[str]


def generate_keyphrases(
    model: PreTrainedModel,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    posts: Iterable[Mapping[str, Any]],
    *,
    task: KeyphraseTask | str = "dynamic_cot",
    batch_size: int = 8,
    max_new_tokens: int = 512,
    modality: Modality = "both",
    mode: Mode = "auto",
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
        mode: "think" makes the model reason first, "direct" answer at once, "auto" lets it decide.
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
    dialogue = PostDialogue(processor, task, mode=mode, modality=modality)
    generator = TransformersGenerator(model, dialogue, **{"max_new_tokens": max_new_tokens, **(generation_kwargs or {})})
    return _predictions(generator, posts, _checked_batch_size(batch_size), progress)


def generate_reasoning(
    model: PreTrainedModel,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
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
    """Answer one of a reasoning task's prompts for posts, greedily unless told otherwise; as `generate_keyphrases`.

    Args:
        task: one of `REASONING_TASKS` by its name, or a task.
        prompt: "label" for the prediction alone, from which classification is scored, "chain" for the reasons too.
        posts: rows with `id`, `text`, `images` and, where the task takes one, `aspect`.

    Raises:
        ValueError: if an argument is out of its range, or, at that post, if an aspect is missing.

    Example:
        >>> posts = [{"id": "1", "text": "Go Cubs", "images": [], "aspect": "Cubs"}]
        >>> [row["prediction"] for row in generate_reasoning(model, processor, posts, task="masc", max_new_tokens=8)]
        ['positive']
    """
    dialogue = ReasoningDialogue(processor, task, prompt=prompt, modality=modality)
    generator = TransformersGenerator(model, dialogue, **{"max_new_tokens": max_new_tokens, **(generation_kwargs or {})})
    return _predictions(generator, posts, _checked_batch_size(batch_size), progress)


def _checked_batch_size(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    return batch_size


def _predictions(
    generator: TransformersGenerator, posts: Iterable[Mapping[str, Any]], batch_size: int, progress: bool
) -> Iterator[Any]:
    total = len(posts) if isinstance(posts, Sized) else None
    rows = (prompt_row(row, index, generator.dialogue.modality) for index, row in enumerate(posts))
    with tqdm(total=total, desc="Predicting", unit="post", disable=not progress) as bar:
        while window := list(islice(rows, batch_size * _BATCHES_PER_WINDOW)):
            predictions: dict[int, Any] = {}
            for batch in plan_batches([prompt_size(row) for row in window], batch_size):
                outputs = generator([window[index] for index in batch])
                predictions.update(zip(batch, outputs, strict=True))
                bar.update(len(batch))
            yield from (predictions[index] for index in range(len(window)))
    generator.dialogue.warn_of_cut_off(generator.options["max_new_tokens"])


def plan_batches(sizes: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Batches of posts with equally many pictures and prompts of similar length.

    Args:
        sizes: per post what `prompt_size` says.
        batch_size: the most posts in a batch.

    Returns:
        Lists of indices into `sizes`, longest posts first: what does not fit into memory fails at once.

    Example:
        >>> plan_batches([(1, 5), (0, 9), (1, 80), (1, 7)], 2)
        [[2, 3], [0], [1]]
    """
    order = sorted(range(len(sizes)), key=lambda index: sizes[index], reverse=True)
    batches = []
    while order:
        pictures = sizes[order[0]][0]
        batch = [index for index in order[:batch_size] if sizes[index][0] == pictures]
        order = order[len(batch) :]
        batches.append(batch)
    return batches


def prompt_row(row: Mapping[str, Any], index: int = 0, modality: Modality = "both") -> dict[str, Any]:
    """The columns of a row that a prompt may be made of, by the modality; `index` is the id of one that has none."""
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


def prompt_size(row: Mapping[str, Any]) -> tuple[int, int]:
    """Pictures and characters: a stand-in for the prompt's length that neither reads pictures nor tokenizes."""
    pictures = row.get("images")
    count = len(pictures) if pictures is not None else int(row.get("image") is not None)
    return count, len(str(row.get("prompt") or row.get("text") or ""))


class Dialogue:
    """What a model is asked about a post, and how its output is read; the same for every backend.

    Args:
        renderer: of the prompts.
        modality: as in `generate_keyphrases`.

    Raises:
        ValueError: if the modality is not known.
    """

    mode: Mode = "auto"
    # Part of what is read, though the model did not write it, and its length in tokens.
    prefix = ""
    opening_tokens = 0

    def __init__(self, renderer: ChatRenderer, modality: Modality = "both"):
        if modality not in ("both", "text", "image"):
            raise ValueError(f"modality={modality!r} is not known: use 'both', 'text' or 'image'")
        self.modality = modality
        self.renderer = renderer
        self.collator = ChatCollator(renderer)
        tokenizer = self.tokenizer = renderer.tokenizer
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        # A vocabulary may hold the tags as special tokens; without them the answer could not be read.
        self.dropped_ids = special - {index for tag, index in tokenizer.get_added_vocab().items() if tag in TAGS}
        self.cut_off = 0

    def stop_ids(self, eos_token_id: int | list[int] | None) -> set[int]:
        """The checkpoint's own end tokens, and the one that training puts behind every answer."""
        after = self.tokenizer(self.renderer.end_of_turn, add_special_tokens=False)["input_ids"]
        end_of_turn = next((index for index in after if index in self.tokenizer.added_tokens_decoder), None)
        own = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
        return {index for index in (*own, self.tokenizer.eos_token_id, end_of_turn) if index is not None}

    def prediction(self, post_id: str, prompt_tokens: int, tokens: Sequence[int], stop_ids: set[int]) -> Any:
        """Read the generated tokens of one post; what follows a stop token is padding."""
        end = next((position for position, token in enumerate(tokens) if token in stop_ids), None)
        self.cut_off += end is None
        tokens = tokens[:end]
        raw = self.prefix + self.tokenizer.decode([token for token in tokens if token not in self.dropped_ids])
        return self.read(post_id, raw, len(tokens), prompt_tokens - self.opening_tokens)

    def read(self, post_id: str, raw: str, output_tokens: int, prompt_tokens: int) -> Any:
        """The prediction in an output, with its figures."""
        raise NotImplementedError

    def warn_of_cut_off(self, max_new_tokens: int) -> None:
        """Say once, at the end, how many outputs did not come to their end."""
        if self.cut_off:
            logger.warning(
                "%d outputs were cut off at %d tokens; raise max_new_tokens if their reasoning was longer than that.",
                self.cut_off,
                max_new_tokens,
            )


class PostDialogue(Dialogue):
    """Asks for keyphrases.

    Args:
        processor: processor of a vision-language model, or tokenizer of a text model.
        task: the prompt's template and the answer's separator.
        mode: as in `generate_keyphrases`.
        modality: as in `generate_keyphrases`.

    Raises:
        ValueError: if mode or modality is not known, or mode is "direct" and the chat template opens the reasoning.
    """

    def __init__(
        self,
        processor: ProcessorMixin | PreTrainedTokenizerBase,
        task: KeyphraseTask | str = "dynamic_cot",
        *,
        mode: Mode = "auto",
        modality: Modality = "both",
    ):
        if mode not in ("auto", "think", "direct"):
            raise ValueError(f"mode={mode!r} is not known: use 'auto', 'think' or 'direct'")
        renderer = KeyphraseRenderer(processor, task)
        opened = renderer.prompt({"text": "?"}, 0).rstrip().endswith(THINK)
        if opened and mode == "direct":
            raise ValueError(
                f"mode='direct': the chat template of {renderer.tokenizer.name_or_path!r} itself writes {THINK} behind the "
                "prompt; use 'auto' or 'think', or a template that leaves it to the model"
            )
        if mode == "think" and not opened:
            # With the blanks, if any, that the template puts between prompt and answer.
            example = {"text": "?", "keyphrases": ["keyphrase"], "rationale": "why"}
            before, tag, _ = (renderer.reasoning_target(example, 0) or "").partition(THINK)
            renderer = KeyphraseRenderer(processor, task, opening=before + THINK if tag else THINK)
        super().__init__(renderer, modality)
        self.mode = mode
        self.task = renderer.task
        # An output cut off inside its reasoning has no answer, whoever opened it.
        self.prefix = THINK if opened else renderer.opening.lstrip()
        self.opening_tokens = len(self.tokenizer(renderer.opening, add_special_tokens=False)["input_ids"])

    def forbidden_ids(self) -> tuple[set[int], set[int], set[int]]:
        """For mode "direct": tokens forbidden at the start of an output, tokens forbidden anywhere, and blank tokens."""
        ids = range(len(self.tokenizer))
        start, anywhere, blank = set(), set(), set(self.dropped_ids)
        for index, text in zip(ids, self.tokenizer.batch_decode([[index] for index in ids]), strict=True):
            stripped = text.strip()
            if not stripped:
                blank.add(index)
            elif THINK.startswith(stripped) or stripped.startswith(THINK):
                start.add(index)
            if THINK in text or END_THINK in text:
                anywhere.add(index)
        return start, anywhere, blank

    def read(self, post_id: str, raw: str, output_tokens: int, prompt_tokens: int) -> Prediction:
        answer = self.task.parse(raw)
        return Prediction(
            id=post_id,
            keyphrases=answer.keyphrases,
            raw=raw,
            reasoned=answer.reasoned,
            output_tokens=output_tokens,
            prompt_tokens=prompt_tokens,
            output_words=count_words(raw),
            mode=self.mode,
            modality=self.modality,
        )


class ReasoningDialogue(Dialogue):
    """Asks one of the prompts of a reasoning task.

    Args:
        processor: processor of a vision-language model, or tokenizer of a text model.
        task: one of `REASONING_TASKS` by its name, or a task.
        prompt: "label" or "chain".
        modality: as in `generate_keyphrases`.

    Raises:
        ValueError: if task, prompt or modality is not known.
    """

    def __init__(
        self,
        processor: ProcessorMixin | PreTrainedTokenizerBase,
        task: ReasoningTask | str,
        *,
        prompt: PromptKind = "label",
        modality: Modality = "both",
    ):
        renderer = ReasoningRenderer(processor, task, prompt)
        super().__init__(renderer, modality)
        self.task, self.prompt = renderer.task, prompt

    def read(self, post_id: str, raw: str, output_tokens: int, prompt_tokens: int) -> ReasoningPrediction:
        prediction = ReasoningPrediction(
            id=post_id,
            prediction=self.task.parse(raw).prediction,
            raw=raw,
            output_tokens=output_tokens,
            prompt_tokens=prompt_tokens,
            output_words=count_words(raw),
            prompt=self.prompt,
            modality=self.modality,
        )
        if isinstance(self.task, KeyphraseReasoningTask):
            prediction["keyphrases"] = self.task.keyphrases(raw)
        return prediction


class TransformersGenerator:
    """One model with its way of stopping and decoding; called with the rows of a batch.

    Args:
        model: a model that generates, on its device; PEFT models too.
        dialogue: the prompts, and the reading of outputs.
        max_new_tokens: longest output in tokens.
        options: for `model.generate`.
    """

    def __init__(self, model: PreTrainedModel, dialogue: Dialogue, *, max_new_tokens: int = 512, **options: Any):
        self.model = model
        self.dialogue = dialogue
        tokenizer = dialogue.tokenizer
        self.stop_ids = dialogue.stop_ids(model.generation_config.eos_token_id)
        self.options = {
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            # Some checkpoints' own defaults are not plain decoding (Qwen2.5-VL penalises repetition).
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
            raise ValueError("generation_kwargs: num_return_sequences must be 1, a post has one prediction")
        self._forbidden = None
        if isinstance(dialogue, PostDialogue) and dialogue.mode == "direct":
            self._forbidden = dialogue.forbidden_ids()

    def __call__(self, rows: Sequence[Mapping[str, Any]], seed: int | None = None) -> list[Any]:
        """Predict a batch of rows.

        Args:
            rows: at least one, as `prompt_row` makes them.
            seed: of sampling. With it, what is drawn depends on the batch's ids and on nothing before it, and PyTorch's
                global generator is left as it was.
        """
        prompts = self.dialogue.collator.collate_prompts(rows, [self.dialogue.renderer.images(row) for row in rows])
        inputs = {name: self._placed(value) for name, value in prompts.items()}
        prompt_tokens = prompts["attention_mask"].sum(dim=1).tolist()
        width = inputs["input_ids"].shape[1]
        options = dict(self.options)
        if self._forbidden is not None:
            own = options.pop("logits_processor", None) or []
            options["logits_processor"] = LogitsProcessorList([*own, _NoReasoning(width, *self._forbidden)])
        seed = None if seed is None else derived_seed(seed, *(row["id"] for row in rows))
        with _evaluating(self.model), _seeded(seed, self.model.device):
            outputs = self.model.generate(**inputs, **options)
        new_tokens = outputs[:, width:].tolist()
        return [
            self.dialogue.prediction(row["id"], count, tokens, self.stop_ids)
            for row, count, tokens in zip(rows, prompt_tokens, new_tokens, strict=True)
        ]

    def _placed(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        # Pictures come as float32, whatever the model computes in.
        return value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)


class _NoReasoning(LogitsProcessor):
    """Mode "direct": see the head of this file."""

    def __init__(self, prompt_width: int, start: set[int], anywhere: set[int], blank: set[int]):
        self.prompt_width = prompt_width
        ids = (start, anywhere, blank)
        self.start, self.anywhere, self.blank = (torch.tensor(sorted(part), dtype=torch.long) for part in ids)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        device = scores.device
        written = input_ids[:, self.prompt_width :]
        nothing_yet = torch.isin(written, self.blank.to(device)).all(dim=1)
        scores = scores.clone()
        scores[:, self.anywhere.to(device)] = -torch.inf
        at_start = nothing_yet.nonzero()
        scores[at_start, self.start.to(device)] = -torch.inf
        return scores


def derived_seed(seed: int, *ids: str) -> int:
    """A seed of 32 bits for these ids: draws of one post or batch have nothing to do with those of another."""
    return int(hashlib.sha256("\0".join((str(seed), *ids)).encode()).hexdigest()[:8], 16)


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


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
