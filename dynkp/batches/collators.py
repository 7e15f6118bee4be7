"""Collators: from rows of posts to one padded batch.

[`ChatCollator`] tokenizes and pads what one renderer writes; the collators of the methods are built on it.

Guarantees:

- Prompt and target are tokenized separately, as TRL does, so a target never changes the tokens of its prompt. A renderer's
  `opening` is tokenized as the beginning of a target is.
- Rows are not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch.utils.data import get_worker_info

from dynkp.batches.keyphrase_renderer import KeyphraseRenderer, TargetKind
from dynkp.batches.renderers import ChatRenderer, Processor
from dynkp.batches.targets import SEQUENCE_INPUTS, Targets
from dynkp.batches.typed_batches import PostBatch, PromptInputs
from dynkp.data.tasks import ANSWER, KeyphraseTask


class ChatCollator:
    """Tokenizes and pads what a renderer writes: prompts on the left, targets on the right.

    Args:
        renderer ([`~dynkp.batches.renderers.ChatRenderer`]): what renders the posts.
        answer_weight (`float`, *optional*, defaults to `1.0`): weight of the tokens from `<answer>` on in a target, where the
            tokens before it have weight 1.
        max_length (`int`, *optional*): greatest number of tokens of prompt plus target; `None` for no limit.

    Attributes:
        renderer: the renderer.
    """

    def __init__(self, renderer: ChatRenderer, answer_weight: float = 1.0, max_length: int | None = None):
        self.renderer = renderer
        self.answer_weight = answer_weight
        self.max_length = max_length

    def collate_prompts(self, rows: Sequence[Mapping[str, Any]], images: Sequence[list[Any]]) -> PromptInputs:
        """Render, tokenize and pad the prompts of posts.

        Args:
            rows (`Sequence[Mapping]`): B posts.
            images (`Sequence[list]`): their decoded images, as [`ChatRenderer.images`] opens them.

        Returns:
            `dict`: the processor's output, padded on the left: `input_ids` (B, P), `attention_mask` (B, P), and what the
            model takes for images.
        """
        renderer = self.renderer
        texts = [renderer.prompt(row, len(post_images)) for row, post_images in zip(rows, images, strict=True)]
        kwargs: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        kwargs["add_special_tokens"] = renderer.add_special_tokens
        if renderer.takes_images:
            # Processors want at least one image in the batch, or no `images` at all.
            kwargs["images"] = list(images) if any(images) else None
        prompt = dict(renderer.processor(text=texts, **kwargs))
        return _continued(prompt, renderer.opening_ids) if renderer.opening_ids else prompt

    def collate_targets(self, texts: Sequence[str | None], limits: Sequence[int | None]) -> Targets:
        """Tokenize and pad targets of one kind.

        Args:
            texts (`Sequence[str | None]`): B rendered targets; `None` for a post without one, which gets length 0.
            limits (`Sequence[int | None]`): the greatest length of each in tokens: a longer target is cut at its end;
                `None` for no limit.

        Returns:
            [`~dynkp.batches.targets.Targets`]: padded on the right, (B, T).
        """
        tokenizer = self.renderer.tokenizer
        encoded: list[list[int]] = []
        weights: list[list[float]] = []
        for text, limit in zip(texts, limits, strict=True):
            if text is None:
                encoded.append([])
                weights.append([])
                continue
            answer_start = text.find(ANSWER) if self.answer_weight != 1.0 else -1
            tokens, ends = self.renderer.tokenize_target(text, ends=answer_start >= 0)
            encoded.append(tokens[:limit])
            if answer_start < 0:
                weights.append([1.0] * len(encoded[-1]))
            else:
                weights.append([self.answer_weight if end > answer_start else 1.0 for end in ends[:limit]])
        lengths = [len(tokens) for tokens in encoded]
        width = max(lengths, default=0)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        input_ids = torch.full((len(texts), width), cast(int, pad))
        weight = torch.zeros(len(texts), width)
        for index, (tokens, token_weights) in enumerate(zip(encoded, weights, strict=True)):
            input_ids[index, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            weight[index, : len(tokens)] = torch.tensor(token_weights)
        mask = torch.arange(width) < torch.tensor(lengths, dtype=torch.long)[:, None]
        return Targets(input_ids=input_ids, mask=mask, weights=weight, lengths=lengths)

    def remaining_lengths(self, ids: Sequence[str], prompt_lengths: Sequence[int]) -> list[int | None]:
        """Return how many tokens `max_length` leaves for the target of each post.

        Args:
            ids (`Sequence[str]`): the posts' ids.
            prompt_lengths (`Sequence[int]`): tokens of their prompts, image placeholders included.

        Returns:
            `list[int | None]`: at least 1 each; `None` without `max_length`.

        Raises:
            ValueError: naming the post, if its prompt leaves no token for a target.
        """
        if self.max_length is None:
            return [None] * len(prompt_lengths)
        for post_id, length in zip(ids, prompt_lengths, strict=True):
            if length >= self.max_length:
                raise ValueError(
                    f"post {post_id!r}: its {self.renderer.prompt_name} has {length} tokens, image placeholders included, and "
                    f"`max_length` is {self.max_length}, so nothing is left for its target. Increase `max_length`, set it to "
                    "None, or make the images smaller."
                )
        return [self.max_length - length for length in prompt_lengths]


def _continued(prompt: PromptInputs, ids: Sequence[int]) -> PromptInputs:
    """Put the same tokens of text behind every prompt of a batch."""
    new = dict(prompt)
    for name in SEQUENCE_INPUTS:
        if name not in prompt:
            continue
        column = prompt[name][:, -1:]
        if name == "input_ids":
            more = torch.tensor(ids, dtype=column.dtype).expand(len(column), -1)
        elif name == "cross_attention_mask":
            more = torch.cat([column] * len(ids), dim=1)  # sees the images that the prompt's last token sees
        else:
            more = torch.full((len(column), len(ids)), int(name == "attention_mask"), dtype=column.dtype)
        new[name] = torch.cat([prompt[name], more], dim=1)
    return new


class PairedTargetCollator(ChatCollator):
    """Collates posts into prompts and paired targets: each post's direct target and its reasoning target.

    Args:
        processor (`Processor` or [`~dynkp.batches.keyphrase_renderer.KeyphraseRenderer`]): processor of a vision-language
            model or tokenizer of a text model, from which a renderer for `task` is built; or that renderer itself.
        task ([`~dynkp.data.tasks.KeyphraseTask`] or `str`, *optional*): instruction, targets and separator; by default
            `"dynamic_cot"`, or the task of the given renderer.
        kinds (`Sequence[str]`, *optional*, defaults to `("direct", "reasoning")`): the kinds of targets to build; in the
            other kind, every post's target has length 0.
        answer_weight (`float`, *optional*, defaults to `1.0`): weight of the tokens from `<answer>` on in a reasoning
            target, where those of the reasoning have weight 1; 1.0 is the paper's mean over tokens.
        max_length (`int`, *optional*): greatest number of tokens of prompt plus target: longer targets are cut at their end,
            and a prompt that leaves no token for its target is an error.
        trailing_template_tokens (`bool`, *optional*, defaults to `True`): as for
            [`~dynkp.batches.renderers.ChatRenderer`], unless a renderer is given.

    Returns (when called with a list of rows):
        [`~dynkp.batches.typed_batches.PostBatch`]: a `dict` with
        - `prompt`: the processor's output for the prompts, padded on the left (`input_ids` (B, P), pixels, ...);
        - `direct`, `reasoning`: the [`~dynkp.batches.targets.Targets`] of that kind, padded on the right, (B, T);
        - `has_rationale`: (B,), bool: whether the post has a reasoning target;
        - `id`: the B ids.

    Raises:
        ValueError: if `task` is given together with a renderer; naming the post, if a row cannot be rendered or leaves no
            token for its target.

    Example:
        >>> from dynkp.synthetic.tiny_model import build_tiny_vlm
        >>> model, processor = build_tiny_vlm(["goal", "mufc", "Which keyphrases would the author tag this post with?"])
        >>> batch = PairedTargetCollator(processor)([{"id": "1", "text": "goal", "keyphrases": ["mufc"], "images": []}])
        >>> batch["direct"]["lengths"], batch["has_rationale"]
        ([2], tensor([False]))
    """

    renderer: KeyphraseRenderer

    def __init__(
        self,
        processor: Processor | KeyphraseRenderer,
        task: KeyphraseTask | str | None = None,
        kinds: Sequence[TargetKind] = ("direct", "reasoning"),
        answer_weight: float = 1.0,
        max_length: int | None = None,
        trailing_template_tokens: bool = True,
    ):
        if isinstance(processor, KeyphraseRenderer):
            if task is not None:
                raise ValueError(f"`task` is {task!r}, but the given renderer has a task of its own; leave `task` out.")
            renderer = processor
        else:
            name = "dynamic_cot" if task is None else task
            renderer = KeyphraseRenderer(processor, name, trailing_template_tokens=trailing_template_tokens)
        super().__init__(renderer, answer_weight, max_length)
        self.kinds = tuple(kinds)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> PostBatch:
        """Collate rows of posts, decoding their images."""
        return self.collate(rows, [self.renderer.images(row) for row in rows])

    def collate(self, rows: Sequence[Mapping[str, Any]], images: Sequence[list[Any]]) -> PostBatch:
        """Collate rows of posts whose images are decoded already.

        Args:
            rows (`Sequence[Mapping]`): B posts.
            images (`Sequence[list]`): their images, as [`ChatRenderer.images`] opens them.
        """
        prompt = self.collate_prompts(rows, images)
        ids = [str(row.get("id", index)) for index, row in enumerate(rows)]
        limits = self.remaining_lengths(ids, prompt["attention_mask"].sum(dim=1).tolist())
        counts = [len(post_images) for post_images in images]
        direct, reasoning = (self._target_texts(rows, counts, kind) for kind in ("direct", "reasoning"))
        return PostBatch(
            prompt=prompt,
            direct=self.collate_targets(direct, limits),
            reasoning=self.collate_targets(reasoning, limits),
            has_rationale=torch.tensor([text is not None for text in reasoning]),
            id=ids,
        )

    def _target_texts(self, rows: Sequence[Mapping[str, Any]], counts: Sequence[int], kind: TargetKind) -> list[str | None]:
        """Render the targets of one kind; all are `None` for a kind that is not built."""
        if kind not in self.kinds:
            return [None] * len(rows)
        return [self.renderer.target(row, count, kind) for row, count in zip(rows, counts, strict=True)]


class SkippingCollator:
    """Returns empty batches for the part of a stream that a resumed run was trained on, without decoding its images.

    A dataset that is not a stream is skipped by its sampler and does not need this.

    Args:
        collator (`Callable`): collates the other batches.

    Example:
        >>> collator = SkippingCollator(len)
        >>> collator.skip_first(1)
        >>> collator(["first post"]), collator(["second post", "third post"])
        ({}, 2)
    """

    def __init__(self, collator: Callable[[Any], Any]):
        self.collator = collator
        self.skip_first(0)

    def skip_first(self, batches: int) -> None:
        """Return empty batches for the first batches of the pass that begins now.

        Args:
            batches (`int`): number of batches to skip, whichever worker of the data loader collates them.
        """
        self._batches, self._calls = batches, 0

    def __call__(self, rows: Any) -> Any:
        """Collate rows, or return an empty `dict` for a batch to be skipped."""
        worker, batch = get_worker_info(), self._calls
        if worker is not None:  # workers take turns; those beyond the stream's number of shards have nothing to read
            batch = batch * min(worker.num_workers, getattr(worker.dataset, "num_shards", worker.num_workers)) + worker.id
        # A worker whose part of the stream has ended is passed over, so this number may be too high, but never too low.
        self._calls += 1
        return {} if batch < self._batches else self.collator(rows)
