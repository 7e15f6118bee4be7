"""What a method records is logged as a mean over posts, micro-batches, evaluation sets and ranks.

Holds: weights and masks select; what does not count may be infinite; a metric without values is left out; evaluation sets keep
their metrics separate; a logging window is the mean over its posts.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dynkp.trainer.recorded_metrics import MetricRecords
from tests.support.posts import rows
from tests.support.trainers import (
    losses,
    read_choices,
    trainer_of,
)


def test_a_logging_window_is_a_mean_over_its_posts(tmp_path: Path) -> None:
    """Windows of three optimizer steps, the last batch of the epoch shorter: every post counts the same."""
    options = {"max_steps": 6, "gamma": "5.7", "log_choices": True}
    wide = trainer_of("llava", tmp_path, rows("llava", 5), logging_steps=3, **options)
    wide.train()
    visits = read_choices(tmp_path)
    for number, window in enumerate(([1, 2, 3], [4, 5, 6])):
        chosen = [row for row in visits if row["step"] in window]
        assert len(chosen) == 5
        mean = sum(row["direct_loss"] for row in chosen) / 5
        share = sum(row["choice"] == "reasoning" for row in chosen) / 5
        assert losses(wide, "direct_loss")[number] == pytest.approx(mean, rel=1e-6)
        assert losses(wide, "reasoning_share")[number] == pytest.approx(share)


def test_several_evaluation_sets_keep_their_metrics_apart(tmp_path: Path) -> None:
    posts = rows("llava", 4)
    sets = {"seen": posts[:2], "unseen": posts[2:]}
    trainer = trainer_of("llava", tmp_path, eval_dataset=sets, gamma="5.7")
    metrics = trainer.evaluate()
    for name, rows_of_set in sets.items():
        alone = trainer_of("llava", tmp_path, eval_dataset=rows_of_set, gamma="5.7").evaluate()
        for metric in ("loss", "direct_loss", "reasoning_share", "gamma_tokens"):
            assert metrics[f"eval_{name}_{metric}"] == pytest.approx(alone[f"eval_{metric}"])


# The sums by themselves


def test_masks_and_weights_select() -> None:
    records = MetricRecords()
    values = torch.tensor([1.0, math.nan, 3.0, math.inf])
    records.add("masked", values, torch.tensor([True, False, True, False]))
    records.add("weighted", torch.tensor([2.0, 5.0]), torch.tensor([3.0, 1.0]))
    records.add("nothing", values, torch.zeros(4).bool())
    records.add("scalar", torch.tensor(7.0))
    assert len(records) == 4
    assert records.take() == {"masked": 2.0, "weighted": 11 / 4, "scalar": 7.0}
    assert len(records) == 0 and records.take() == {}


def test_micro_batches_add_up_in_double_precision() -> None:
    """0.1 as float32, a thousand times: a float32 sum would be off in the fifth digit."""
    records = MetricRecords()
    for _ in range(1000):
        records.add("loss", torch.tensor([0.1], requires_grad=True))
    assert records.take()["loss"] == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)


def test_ranks_are_joined_by_their_weights() -> None:
    """A metric that only the other rank has counts too; the mean is over posts, not over ranks."""
    records = MetricRecords()
    records.add("loss", torch.tensor([1.0, 1.0, 1.0]))

    def gather(own: list[Any]) -> list[Any]:
        assert own == [("loss", 3.0, 3.0)]
        return [*own, ("loss", 5.0, 1.0), ("share", 1.0, 2.0)]

    assert records.take(gather) == {"loss": 2.0, "share": 0.5}


def test_training_and_evaluation_are_recorded_separately(tmp_path: Path) -> None:
    trainer = trainer_of("llama", tmp_path)
    trainer.model.train()
    trainer.record("loss", torch.tensor([1.0]))
    trainer.model.eval()
    trainer.record("loss", torch.tensor([2.0]))
    logs: dict[str, float] = {}
    trainer.log(logs)
    assert logs["eval_loss"] == 2.0 and "loss" not in logs
    trainer.model.train()
    trainer.log(logs := {})
    assert logs["loss"] == 1.0
