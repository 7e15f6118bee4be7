"""From post rows to one batch of two tasks: the chain of reasons and the label, each with its prompt and its target.

Given   rows of a reasoning task: `id`, `text`, `images`, by the task `aspect`, `label`, `keyphrases`, `rationale`.
Gives   a dictionary that [`~dynkp.mechanics.branched_prompt.SharedBranches`] and the trainer take apart.
Holds   both prompts are tokenized apart, each as the model is asked at prediction, and only then compared: what is shared
        are equal tokens, and every picture lies in what is shared. Rows are not changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from dynkp.batches.branches import Branches
from dynkp.batches.collators import PairedTargetCollator
from dynkp.batches.reasoning_renderer import PromptKind, ReasoningRenderer
from dynkp.data.reasoning_tasks import ReasoningTask


class TwoTaskCollator:
    """Collates posts into the prompts and targets of both tasks.

    Args:
        processor: processor of a vision-language model, or tokenizer of a text model.
        task ([`ReasoningTask`] or `str`): prompts, targets and labels; a name is looked up in `REASONING_TASKS`.
        max_length (`int`, *optional*): longest prompt plus target in tokens; targets are cut at their end, a prompt that
            leaves no room for its target is an error.

    Returns (when called with a list of rows):
        `dict` with
        - `prompts`: [`Branches`] "label" and "chain";
        - `label`, `chain`: [`Targets`] of that task, right-padded, (B, T); a post without rationale has no chain;
        - `has_rationale`: (B,), bool: the post has a chain;
        - `id`: the B ids.

    Raises:
        ValueError: naming the post, if a row has no answer or leaves no room for its target.

    Example:

    ```python
    >>> batch = TwoTaskCollator(processor, "msc")([{"id": "1", "text": "goal!", "images": [], "label": "positive"}])
    >>> batch["chain"]["lengths"], batch["prompts"]["shared"] > 0
    ([0], True)
    ```
    """

    def __init__(
        self,
        processor: ProcessorMixin | PreTrainedTokenizerBase,
        task: ReasoningTask | str,
        max_length: int | None = None,
    ):
        # The label's first: its prompts are a batch's whole ones, since every post has a label.
        kinds: tuple[PromptKind, ...] = ("label", "chain")
        self.renderers = {kind: ReasoningRenderer(processor, task, kind) for kind in kinds}
        self.max_length = max_length
        # Pads and tokenizes; it knows nothing of tasks.
        self._collators = {kind: PairedTargetCollator(processor) for kind in self.renderers}
        for kind, collator in self._collators.items():
            collator.renderer = self.renderers[kind]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        images = [self.renderers["label"].images(row) for row in rows]
        ids = [str(row.get("id", index)) for index, row in enumerate(rows)]
        branches = self.collate_branches(rows, images)
        batch: dict[str, Any] = {"prompts": branches}
        for kind, renderer in self.renderers.items():
            texts = [renderer.target(row, len(pictures)) for row, pictures in zip(rows, images, strict=True)]
            rooms = [self._room(post_id, kind, length) for post_id, length in zip(ids, _lengths(branches, kind), strict=True)]
            batch[kind] = self._collators[kind].collate_targets(texts, rooms)
        batch["has_rationale"] = torch.tensor(batch["chain"]["lengths"]) > 0
        batch["id"] = ids
        return batch

    def collate_branches(self, rows: Sequence[Mapping[str, Any]], images: Sequence[list[Any]]) -> Branches:
        """The prompts of both tasks: the label's whole, the chain's from where one of the batch begins to differ."""
        prompt = self._collators["label"].collate_prompts(rows, images)
        tokens = {
            kind: [self._tokens(renderer.prompt(row, len(pictures))) for row, pictures in zip(rows, images, strict=True)]
            for kind, renderer in self.renderers.items()
        }
        behind = max(len(label) - _common(label, chain) for label, chain in zip(*tokens.values(), strict=True))
        if not self._can_share(prompt, tokens["label"], behind):
            separate = {"label": prompt, "chain": self._collators["chain"].collate_prompts(rows, images)}
            return Branches(prompt=prompt, shared=0, ends={}, separate=separate)
        ends = {
            kind: [chosen[len(label) - behind :] for label, chosen in zip(tokens["label"], tokens[kind], strict=True)]
            for kind in tokens
        }
        shared = prompt["input_ids"].shape[1] - behind
        return Branches(
            prompt=prompt, shared=shared, ends={kind: self._padded(rest) for kind, rest in ends.items()}, separate={}
        )

    def _can_share(self, prompt: Mapping[str, Any], tokens: Sequence[list[int]], behind: int) -> bool:
        """Whether the last `behind` columns are what the tokenizer made of the prompts' ends, and text stands before them."""
        columns = prompt["input_ids"][:, -behind:].tolist()
        # The processor has put the pictures' tokens into the prompt: they must all be in front of its end.
        return all(
            behind < len(row) and column == row[-behind:] and not self._picture_ids.intersection(column)
            for column, row in zip(columns, tokens, strict=True)
        )

    @property
    def _picture_ids(self) -> set[int]:
        return {index for index in (getattr(self.renderers["label"].processor, "image_token_id", None),) if index is not None}

    def _tokens(self, text: str) -> list[int]:
        # The template has written the BOS token already.
        return self.renderers["label"].tokenizer(text, add_special_tokens=False)["input_ids"]

    def _padded(self, rows: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        tokenizer = self.renderers["label"].tokenizer
        padded = tokenizer.pad({"input_ids": list(rows)}, padding=True, padding_side="left", return_tensors="pt")
        return {key: padded[key] for key in ("input_ids", "attention_mask")}

    def _room(self, post_id: str, kind: str, prompt_length: int) -> int | None:
        if self.max_length is None:
            return None
        if prompt_length >= self.max_length:
            raise ValueError(
                f"post {post_id!r}: its {kind} prompt has {prompt_length} tokens, image placeholders included, and "
                f"`max_length` is {self.max_length}, so nothing is left for its target. Increase `max_length`, set it to None, "
                "or make the pictures smaller."
            )
        return self.max_length - prompt_length


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _lengths(branches: Branches, kind: str) -> list[int]:
    """Tokens of each post's prompt of one kind."""
    if kind in branches["separate"]:
        return branches["separate"][kind]["attention_mask"].sum(dim=1).tolist()
    beginning = branches["prompt"]["attention_mask"][:, : branches["shared"]]
    return (beginning.sum(dim=1) + branches["ends"][kind]["attention_mask"].sum(dim=1)).tolist()
