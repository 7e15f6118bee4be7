"""A run that is killed at random moments and continued is the run that was left alone; a full disk costs one checkpoint.

Two ranks, DDP and ZeRO-2, Dynamic CoT and AimKP: weights, losses, statistics or strides, and the log of visits are equal to the
last bit. Only a checkpoint that all ranks have finished counts as one, also where it is written over an older one.
"""

from __future__ import annotations

import functools
import json
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from dynkp.trainer.durable_checkpoints import last_complete_checkpoint
from tests.distributed.fault_ranks import STEPS
from tests.distributed.train_ranks import LOGS
from tests.support.launching import RANK_SCRIPTS, build_deepspeed_operations, finish, start
from tests.support.trainers import trainer_of

RUNS = [("zero2", "dynamic_cot", 0), ("ddp", "aimkp", 1)]

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def folder_of(launcher: str, method: str, seed: int) -> Path:
        if launcher == "zero2":
            build_deepspeed_operations()
        folder = tmp_path_factory.mktemp(f"{launcher}-{method}")
        finish([start([sys.executable, RANK_SCRIPTS / "fault_ranks.py", folder, launcher, method, seed])])
        return folder

    return folder_of


@pytest.mark.parametrize(("launcher", "method", "seed"), RUNS)
def test_a_killed_run_ends_like_one_that_was_left_alone(launcher: str, method: str, seed: int, folders: Any) -> None:
    folder = folders(launcher, method, seed)
    killed_at = json.loads((folder / "report.json").read_text())["killed_at"]
    assert len(killed_at) == 2 and max(killed_at) < STEPS, f"killed at {killed_at}: not in the middle of the run"
    straight, killed = (folder / name / f"checkpoint-{STEPS}" for name in ("straight", "killed"))
    assert (killed / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    states = [json.loads((run / "trainer_state.json").read_text()) for run in (straight, killed)]
    assert states[0]["stateful_callbacks"]["dynkp"] == states[1]["stateful_callbacks"]["dynkp"]
    logs = [[{k: v for k, v in row.items() if k != "step_cost"} for row in state["log_history"]] for state in states]
    assert logs[0] == logs[1] and len(logs[0]) == STEPS
    straight_visits, visits = (visits_of(folder / name / LOGS[method][1]) for name in ("straight", "killed"))
    assert visits == straight_visits and {row["step"] for row in visits} == set(range(1, STEPS + 1))


@pytest.mark.parametrize(("launcher", "method", "seed"), RUNS)
def test_what_marks_a_checkpoint_as_complete_is_written_last(launcher: str, method: str, seed: int, folders: Any) -> None:
    for checkpoint in sorted((folders(launcher, method, seed) / "straight").glob("checkpoint-*")):
        files = {path.name: path.stat().st_mtime_ns for path in checkpoint.rglob("*") if path.is_file()}
        assert files.keys() >= {"rng_state_0.pth", "rng_state_1.pth"}
        shards = [name for name in files if "zero_pp_rank" in name and "optim" in name]
        assert len(shards) == (2 if launcher == "zero2" else 0)
        assert max(files, key=lambda name: files[name]) == "trainer_state.json", files


def visits_of(log: Path) -> list[dict[str, Any]]:
    """Without their order within a step, which is that of the ranks."""
    return [json.loads(line) for line in log.read_text().splitlines()]


class FullDisk(TrainerCallback):
    """From a step on, no file can grow beyond some kilobytes."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_is_named_and_earlier_checkpoints_stay(tmp_path: Path) -> None:
    """The step's checkpoint exists from an earlier run: half written over, it must not count as complete."""
    options: dict[str, Any] = {"gamma": "avg", "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    trainer_of("llava", tmp_path, **options).train()
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()}
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")

    again = trainer_of("llava", tmp_path, callbacks=[FullDisk(3)], **options)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=r"checkpoint-3' could not be written .* GB free.*Earlier checkpoints are untouched"):
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()} == before
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert trainer_of("llava", tmp_path, **options).train(resume_from_checkpoint=True).global_step == 3
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
