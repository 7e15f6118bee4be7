"""Checkpoints of a trainer are complete or recognizably not, and hold everything that a run continues from.

Holds: a resumed run, also one whose process was killed, is the uninterrupted one; every weight of every family comes back; an
incomplete checkpoint is passed over; the state of a method is JSON in trainer_state.json, no pickle of ours; a checkpoint that
cannot be written is an error that names it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from trl import SFTTrainer

from dynkp.trainer.durable_checkpoints import last_complete_checkpoint
from dynkp.trainer.dynamic_cot_trainer import DynamicCoTTrainer
from dynkp.trainer.post_config import PostConfig
from dynkp.trainer.post_trainer import PostTrainer
from tests.support.posts import rows
from tests.support.trainers import (
    StopAt,
    history,
    largest_difference,
    losses,
    read_choices,
    resumable,
    trainer_of,
    weights,
)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "internvl", "gemma3", "idefics3", "smolvlm", "mllama"])
def test_a_checkpoint_gives_every_weight_back(family: str, tmp_path: Path) -> None:
    """Families whose published parameter names are not the model's own: Trainer alone would restore none of them."""
    trained = trainer_of(family, tmp_path, max_steps=1, save_strategy="steps", save_steps=1, gamma="avg")
    trained.train()
    resumed = trainer_of(family, tmp_path, gamma="avg")
    assert largest_difference(weights(resumed), weights(trained)) > 0
    resumed._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert largest_difference(weights(resumed), weights(trained)) == 0


def test_lora_resumes(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    runs = []
    for folder, resume in (("straight", None), ("resumed", None), ("resumed", True)):
        torch.manual_seed(0)
        trainer = resumable("llava", tmp_path / folder, gamma="avg", peft_config=config)
        if folder == "resumed" and not resume:
            trainer.add_callback(StopAt(4))
        trainer.train(resume_from_checkpoint=resume)
        runs.append(trainer)
    assert history(runs[2]) == history(runs[0])
    assert largest_difference(weights(runs[2]), weights(runs[0])) == 0


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    """A learning rate that ruins the model: the best checkpoint is the first, and its weights must come back."""
    trainer = trainer_of(
        "llava",
        tmp_path,
        eval_dataset=rows("llava", 2),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="direct_loss",
        greater_is_better=False,
        learning_rate=20.0,
    )
    trainer.train()
    best = min(losses(trainer, "eval_direct_loss"))
    assert best < losses(trainer, "eval_direct_loss")[-1]
    assert trainer.evaluate()["eval_direct_loss"] == pytest.approx(best, rel=1e-6)


SCRIPT = """
import sys
from tests import conftest
from tests.support.trainers import resumable
from pathlib import Path
resumable("llava", Path(sys.argv[1]), gamma="avg", max_steps=int(sys.argv[2]), save_steps=2).train(
    resume_from_checkpoint=len(sys.argv) > 3
)
"""


def test_a_killed_run_resumes(tmp_path: Path) -> None:
    """SIGKILL at any moment after the first checkpoint; the resumed process ends like one that was left alone."""
    steps = 20
    script = SCRIPT
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    straight = resumable("llava", tmp_path / "straight", gamma="avg", max_steps=steps, save_steps=2)
    straight.train()

    folder = tmp_path / "killed"
    process = subprocess.Popen([*command, folder, str(steps)], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint-6" / "trainer_state.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    assert not (folder / f"checkpoint-{steps}").exists(), "killed too late to prove anything"

    subprocess.run([*command, folder, str(steps), "resume"], env=environment, check=True, timeout=120, capture_output=True)
    assert read_choices(folder) == read_choices(tmp_path / "straight")
    ends = [
        json.loads((run / f"checkpoint-{steps}" / "trainer_state.json").read_text()) for run in (folder, straight_dir(straight))
    ]
    assert ends[0]["stateful_callbacks"]["dynkp"] == ends[1]["stateful_callbacks"]["dynkp"]
    assert [e["loss"] for e in ends[0]["log_history"] if "loss" in e] == losses(straight)
    files = [run / f"checkpoint-{steps}" / "model.safetensors" for run in (folder, straight_dir(straight))]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path) -> None:
    resumable("llama", tmp_path, gamma="avg", max_steps=3).train()
    for number, content in ((4, None), (9, '{"epoch": 1.0, "glo')):
        (tmp_path / f"checkpoint-{number}").mkdir()
        if content:
            (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(content)
    resumed = resumable("llama", tmp_path, gamma="avg")
    resumed.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in history(resumed)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        resumable("llama", tmp_path / "empty", gamma="avg").train(resume_from_checkpoint=True)


def straight_dir(trainer: DynamicCoTTrainer) -> Path:
    return Path(trainer.args.output_dir)


def test_checkpoints_hold_no_pickle_of_ours(tmp_path: Path) -> None:
    """Pickles (torch.save) are Trainer's own four; our state is in trainer_state.json, weights in safetensors."""
    trainer = resumable("llava", tmp_path, gamma="quantile:0.5", max_steps=3)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-3"
    pickled = {path.name for path in checkpoint.iterdir() if path.read_bytes()[:2] in (b"PK", b"\x80\x02")}
    assert pickled == {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
    others = {path.suffix for path in checkpoint.iterdir()} - {".pt", ".pth", ".bin"}
    assert others <= {".json", ".safetensors", ".jinja", ".md"}
    state = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["dynkp"]
    assert state == {"gamma": "quantile:0.5", "statistics": trainer.gamma.state()}
    assert len(state["statistics"]["losses"]) == 6


def test_callback_states_restored_from_a_checkpoint(tmp_path: Path) -> None:
    resumable("llama", tmp_path, gamma="avg", max_steps=3).train()
    resumed = resumable("llama", tmp_path, gamma="avg", restore_callback_states_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.gamma.state()["count"] == 11


# By themselves


def checkpoint(folder: Path, step: int, state: str | None) -> str:
    (folder / f"checkpoint-{step}").mkdir()
    if state is not None:
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    return str(folder / f"checkpoint-{step}")


def test_the_newest_complete_checkpoint_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By number, not by name; folders of other names do not count."""
    checkpoint(tmp_path, 9, "{}")
    newest = checkpoint(tmp_path, 10, "{}")
    checkpoint(tmp_path, 11, None)
    torn = checkpoint(tmp_path, 100, '{"epoch": 1.0, "glo')
    (tmp_path / "checkpoint-last").mkdir()
    assert last_complete_checkpoint(tmp_path) == newest
    assert torn in caplog.text
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        last_complete_checkpoint(tmp_path / "nowhere")


def test_a_checkpoint_that_is_written_again_is_incomplete_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark of an earlier run's is gone before anything is written; an error names the checkpoint and the space left."""
    trainer = trainer_of("llama", tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    mark = Path(checkpoint(tmp_path, 1, "{}"), "trainer_state.json")
    marked: list[bool] = []

    def full(*args: Any) -> None:
        marked.append(mark.exists())
        raise OSError("No space left on device")

    monkeypatch.setattr(SFTTrainer, "_save_checkpoint", full)
    with pytest.raises(OSError, match=r"checkpoint-1' could not be written \(.* GB free\): No space left.*then continue"):
        trainer.train()
    assert marked == [False]


def test_the_state_of_a_method_is_loaded_between_beginning_and_first_step(tmp_path: Path) -> None:
    class Recorder(PostTrainer):
        def begin_training(self) -> None:
            calls.append("begin")

        def load_method_state(self, state: dict[str, Any]) -> None:
            calls.append(f"load {state}")

        def resume_at(self, step: int) -> None:
            super().resume_at(step)
            calls.append(f"resume at {step}")

        def end_of_step(self) -> None:
            calls.append("end")

        def method_state(self) -> dict[str, Any]:
            return {"steps": calls.count("end")}

    calls: list[str] = []
    options = {"classes": (Recorder, PostConfig), "save_strategy": "steps", "save_steps": 1}
    trainer_of("llama", tmp_path, max_steps=2, **options).train()
    assert calls == ["begin", "end", "end"]
    calls.clear()
    trainer_of("llama", tmp_path, max_steps=3, **options).train(resume_from_checkpoint=True)
    assert calls == ["begin", "load {'steps': 2}", "resume at 2", "end"]
