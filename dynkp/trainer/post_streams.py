"""How posts reach a trainer: streams that a resumed run skips, and posts that only fill up an epoch's last batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from datasets import IterableDataset
from transformers import Trainer

from dynkp.batches.collators import SkippingCollator


class PostStreams(Trainer):
    """The part of a trainer that skips the posts of completed steps, and marks those that are in a batch a second time."""

    train_dataset: Any
    data_collator: Any
    _skipping_collator: SkippingCollator | None = None

    def get_train_dataloader(self) -> Any:
        """Return the data loader of the training posts; that of a stream can skip their collation."""
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        stock = self.data_collator
        self._skipping_collator = self.data_collator = SkippingCollator(stock)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = stock

    def skip_stream(self, steps: int) -> None:
        """Do not collate a stream's posts of the next optimizer steps.

        A resumed run reads a stream again from its beginning and discards the batches of completed steps; this saves decoding
        and processing their images.

        Args:
            steps (`int`): number of completed optimizer steps.
        """
        if self._skipping_collator is not None and not self.args.ignore_data_skip:
            self._skipping_collator.skip_first(steps * self.args.gradient_accumulation_steps)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Return the micro-batches of an optimizer step, with repeated posts marked.

        Args:
            epoch_iterator (`Iterator`): the epoch's batches.
            num_batches (`int`): number of micro-batches in an optimizer step.
            device (`torch.device`): the training device.
        """
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._skipping_collator is not None:
            self._skipping_collator.skip_first(0)  # the next pass over the stream is read completely
        if batches:
            self.mark_repeated_posts(batches[-1])
        return batches, items

    def mark_repeated_posts(self, batch: dict[str, Any]) -> None:
        """Mark the posts of an epoch's last batch that accelerate took from its first, so that all ranks have equally many.

        They are behind the others, the ranks' batches one after the other. The length of a stream is not known: there, repeated
        posts count like any others.

        Args:
            batch (`dict`): the batch that the data loader returned last; gets `repeated`, (B,) bool, if it has such posts.
        """
        progress = self.accelerator.gradient_state
        if not progress.end_of_dataloader or progress.remainder <= 0:
            return
        places = torch.arange(len(batch["id"])) + self.accelerator.process_index * len(batch["id"])
        repeated = places >= progress.remainder
        batch["repeated"] = repeated.to(batch["has_rationale"].device)


def repeated_posts(batch: Mapping[str, Any]) -> torch.Tensor:
    """Return which posts were counted in this epoch before and only fill up its last batch.

    Args:
        batch (`Mapping`): a batch of B posts.

    Returns:
        `torch.Tensor` of shape `(B,)`: bool.

    Example:
        >>> repeated_posts({"has_rationale": torch.tensor([True, False])})
        tensor([False, False])
    """
    repeated = batch.get("repeated")
    return torch.zeros_like(batch["has_rationale"]) if repeated is None else repeated
