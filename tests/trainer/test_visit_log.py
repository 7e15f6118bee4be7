"""The file of visits contains every visit exactly once, as JSON.

Holds: NaN and infinity are null; a new run renames the file of an earlier one; a resumed run drops the lines after its
checkpoint and an incomplete last line.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState

from dynkp.trainer.visit_log import VisitLog
from tests.support.trainers import (
    read_choices,
    trainer_of,
)


def test_choices_of_infinite_gamma_are_json(tmp_path: Path) -> None:
    trainer_of("llama", tmp_path, gamma="inf", log_choices=True, max_steps=1).train()
    assert [row["gamma"] for row in read_choices(tmp_path)] == [None, None]


def test_a_fresh_run_moves_the_old_log_aside(tmp_path: Path) -> None:
    for _ in range(3):
        trainer_of("llama", tmp_path, gamma=5.0, log_choices=True, max_steps=1).train()
    names = sorted(path.name for path in tmp_path.glob("choices*"))
    assert names == ["choices.1.jsonl", "choices.2.jsonl", "choices.jsonl"]
    assert len(read_choices(tmp_path)) == 2


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def state(step: int) -> TrainerState:
    return TrainerState(global_step=step, epoch=step / 3)


def test_a_line_per_visit(tmp_path: Path) -> None:
    log = VisitLog(tmp_path / "out" / "visits.jsonl")
    log.begin(0)
    log.write([{"id": "ä", "loss": math.nan, "kept": True}, {"loss": math.inf, "id": "b"}], state(1))
    log.write([], state(2))
    log.write([{"id": "ä", "loss": 1.5}], state(3))
    assert lines_of(log.path) == [
        {"id": "ä", "epoch": 0.333333, "step": 1, "loss": None, "kept": True},
        {"id": "b", "epoch": 0.333333, "step": 1, "loss": None},
        {"id": "ä", "epoch": 1.0, "step": 3, "loss": 1.5},
    ]
    assert list(lines_of(log.path)[1])[:3] == ["id", "epoch", "step"]


@pytest.mark.parametrize("torn", ["", '{"id": "c", "epoch": 0.7, "st', '{"id": "c", "epoch": 0.7, "step": 2}'])
def test_a_resumed_run_continues_behind_its_checkpoint(torn: str, tmp_path: Path) -> None:
    """Lines of later steps go, and an incomplete last line, even one that lacks its line break only."""
    log = VisitLog(tmp_path / "visits.jsonl")
    for step in (1, 2, 3):
        log.write([{"id": name} for name in "ab"], state(step))
    with log.path.open("a") as file:
        file.write(torn)
    log.begin(2)
    log.write([{"id": "new"}], state(3))
    assert [(row["id"], row["step"]) for row in lines_of(log.path)] == [("a", 1), ("b", 1), ("a", 2), ("b", 2), ("new", 3)]


def test_a_resumed_run_without_the_file_starts_one(tmp_path: Path) -> None:
    log = VisitLog(tmp_path / "visits.jsonl")
    log.begin(7)
    assert not log.path.exists()
