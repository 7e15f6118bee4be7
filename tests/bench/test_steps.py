"""The timed steps: a trainer's step is that of its `train`; the references refuse what they cannot compute.

Holds: the loss of `train` is the one that the trainer logs for the same posts, and the batch is left as it was; plain
fine-tuning without padding equals the mean over tokens by hand, and batches with padding are refused.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from dynkp.batches.collators import PairedTargetCollator
from dynkp.bench.steps import TwoPassTrainer, fine_tune, train
from dynkp.bench.workload import QUICK, build_model, build_processor, draw_posts
from dynkp.trainer.dynamic_cot_config import DynamicCoTConfig
from tests.support.posts import rows
from tests.support.trainers import losses, trainer_of


@pytest.mark.parametrize("normalization", ["sample", "token"])
def test_the_loss_is_the_trainer_s(normalization: str, tmp_path: Path) -> None:
    options = {"gamma": "inf", "per_device_train_batch_size": 4, "max_steps": 1, "loss_normalization": normalization}
    posts = rows("llava", 4)
    trainer = trainer_of("llava", tmp_path, posts, **options)
    batch = trainer.data_collator(posts)
    before = copy.deepcopy(batch)
    loss = float(train(trainer, batch))
    assert batch.keys() == before.keys() and torch.equal(batch["direct"]["input_ids"], before["direct"]["input_ids"])
    other = trainer_of("llava", tmp_path, posts, **options)
    other.train()
    assert losses(other) == [pytest.approx(loss, rel=1e-5)]


@pytest.mark.parametrize("gamma", ["0", "6.09", "inf"])
def test_two_passes_are_dynamic_cot(gamma: str, tmp_path: Path) -> None:
    options = {"gamma": gamma, "per_device_train_batch_size": 6, "max_steps": 1}
    shared = trainer_of("llava", tmp_path, **options)
    classes = (TwoPassTrainer, DynamicCoTConfig)
    twice = trainer_of("llava", tmp_path, classes=classes, strategy="direct", prompt_backend="plain", **options)
    batch = shared.data_collator(rows("llava", 6))
    # The posts' direct losses lie between 6.0 and 6.4 nats per token.
    assert float(train(twice, batch)) == pytest.approx(float(train(shared, batch)), rel=1e-5)
    for (name, ours), theirs in zip(shared.model.named_parameters(), twice.model.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_plain_fine_tuning_is_the_mean_over_tokens() -> None:
    processor = build_processor(QUICK)
    model, batch = build_model(QUICK, processor), PairedTargetCollator(processor)(draw_posts(QUICK))
    prompt, targets = batch["prompt"], batch["direct"]
    loss = fine_tune(model, prompt, targets, share=0.5)
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
    whole = {
        "input_ids": torch.cat([prompt["input_ids"], targets["input_ids"]], dim=1),
        "attention_mask": torch.cat([prompt["attention_mask"], targets["mask"]], dim=1),
    }
    labels = torch.cat([torch.full_like(prompt["input_ids"], -100), targets["input_ids"]], dim=1)
    expected = model(**{**prompt, **whole}, labels=labels).loss.detach()
    assert float(loss) == pytest.approx(0.5 * float(expected), rel=1e-5)


def test_plain_fine_tuning_refuses_padding() -> None:
    processor = build_processor(QUICK)
    model, batch = build_model(QUICK, processor), PairedTargetCollator(processor)(draw_posts(QUICK, unequal=True))
    with pytest.raises(ValueError, match="have different lengths"):
        fine_tune(model, batch["prompt"], batch["direct"])
