"""From post rows to one padded batch: the prompts, and for each post its direct and its reasoning target.

Given   rows of posts, or of TRL's conversational prompt-completion format with an optional `reasoning_completion`.
Gives   a dictionary the shared prompt and the trainers take apart; rows are not changed.
Holds   prompt and target are tokenized apart, as TRL does, so that a target never changes its prompt's tokens;
        text that looks like one of the tokenizer's control tokens stays text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from dynkp.data.images import open_image
from dynkp.data.prompts import TAGS, KeyphraseTask, resolve_task
from dynkp.mechanics.shared_prompt import Targets


class PromptRenderer:
    """The strings a post becomes: its prompt and its targets, in the model's own chat format.

    Training and generation both render here, so that a model is asked exactly as it was taught.

    Args:
        processor: processor of a vision-language model, or tokenizer of a text model (pictures are then left out).
        task ([`KeyphraseTask`] or `str`): template, targets and separator; a name is looked up in `TASKS`.
    """

    def __init__(self, processor: ProcessorMixin | PreTrainedTokenizerBase, task: KeyphraseTask | str = "dynamic_cot"):
        self.processor = processor
        self.task = resolve_task(task)
        self.tokenizer: PreTrainedTokenizerBase = getattr(processor, "tokenizer", processor)
        self.takes_images = isinstance(processor, ProcessorMixin)
        if self.processor.chat_template is None:
            raise ValueError(
                f"`processing_class` ({type(processor).__name__}) has no chat template, so posts cannot be rendered as its "
                "model expects. Set `processing_class.chat_template`, or `chat_template_path` in the config."
            )

    def images(self, row: Mapping[str, Any]) -> list[Any]:
        """The post's pictures as RGB PIL images; none for a text model."""
        if not self.takes_images:
            return []
        images = row.get("images")
        if images is None:
            images = [] if row.get("image") is None else [row["image"]]
        return [open_image(image, post_id=str(row.get("id", "?"))) for image in images]

    def prompt_messages(self, row: Mapping[str, Any], num_images: int) -> list[dict[str, Any]]:
        """The chat messages in front of the answer."""
        if row.get("prompt") is None:
            messages = self.task.prompt(self._as_text(row.get("text") or ""), num_images)
        elif isinstance(row["prompt"], str):
            raise ValueError(
                f"post {row.get('id', '?')!r}: `prompt` is a string. Give TRL's conversational format (a list of messages), "
                "or the columns `text`, `keyphrases` and `images`."
            )
        else:
            messages = _conversation(row, num_images if self.takes_images else None)
        return messages if self.takes_images else [text_only(message) for message in messages]

    def prompt(self, row: Mapping[str, Any], num_images: int) -> str:
        """The rendered prompt, up to where the model begins to answer."""
        return self._render(self.prompt_messages(row, num_images), add_generation_prompt=True)

    def direct_target(self, row: Mapping[str, Any], num_images: int) -> str:
        """The bare answer y^s, end of turn included."""
        if row.get("completion") is not None:
            content = _content(row["completion"], row, "completion")
        else:
            content = self._as_text(self.task.direct_target(list(row["keyphrases"])))
        return self._target(row, num_images, content)

    def reasoning_target(self, row: Mapping[str, Any], num_images: int) -> str | None:
        """The reasoning and the answer y^c, end of turn included; `None` for a post without rationale."""
        if row.get("prompt") is not None:
            if row.get("reasoning_completion") is None:
                return None
            content = _content(row["reasoning_completion"], row, "reasoning_completion")
        elif (row.get("rationale") or "").strip():
            content = self._as_text(self.task.reasoning_target(list(row["keyphrases"]), row["rationale"]))
        else:
            return None
        return self._target(row, num_images, content)

    def _target(self, row: Mapping[str, Any], num_images: int, content: str) -> str:
        messages = self.prompt_messages(row, num_images)
        prompt = self._render(messages, add_generation_prompt=True)
        reply: Any = [{"type": "text", "text": content}] if self.takes_images else content
        full = self._render([*messages, {"role": "assistant", "content": reply}], add_generation_prompt=False)
        target = full.removeprefix(prompt)
        # Some templates (Qwen3's) take an answer with <think> apart and set it anew, put an empty <think></think> before
        # one without, or do not continue their own generation prompt. What is taught must be what the parser reads: the
        # content as it is, then the end of turn.
        if not full.startswith(prompt) or not target.lstrip().startswith(content.strip()):
            target = content + self.end_of_turn
        elif not self._ends_turn(target):
            target += self.tokenizer.eos_token
        return target

    @cached_property
    def end_of_turn(self) -> str:
        """What the template puts behind an answer; the EOS token where it puts nothing (LLaVA-1.5)."""
        marker = "keyphrase goes here"
        reply: Any = [{"type": "text", "text": marker}] if self.takes_images else marker
        question: Any = [{"type": "text", "text": "?"}] if self.takes_images else "?"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        end = self._render(turns, add_generation_prompt=False).rpartition(marker)[2]
        return end if self._ends_turn(end) else end + self.tokenizer.eos_token

    def _ends_turn(self, target: str) -> bool:
        last = re.search(r"(\S+)\s*\Z", target)
        return last is not None and any(last[1].endswith(token) for token in self._control_tokens)

    @cached_property
    def _control_tokens(self) -> list[str]:
        tokens = {str(token) for token in self.tokenizer.all_special_tokens}
        tokens |= {str(token.content) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        for name in ("image_token", "video_token", "boi_token", "eoi_token"):
            if isinstance(token := getattr(self.processor, name, None), str):
                tokens.add(token)
        # A vocabulary may hold <think> and </answer> as special tokens; in a target they are what is taught.
        return sorted(tokens - {"", *TAGS}, key=len, reverse=True)

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(token) for token in self._control_tokens) or r"(?!)")

    def _as_text(self, text: str) -> str:
        """Posts and rationales come from strangers: a control token spelled out in one is broken by a blank."""
        return self._control_pattern.sub(lambda match: f"{match[0][:1]} {match[0][1:]}", text)

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        return cast(
            str,
            self.processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False),
        )


class PairedTargetCollator:
    """Collates posts into prompts and paired targets.

    Args:
        processor: processor of a vision-language model, or tokenizer of a text model.
        task ([`KeyphraseTask`] or `str`, *optional*, defaults to `"dynamic_cot"`): template, targets and separator.
        kinds (`Sequence[str]`, *optional*): target kinds to build, of `"direct"` and `"reasoning"`; in one
            that is left out, every post's target has length 0.
        answer_weight (`float`, *optional*, defaults to `1.0`): weight of the tokens from `<answer>` on in a reasoning
            target, against 1 for those of the thinking; 1.0 is the paper's mean over tokens.
        max_length (`int`, *optional*): longest prompt plus target in tokens; targets are cut at their end, a prompt that
            leaves no room for its target is an error.

    Returns (when called with a list of rows):
        `dict` with
        - `prompt`: the processor's output for the prompts, left-padded (`input_ids` (B, P), pixels, ...);
        - `direct`, `reasoning`: [`Targets`] of that kind, right-padded, (B, T);
        - `has_rationale`: (B,), bool: the post has a reasoning target;
        - `id`: the B ids.

    Raises:
        ValueError: naming the post, if a row cannot be rendered or leaves no room for its target.

    Example:

    ```python
    >>> batch = PairedTargetCollator(processor)([{"id": "1", "text": "goal!", "keyphrases": ["mufc"], "images": []}])
    >>> batch["direct"]["lengths"], batch["has_rationale"]
    ([3], tensor([False]))
    ```
    """

    def __init__(
        self,
        processor: ProcessorMixin | PreTrainedTokenizerBase,
        task: KeyphraseTask | str = "dynamic_cot",
        kinds: Sequence[str] = ("direct", "reasoning"),
        answer_weight: float = 1.0,
        max_length: int | None = None,
    ):
        self.renderer = PromptRenderer(processor, task)
        self.kinds = tuple(kinds)
        self.answer_weight = answer_weight
        self.max_length = max_length

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return self.collate(rows, [self.renderer.images(row) for row in rows])

    def collate(self, rows: Sequence[Mapping[str, Any]], images: Sequence[list[Any]]) -> dict[str, Any]:
        """The batch of rows whose pictures are decoded."""
        prompt = self.collate_prompts(rows, images)
        prompt_lengths = prompt["attention_mask"].sum(dim=1).tolist()
        ids = [str(row.get("id", index)) for index, row in enumerate(rows)]
        batch: dict[str, Any] = {"prompt": prompt}
        rooms = [None if self.max_length is None else self.max_length - length for length in prompt_lengths]
        for post_id, length, room in zip(ids, prompt_lengths, rooms, strict=True):
            if room is not None and room < 1:
                raise ValueError(
                    f"post {post_id!r}: its prompt has {length} tokens, image placeholders included, and `max_length` is "
                    f"{self.max_length}, so nothing is left for its target. Increase `max_length`, set it to None, or make "
                    "the pictures smaller."
                )
        counts = [len(post_images) for post_images in images]
        none: list[str | None] = [None] * len(rows)
        pairs = list(zip(rows, counts, strict=True))
        direct = [self.renderer.direct_target(row, count) for row, count in pairs] if "direct" in self.kinds else none
        reasoning = [self.renderer.reasoning_target(row, count) for row, count in pairs] if "reasoning" in self.kinds else none
        batch["direct"] = self.collate_targets(direct, rooms)
        batch["reasoning"] = self.collate_targets(reasoning, rooms)
        batch["has_rationale"] = torch.tensor([text is not None for text in reasoning])
        batch["id"] = ids
        return batch

    def collate_prompts(self, rows: Sequence[Mapping[str, Any]], images: Sequence[list[Any]]) -> dict[str, Any]:
        """The processor's output for the prompts, left-padded; `images` are the rows' decoded pictures."""
        renderer = self.renderer
        texts = [renderer.prompt(row, len(pictures)) for row, pictures in zip(rows, images, strict=True)]
        kwargs: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        # The template has written the BOS token already.
        kwargs["add_special_tokens"] = False
        if renderer.takes_images:
            # Processors want at least one picture in the batch, or none mentioned.
            kwargs["images"] = list(images) if any(images) else None
        return dict(renderer.processor(text=texts, **kwargs))

    def collate_targets(self, texts: Sequence[str | None], rooms: Sequence[int | None]) -> Targets:
        """Tokenize and right-pad the targets of one kind; `None` is a post without such a target."""
        tokenizer = self.renderer.tokenizer
        encoded: list[list[int]] = []
        weights: list[list[float]] = []
        for text, room in zip(texts, rooms, strict=True):
            if text is None:
                encoded.append([])
                weights.append([])
                continue
            output = tokenizer(text, add_special_tokens=False, return_offsets_mapping=self.answer_weight != 1.0)
            tokens = output["input_ids"][:room]
            encoded.append(tokens)
            answer_start = text.find("<answer>")
            if self.answer_weight == 1.0 or answer_start < 0:
                weights.append([1.0] * len(tokens))
            else:
                ends = [end for _, end in output["offset_mapping"][:room]]
                weights.append([self.answer_weight if end > answer_start else 1.0 for end in ends])
        lengths = [len(tokens) for tokens in encoded]
        width = max(lengths, default=0)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        input_ids = torch.full((len(texts), width), cast(int, pad))
        weight = torch.zeros(len(texts), width)
        for row, (tokens, token_weights) in enumerate(zip(encoded, weights, strict=True)):
            input_ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            weight[row, : len(tokens)] = torch.tensor(token_weights)
        mask = torch.arange(width) < torch.tensor(lengths, dtype=torch.long)[:, None]
        return Targets(input_ids=input_ids, mask=mask, weights=weight, lengths=lengths)


class SkippingCollator:
    """Spares a resumed run the work for batches of a stream that it has trained on: it reads their rows and no pictures.

    A dataset that is no stream is skipped at its sampler and needs none of this.

    Args:
        collator: what makes the other batches.

    Example: after `skip_first(2)` the first two batches are empty, whichever worker collates them.
    """

    def __init__(self, collator: Callable[[Any], Any]):
        self.collator = collator
        self.skip_first(0)

    def skip_first(self, batches: int) -> None:
        """Leave the first batches of the pass that begins now empty."""
        self._batches, self._calls = batches, 0

    def __call__(self, rows: Any) -> Any:
        worker, batch = get_worker_info(), self._calls
        if worker is not None:  # they take turns; those beyond the stream's number of shards have nothing to read
            batch = batch * min(worker.num_workers, getattr(worker.dataset, "num_shards", worker.num_workers)) + worker.id
        # A worker whose part of the stream has ended is passed over, so this may be ahead of the truth, never behind.
        self._calls += 1
        return {} if batch < self._batches else self.collator(rows)


def _conversation(row: Mapping[str, Any], num_images: int | None) -> list[dict[str, Any]]:
    """A copy of TRL's `prompt`, its placeholders matched with the post's pictures (`None`: a text model's, unmatched)."""
    messages = [dict(message) for message in row["prompt"]]
    problem = None
    if not messages or not all(message.get("role") and "content" in message for message in messages):
        problem = "it must be a list of messages with `role` and `content`"
    elif num_images is not None:
        try:
            return prepare_multimodal_messages(messages, images=[None] * num_images)
        except ValueError as error:
            problem = str(error)
    if problem is not None:
        raise ValueError(f"post {row.get('id', '?')!r}: `prompt` cannot be rendered: {problem}")
    return messages


def text_only(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message as a text model's template takes it: a string, pictures left out."""
    content = message["content"]
    if not isinstance(content, str):
        content = "\n".join(part["text"] for part in content if part.get("type") == "text")
    return {**message, "content": content}


def _content(messages: Any, row: Mapping[str, Any], column: str) -> str:
    """The text of a completion: one assistant message."""
    if isinstance(messages, str):
        return messages
    if len(messages) != 1 or messages[0].get("role") != "assistant":
        raise ValueError(
            f"post {row.get('id', '?')!r}: `{column}` has {len(messages)} messages; it must be exactly one assistant message."
        )
    return text_only(messages[0])["content"]
