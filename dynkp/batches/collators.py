"""From post rows to one padded batch: the prompts, and for each post its direct and its reasoning target.

Given   rows of posts, or of TRL's conversational prompt-completion format with an optional `reasoning_completion`.
Gives   a dictionary the shared prompt and the trainers take apart; rows are not changed.
Holds   prompt and target are tokenized apart, as TRL does, so that a target never changes its prompt's tokens;
        text that looks like one of the tokenizer's control tokens stays text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from dynkp.batches.renderers import PromptRenderer
from dynkp.batches.targets import Targets
from dynkp.data.tasks import KeyphraseTask


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
