"""Run by test_faults.py: pairs of ranks that are killed at random moments and started again until they have finished.

    python fault_ranks.py OUT ddp|zero2 METHOD SEED

Leaves OUT/straight (never killed), OUT/killed and OUT/report.json. Imports once and forks the ranks, so that a start
takes a second rather than ten; the parent does nothing with torch.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.distributed.train_ranks import AIMKP, LOGS, METHODS
from tests.support.launching import REPOSITORY, free_port

STEPS, KILLS = 10, 2
CASES: dict[str, dict[str, Any]] = {
    "dynamic_cot": {"gamma": "avg"},
    "aimkp": {name: value for name, value in AIMKP.items() if name != "method"},
}


def train(folder: Path, launcher: str, method: str) -> None:
    """On both ranks: from the last complete checkpoint, if there is one, to the end. Every step writes a checkpoint."""
    from accelerate import PartialState

    from dynkp.trainer.durable_checkpoints import last_complete_checkpoint
    from tests.support.posts import rows
    from tests.support.trainers import trainer_of

    options: dict[str, Any] = dict(CASES[method])
    if launcher == "zero2":
        options["deepspeed"] = str(REPOSITORY / "examples" / "deepspeed" / "zero2.json")
    trainer = trainer_of(
        "llava",
        folder,
        rows("llava", 14),  # batches of 4 over two epochs and more, a short one at the end of each
        classes=METHODS[method],
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=3,
        optim="adamw_torch",
        lr_scheduler_type="linear",
        ddp_backend="gloo",
        **{LOGS[method][0]: True, "learning_rate": 1e-2, **options},
    )
    assert trainer.accelerator.num_processes == 2
    if trainer.accelerator.process_index == 1:  # the slower rank, of which the other must not run ahead
        save = trainer._save_optimizer_and_scheduler
        trainer._save_optimizer_and_scheduler = lambda *args: (save(*args), time.sleep(0.1))
    try:
        checkpoint: str | None = last_complete_checkpoint(folder)
    except ValueError:
        checkpoint = None
    PartialState().wait_for_everyone()
    trainer.train(resume_from_checkpoint=checkpoint)
    PartialState().wait_for_everyone()


def fork_ranks(folder: Path, launcher: str, method: str) -> list[int]:
    port, ranks = free_port(), []
    folder.mkdir(parents=True, exist_ok=True)
    for rank in (0, 1):
        if child := os.fork():
            ranks.append(child)
            continue
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        code = 1
        try:
            train(folder, launcher, method)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return ranks


def wait(ranks: list[int]) -> None:
    for _ in ranks:
        _, status = os.wait()
        if status:
            for rank in ranks:
                os.kill(rank, signal.SIGKILL)
            sys.exit(f"a rank ended with status {status}")


def last_step(log: Path) -> int:
    """The last whole step in a log of visits."""
    lines = log.read_text().splitlines() if log.exists() else []
    return max((json.loads(line)["step"] for line in lines[:-1]), default=0)


def main(out: Path, launcher: str, method: str, seed: int) -> None:
    wait(fork_ranks(out / "straight", launcher, method))
    rng, folder, killed_at, unfinished = random.Random(seed), out / "killed", [], 0
    for step in sorted(rng.sample(range(2, STEPS - 2), KILLS)):
        ranks = fork_ranks(folder, launcher, method)
        while last_step(folder / LOGS[method][1]) < step:
            time.sleep(0.005)
            if os.waitpid(-1, os.WNOHANG)[0]:
                sys.exit("a rank ended before it was killed")
        time.sleep(rng.uniform(0.0, 0.4))
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)
        for rank in ranks:
            os.waitpid(rank, 0)
        killed_at.append(last_step(folder / LOGS[method][1]))
        unfinished += sum(not (path / "trainer_state.json").exists() for path in folder.glob("checkpoint-*"))
    wait(fork_ranks(folder, launcher, method))
    (out / "report.json").write_text(json.dumps({"killed_at": killed_at, "unfinished": unfinished}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
