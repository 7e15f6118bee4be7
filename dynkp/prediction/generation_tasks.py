"""Generation tasks: what a model is asked about a post, and how its output is read. They are the same for every engine.

[`KeyphraseGenerationTask`] asks for keyphrases, [`ReasoningGenerationTask`] asks one of the prompts of a MulCoT-RD task.

Guarantees: a prompt is rendered by the renderer that training uses, from the post's text, images and aspect alone; its
keyphrases, label and rationale are never part of it.

When asked for keyphrases, the model decides whether to reason (mode "auto"), or is made to. Mode "think" puts the
tokens of `<think>` behind the prompt, those that a reasoning target begins with, and the model continues from there. Mode
"direct" forbids, as long as the output is whitespace only, every token that `<think>` could begin with, and everywhere the
tags of reasoning that are tokens of their own.

Where the chat template itself writes `<think>` behind the prompt, mode "think" adds nothing, mode "direct" puts the tokens of
`</think>` behind it, as direct targets begin, and an output of mode "auto" that closes the reasoning at once is read as a
direct answer. Prompts of reasoning tasks are continued behind `</think>`.
"""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict

from dynkp.batches.collators import ChatCollator
from dynkp.batches.keyphrase_renderer import KeyphraseRenderer
from dynkp.batches.reasoning_renderer import PromptKind, ReasoningRenderer
from dynkp.batches.renderers import ChatRenderer, Processor
from dynkp.data.reasoning_tasks import KeyphraseReasoningTask, ReasoningTask
from dynkp.data.tasks import END_THINK, TAGS, THINK, KeyphraseTask, count_words
from dynkp.mmkp_f1.answers import canonical_text

logger = logging.getLogger(__name__)

Modality: TypeAlias = Literal["both", "text", "image"]
"""What of a post a prompt shows."""
Mode: TypeAlias = Literal["auto", "think", "direct"]
"""Whether the model decides to reason, has to reason first, or has to answer at once."""

# The only columns that a prompt may be made of; gold columns are not among them.
_PROMPT_COLUMNS = ("id", "text", "images", "image", "aspect", "prompt")


# What a direct answer begins with behind a template's own <think>.
_EMPTY_REASONING = re.compile(rf"\A{THINK}\s*{END_THINK}\s*")


class KeyphrasePrediction(TypedDict):
    """The keyphrases that a model predicts for one post.

    Attributes:
        id: the post's id.
        keyphrases: as `parse_answer` reads them, in the order generated.
        raw: the whole output, with the tags of reasoning and answer, without control tokens; without an empty
            `<think></think>` that the template has opened.
        reasoned: whether the output has reasoning.
        output_tokens: number of generated tokens, without the end of turn.
        prompt_tokens: number of tokens of the prompt, image placeholders included.
        output_words: number of whitespace-separated words of `raw`, without the tags.
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


class _ReasoningPrediction(TypedDict):
    id: str
    prediction: str | None
    raw: str
    output_tokens: int
    prompt_tokens: int
    output_words: int
    prompt: str
    modality: str


class ReasoningPrediction(_ReasoningPrediction, total=False):
    """A model's answer to one of the prompts of a reasoning task.

    Attributes:
        id: the post's id.
        prediction: as `ReasoningTask.parse` reads it; None if the output predicts nothing.
        raw: the whole output, a response chain or the field Prediction, without control tokens.
        output_tokens: as in `KeyphrasePrediction`.
        prompt_tokens: as in `KeyphrasePrediction`.
        output_words: as in `KeyphrasePrediction`.
        prompt: "label" or "chain".
        modality: "both", "text" or "image".
        keyphrases: the prediction as a list; only if the task is to predict keyphrases.
    """

    keyphrases: list[str]


class ForbiddenTokens(NamedTuple):
    """Tokens that an engine must not generate.

    Attributes:
        at_start: ids forbidden as long as the output has only tokens of `whitespace`.
        anywhere: ids forbidden everywhere.
        whitespace: ids of tokens that are whitespace or not part of the text that is read.
    """

    at_start: set[int]
    anywhere: set[int]
    whitespace: set[int]


class GenerationTask(ABC):
    """Base class: the prompts of posts, and the reading of outputs.

    Args:
        renderer: renders the prompts.
        modality: as in `generate_keyphrases`.
        prefix: text that is part of an output although it was written for the model.

    Attributes:
        renderer: the renderer.
        collator: tokenizes and pads the prompts.
        tokenizer: the renderer's tokenizer.
        dropped_ids: ids of control tokens, which are not part of an output's text.
        num_cut_off: number of outputs read so far that had no end of turn.

    Raises:
        ValueError: if `modality` is unknown.
    """

    def __init__(self, renderer: ChatRenderer, modality: Modality = "both", prefix: str = ""):
        if modality not in ("both", "text", "image"):
            raise ValueError(f"modality={modality!r} is not known: use 'both', 'text' or 'image'")
        self.modality = modality
        self.prefix = prefix
        self.renderer = renderer
        self.collator = ChatCollator(renderer)
        tokenizer = self.tokenizer = renderer.tokenizer
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        # A vocabulary may contain the tags as special tokens; without them the answer could not be read.
        self.dropped_ids = special - {index for tag, index in tokenizer.get_added_vocab().items() if tag in TAGS}
        self.num_cut_off = 0

    @abstractmethod
    def read(self, post_id: str, raw: str, output_tokens: int, prompt_tokens: int) -> Any:
        """Read a prediction from the text of an output.

        Args:
            post_id: the post's id.
            raw: the output without control tokens.
            output_tokens: number of generated tokens.
            prompt_tokens: number of tokens of the prompt.

        Returns:
            A `KeyphrasePrediction` or a `ReasoningPrediction`.
        """

    def forbidden_tokens(self) -> ForbiddenTokens | None:
        """Return the tokens that an engine must not generate; None if every token is allowed."""
        return None

    def stop_ids(self, eos_token_id: int | list[int] | None) -> set[int]:
        """Return the ids that end an output: the model's own end tokens, and the one that training puts behind every answer.

        Args:
            eos_token_id: of the model's generation config.
        """
        after = self.tokenizer(self.renderer.end_of_turn, add_special_tokens=False)["input_ids"]
        end_of_turn = next((index for index in after if index in self.tokenizer.added_tokens_decoder), None)
        own = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
        return {index for index in (*own, self.tokenizer.eos_token_id, end_of_turn) if index is not None}

    def prediction(self, post_id: str, prompt_tokens: int, tokens: Sequence[int], stop_ids: set[int]) -> Any:
        """Read a prediction from the generated tokens of one post.

        Args:
            post_id: the post's id.
            prompt_tokens: number of tokens of the prompt.
            tokens: the generated ids; what follows a stop token is padding.
            stop_ids: as `stop_ids` returns them.

        Returns:
            As `read`.
        """
        end = next((position for position, token in enumerate(tokens) if token in stop_ids), None)
        self.num_cut_off += end is None
        tokens = tokens[:end]
        raw = self.prefix + self.tokenizer.decode([token for token in tokens if token not in self.dropped_ids])
        return self.read(post_id, raw, len(tokens), prompt_tokens - len(self.renderer.opening_ids))

    def warn_about_cut_off_outputs(self, max_new_tokens: int) -> None:
        """Log a warning if outputs had no end of turn.

        Args:
            max_new_tokens: the greatest number of tokens of an output.
        """
        if self.num_cut_off:
            logger.warning(
                "%d outputs were cut off at %d tokens; raise max_new_tokens if their reasoning was longer than that.",
                self.num_cut_off,
                max_new_tokens,
            )


class KeyphraseGenerationTask(GenerationTask):
    """Asks for keyphrases.

    Args:
        processor: processor of a vision-language model, or tokenizer of a text model.
        task: the instruction of the prompt and the separator of the answer; a name is looked up in `TASKS`.
        mode: as in `generate_keyphrases`.
        modality: as in `generate_keyphrases`.

    Raises:
        ValueError: if `task`, `mode` or `modality` is unknown.
    """

    def __init__(
        self,
        processor: Processor,
        task: KeyphraseTask | str = "dynamic_cot",
        *,
        mode: Mode = "auto",
        modality: Modality = "both",
    ):
        if mode not in ("auto", "think", "direct"):
            raise ValueError(f"mode={mode!r} is not known: use 'auto', 'think' or 'direct'")
        renderer = KeyphraseRenderer(processor, task)
        opened = renderer.opens_reasoning
        opening = ""
        if mode == "direct" and opened:
            opening = END_THINK
        elif mode == "think" and not opened:
            # With the whitespace, if any, that the template writes between prompt and answer.
            example = {"text": "?", "keyphrases": ["keyphrase"], "rationale": "why"}
            before, tag, _ = (renderer.reasoning_target(example, 0) or "").partition(THINK)
            opening = before + THINK if tag else THINK
        if opening:
            renderer = KeyphraseRenderer(processor, task, opening)
        # <think> is read as part of the output, whoever wrote it: an output cut off inside its reasoning has no answer.
        prefix = THINK if mode == "think" or (opened and mode == "auto") else ""
        super().__init__(renderer, modality, prefix)
        self.mode = mode
        self.task = renderer.task

    def forbidden_tokens(self) -> ForbiddenTokens | None:
        """Return, for mode "direct", the tokens that would begin or end reasoning; None for the other modes."""
        if self.mode != "direct":
            return None
        ids = range(len(self.tokenizer))
        forbidden = ForbiddenTokens(at_start=set(), anywhere=set(), whitespace=set(self.dropped_ids))
        for index, text in zip(ids, self.tokenizer.batch_decode([[index] for index in ids]), strict=True):
            stripped = text.strip()
            if not stripped:
                forbidden.whitespace.add(index)
            elif THINK.startswith(stripped) or stripped.startswith(THINK):
                forbidden.at_start.add(index)
            if THINK in text or END_THINK in text:
                forbidden.anywhere.add(index)
        return forbidden

    def read(self, post_id: str, raw: str, output_tokens: int, prompt_tokens: int) -> KeyphrasePrediction:
        """Read the keyphrases of an output; as `GenerationTask.read`."""
        if self.renderer.opens_reasoning:
            raw = _EMPTY_REASONING.sub("", raw)
        answer = self.task.parse(raw)
        return KeyphrasePrediction(
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


class ReasoningGenerationTask(GenerationTask):
    """Asks one of the prompts of a reasoning task.

    Args:
        processor: processor of a vision-language model, or tokenizer of a text model.
        task: a reasoning task; a name is looked up in `REASONING_TASKS`.
        prompt: "label" or "chain", as in `generate_reasoning`.
        modality: as in `generate_keyphrases`.

    Raises:
        ValueError: if `task`, `prompt` or `modality` is unknown.
    """

    def __init__(
        self,
        processor: Processor,
        task: ReasoningTask | str,
        *,
        prompt: PromptKind = "label",
        modality: Modality = "both",
    ):
        renderer = ReasoningRenderer(processor, task, prompt)
        if renderer.opens_reasoning:
            renderer = ReasoningRenderer(processor, task, prompt, END_THINK)
        super().__init__(renderer, modality)
        self.task, self.prompt = renderer.task, prompt

    def read(self, post_id: str, raw: str, output_tokens: int, prompt_tokens: int) -> ReasoningPrediction:
        """Read the prediction of an output; as `GenerationTask.read`."""
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


def prompt_columns(row: Mapping[str, Any], index: int = 0, modality: Modality = "both") -> dict[str, Any]:
    """Return the columns of a post that its prompt may be made of.

    Args:
        row: the post.
        index: position of the post, which becomes its id if it has none.
        modality: "text" removes the images, "image" the text.

    Raises:
        ValueError: naming the post, if it has a `prompt` of its own and `modality` is not "both".

    Example:
        >>> prompt_columns({"id": 7, "text": "my dog", "images": ["dog.jpg"], "keyphrases": ["beagles"]}, modality="text")
        {'id': '7', 'text': 'my dog', 'images': []}
    """
    kept = {column: row[column] for column in _PROMPT_COLUMNS if column in row}
    kept["id"] = str(kept.get("id", index))
    if isinstance(kept.get("text"), str):
        kept["text"] = canonical_text(kept["text"])  # as training posts are loaded
    if modality != "both":
        if kept.get("prompt") is not None:
            raise ValueError(
                f"post {kept['id']!r}: modality={modality!r} needs posts with `text` and `images`; text and images of a "
                "written-out `prompt` cannot be separated"
            )
        if modality == "image":
            kept["text"] = ""
        else:
            kept["images"] = []
    return kept
