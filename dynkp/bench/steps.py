"""The steps that the suites time: a trainer's own training step, and the references it is compared with.

A step clears the gradients, computes a batch's loss and its gradients, and returns the loss; the optimizer's step, which is
the same for all, is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dynkp.batches.targets import Targets, mixed_targets
from dynkp.batches.typed_batches import PostBatch
from dynkp.objectives.switching import below_threshold
from dynkp.objectives.token_loss import PostLosses
from dynkp.trainer.dynamic_cot_trainer import DynamicCoTTrainer


def train(trainer: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Run a trainer's training step on a batch of its collator.

    Args:
        trainer: A trainer of this package.
        batch: What `trainer.data_collator` returns; it is not changed.

    Returns:
        The loss, a scalar without graph, in nats.
    """
    trainer.model.zero_grad()
    [inputs], denominator = trainer.get_batch_samples(iter([dict(batch)]), 1, trainer.args.device)
    loss = trainer.training_step(trainer.model, inputs, denominator)
    trainer.end_of_step()
    return loss


def train_masked(trainer: Any, batch: dict[str, Any], stride: int) -> torch.Tensor:
    """Run AimKP's training step behind its warm-up, every post masked with the same stride.

    Args:
        trainer: An `AimKPTrainer`.
        batch: A batch of its collator, of posts it is trained on.
        stride: The stride of both modalities, at least 2.

    Returns:
        As [`train`].
    """
    trainer.args.initial_stride = stride
    trainer.begin_training()  # with a new schedule of strides
    trainer.state.epoch = trainer.args.warmup_epochs + 0.5
    return train(trainer, batch)


def fine_tune(model: nn.Module, prompt: dict[str, Any], targets: Targets, share: float = 1.0) -> torch.Tensor:
    """Compute plain fine-tuning's gradients with transformers alone: nothing of this package, no trainer.

    Gradients are added to those that the model has. Logits are computed at the targets' positions only.

    Args:
        model: A LLaVA-shaped model.
        prompt: The processor's output for B prompts of equal lengths.
        targets: B targets of equal lengths, maybe padded for longer ones.
        share: What the batch's loss is multiplied by: the share of its posts in the step.

    Returns:
        `share` times the mean loss per token, a scalar without graph, in nats.
    """
    length = max(targets["lengths"])
    ids = targets["input_ids"][:, :length]
    if not (targets["mask"][:, :length].all() and prompt["attention_mask"].all()):
        raise ValueError("prompts or targets have different lengths; fine_tune computes batches without padding only")
    inputs = dict(prompt)
    inputs["input_ids"] = torch.cat([prompt["input_ids"], ids[:, :-1]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

    def logits() -> torch.Tensor:  # not a variable, which would keep them in memory during the backward pass
        return model(**inputs, logits_to_keep=length, use_cache=False).logits.flatten(0, 1)

    loss = share * nn.functional.cross_entropy(logits(), ids.flatten())
    loss.backward()
    return loss.detach()


class TwoPassTrainer(DynamicCoTTrainer):
    """Dynamic CoT with every prompt computed twice: a forward without gradients decides, a second one trains.

    Takes what [`DynamicCoTTrainer`] takes. Its `strategy` must be "direct": both passes are plain fine-tuning on one target
    per post, the second one in a batch padded to the longest of the chosen targets.
    """

    def compute_post_losses(self, model: nn.Module, inputs: PostBatch) -> PostLosses:
        """Compute one loss per post, as [`DynamicCoTTrainer.compute_post_losses`] defines it."""
        with torch.no_grad():
            direct_loss = super().compute_post_losses(model, inputs).total  # (B,), nats per token
        easy = inputs["has_rationale"] & below_threshold(direct_loss, self.gamma.value)
        chosen = mixed_targets(inputs["direct"], inputs["reasoning"], easy)
        return super().compute_post_losses(model, {**inputs, "direct": chosen})
