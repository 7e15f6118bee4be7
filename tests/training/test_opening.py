"""The opening lines count what is trained: parameters, posts with and without image and rationale, steps; one process says it.

Counting reads no image: lists and texts are measured in the table.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import ProgressCallback

from dynkp import DynamicCoTConfig, DynamicCoTTrainer
from dynkp.data.rows import normalise_posts
from dynkp.training.opening import TrainingBar, _count_filled, announce
from tests.support.posts import rows
from tests.support.tiny_models import build

QUIET: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "per_device_train_batch_size": 2,
    "max_steps": 3,
}


def trainer(folder: Path, **options: Any) -> DynamicCoTTrainer:
    model, processor = build("llava")
    args = DynamicCoTConfig(output_dir=str(folder), **{**QUIET, **options})
    posts = rows("llava", 5)
    return DynamicCoTTrainer(model, args, train_dataset=posts, eval_dataset=posts[:2], processing_class=processor)


def test_the_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dynkp")
    one = trainer(tmp_path, disable_tqdm=True, gradient_accumulation_steps=2)
    announce(one, "dynamic_cot", "text")
    caplog.clear()
    one.train()
    (record,) = [record for record in caplog.records if record.name == "dynkp.training.opening"]
    lines = dict(line.split(maxsplit=1) for line in record.message.splitlines())
    assert lines["Method:"] == "dynamic_cot (strategy dynamic), task dynamic_cot, text only"
    total = sum(parameter.numel() for parameter in one.model.parameters()) / 1e6
    assert f"{total:,.1f} M parameters" in lines["Model:"] and "trainable (" in lines["Model:"]
    assert "100.0%" not in lines["Model:"], "the vision tower is frozen"
    posts = rows("llava", 5)
    images, rationales = (sum(bool(post.get(name)) for post in posts) for name in ("images", "rationale"))
    assert lines["Posts:"] == f"5: {images} with and {5 - images} without image, {rationales} with rationale; evaluation: 2"
    assert lines["Training:"] == "3 optimizer steps of 4 posts (2.4 epochs)"
    assert lines["Output:"] == str(tmp_path)


def test_one_bar_at_a_time(tmp_path: Path) -> None:
    one = trainer(tmp_path, disable_tqdm=False)
    announce(one, "dynamic_cot")
    bars = [callback for callback in one.callback_handler.callbacks if isinstance(callback, ProgressCallback)]
    assert [type(bar) for bar in bars] == [TrainingBar]
    bars[0].on_prediction_step(one.args, one.state, one.control, eval_dataloader=[1])
    assert bars[0].prediction_bar is None
    alone = trainer(tmp_path, disable_tqdm=False, eval_generation_posts=0)
    announce(alone, "dynamic_cot")
    bars = [callback for callback in alone.callback_handler.callbacks if isinstance(callback, ProgressCallback)]
    assert [type(bar) for bar in bars] == [ProgressCallback], "the evaluation of the loss alone has no other bar"


def test_counting(tmp_path: Path) -> None:
    posts = normalise_posts(
        [
            {"id": "0", "text": "a", "keyphrases": ["k"], "images": [], "rationale": None},
            {"id": "1", "text": "b", "keyphrases": ["k"], "images": [str(tmp_path / "no.png")] * 2, "rationale": "why"},
            {"id": "2", "text": "c", "keyphrases": ["k"], "images": [str(tmp_path / "no.png")], "rationale": ""},
        ]
    )
    assert isinstance(posts, Dataset)
    assert (_count_filled(posts, "images"), _count_filled(posts, "rationale"), _count_filled(posts, "absent")) == (2, 1, 0)
    some = posts.select([2, 0])
    assert (_count_filled(some, "images"), _count_filled(some, "rationale")) == (1, 0), "of these posts, not of the table"
    assert _count_filled(Dataset.from_dict({"rationale": [None, None]}), "rationale") == 0
