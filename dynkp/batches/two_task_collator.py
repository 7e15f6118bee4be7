"""The collator of MulCoT-RD: from rows of posts to one batch of two tasks, the label and the response chain.

Guarantees:

- Both prompts are tokenized separately, each as the model is asked at prediction, and only then compared: what they share
  is equal tokens, and all images are in the shared part.
- Rows are not changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch

from dynkp.batches.branches import Branches
from dynkp.batches.collators import ChatCollator
from dynkp.batches.reasoning_renderer import PromptKind, ReasoningRenderer
from dynkp.batches.renderers import Processor
from dynkp.batches.targets import Targets
from dynkp.batches.typed_batches import PromptInputs, TwoTaskBatch
from dynkp.data.reasoning_tasks import ReasoningTask


class TwoTaskCollator:
    """Collates posts into the prompts and targets of MulCoT-RD's two tasks.

    Args:
        processor ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]): processor of a
            vision-language model, or tokenizer of a text model.
        task ([`~dynkp.data.reasoning_tasks.ReasoningTask`] or `str`): prompts, targets and labels; a name is looked up in
            [`~dynkp.data.reasoning_tasks.REASONING_TASKS`].
        max_length (`int`, *optional*): greatest number of tokens of prompt plus target: longer targets are cut at their end,
            and a prompt that leaves no token for its target is an error.

    Returns (when called with a list of rows):
        [`~dynkp.batches.typed_batches.TwoTaskBatch`]: a `dict` with
        - `prompts`: the [`~dynkp.batches.branches.Branches`] `"label"` and `"chain"` (the response chain);
        - `label`, `chain`: the [`~dynkp.batches.targets.Targets`] of that task, padded on the right, (B, T);
        - `has_rationale`: (B,), bool: whether the post has a response-chain target;
        - `id`: the B ids.

    Raises:
        ValueError: naming the post, if it has no answer or leaves no token for its target.

    Example:
        >>> from dynkp.synthetic.tiny_model import build_tiny_vlm
        >>> model, processor = build_tiny_vlm(["goal", "Prediction positive"])
        >>> batch = TwoTaskCollator(processor, "msc")([{"id": "1", "text": "goal", "images": [], "label": "positive"}])
        >>> batch["chain"]["lengths"], batch["prompts"]["shared"] > 0
        ([0], True)
    """

    def __init__(self, processor: Processor, task: ReasoningTask | str, max_length: int | None = None):
        # The label comes first: its prompts are the whole prompts of a batch, since every post has a label.
        kinds: tuple[PromptKind, ...] = ("label", "chain")
        self.renderers = {kind: ReasoningRenderer(processor, task, kind) for kind in kinds}
        self.max_length = max_length
        self._collators = {kind: ChatCollator(self.renderers[kind], max_length=max_length) for kind in kinds}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> TwoTaskBatch:
        """Collate rows of posts, decoding their images."""
        images = [self.renderers["label"].images(row) for row in rows]
        ids = [str(row.get("id", index)) for index, row in enumerate(rows)]
        branches = self.collate_branches(rows, images)
        label, chain = (self._collate_targets(kind, branches, rows, images, ids) for kind in self.renderers)
        has_rationale = torch.tensor(chain["lengths"]) > 0
        return TwoTaskBatch(prompts=branches, label=label, chain=chain, has_rationale=has_rationale, id=ids)

    def collate_branches(self, rows: Sequence[Mapping[str, Any]], images: Sequence[list[Any]]) -> Branches:
        """Collate the prompts of both tasks.

        Args:
            rows (`Sequence[Mapping]`): B posts.
            images (`Sequence[list]`): their images, decoded.

        Returns:
            [`~dynkp.batches.branches.Branches`]: the label prompts whole, and the response-chain prompts from the first
            column on in which any of them differs; or both whole, where they cannot share their beginning.
        """
        prompt = self._collators["label"].collate_prompts(rows, images)
        tokens = {
            kind: [self._tokens(renderer.prompt(row, len(own))) for row, own in zip(rows, images, strict=True)]
            for kind, renderer in self.renderers.items()
        }
        behind = max(len(label) - _common_prefix(label, chain) for label, chain in zip(*tokens.values(), strict=True))
        if not self._can_share(prompt, tokens["label"], behind):
            separate = {"label": prompt, "chain": self._collators["chain"].collate_prompts(rows, images)}
            return Branches(prompt=prompt, shared=0, ends={}, separate=separate)
        ends = {
            kind: [own[len(label) - behind :] for label, own in zip(tokens["label"], tokens[kind], strict=True)]
            for kind in tokens
        }
        shared = prompt["input_ids"].shape[1] - behind
        padded: dict[str, dict[str, torch.Tensor]] = {kind: self._padded(rest) for kind, rest in ends.items()}
        return Branches(prompt=prompt, shared=shared, ends=padded, separate={})

    def _collate_targets(
        self,
        kind: PromptKind,
        branches: Branches,
        rows: Sequence[Mapping[str, Any]],
        images: Sequence[list[Any]],
        ids: Sequence[str],
    ) -> Targets:
        renderer, collator = self.renderers[kind], self._collators[kind]
        texts = [renderer.target(row, len(own)) for row, own in zip(rows, images, strict=True)]
        return collator.collate_targets(texts, collator.remaining_lengths(ids, _prompt_lengths(branches, kind)))

    def _can_share(self, prompt: PromptInputs, tokens: Sequence[list[int]], behind: int) -> bool:
        """Whether the last `behind` columns are the tokenizer's tokens of the prompts' ends, and every prompt is longer."""
        columns = prompt["input_ids"][:, -behind:].tolist()
        # The processor has put the image tokens into the prompt: all of them must be in front of its end.
        return all(
            behind < len(row) and column == row[-behind:] and not self._image_ids.intersection(column)
            for column, row in zip(columns, tokens, strict=True)
        )

    @property
    def _image_ids(self) -> set[int]:
        return {index for index in (getattr(self.renderers["label"].processor, "image_token_id", None),) if index is not None}

    def _tokens(self, text: str) -> list[int]:
        # Without the BOS token, if the tokenizer must add it: only the ends of prompts are compared.
        return self.renderers["label"].tokenizer(text, add_special_tokens=False)["input_ids"]

    def _padded(self, rows: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        tokenizer = self.renderers["label"].tokenizer
        padded = tokenizer.pad({"input_ids": list(rows)}, padding=True, padding_side="left", return_tensors="pt")
        return {key: padded[key] for key in ("input_ids", "attention_mask")}


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of tokens that both sequences begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _prompt_lengths(branches: Branches, kind: str) -> list[int]:
    """Return the number of tokens of each post's prompt of one kind."""
    if kind in branches["separate"]:
        return branches["separate"][kind]["attention_mask"].sum(dim=1).tolist()
    beginning = branches["prompt"]["attention_mask"][:, : branches["shared"]]
    return (beginning.sum(dim=1) + branches["ends"][kind]["attention_mask"].sum(dim=1)).tolist()
