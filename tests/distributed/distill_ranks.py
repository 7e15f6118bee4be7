"""Run by a launcher or alone: trains MulCoT-RD's student in every case and leaves what the ranks saw as JSON.

accelerate launch --config_file examples/accelerate/zero2.yaml distill_ranks.py OUT 2 SOFT_LABELS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from tests import conftest  # noqa: F401  no network, no telemetry, one thread
from tests.support.reasoning_trainers import reasoning_rows, reasoning_trainer
from tests.support.soft_labels import assistant_model

# A loss that falls is no progress here, so that the rate is halved at every evaluation but the first.
PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0}, "greater_is_better": True}

# Global batches of 4: two ranks take 2 posts each, one process 4. Nine posts leave a last batch of one.
CASES: dict[str, dict[str, Any]] = {
    "online": {},
    "cached": {"soft_labels": True},
    "token": {"loss_normalization": "token", "accumulation": 2},
    "everywhere": {"kd_positions": "all"},
    "one_rank_chains": {"posts": "one rank has chains", "gradient_checkpointing": True},
    "short": {"posts": "nine", "max_steps": 3},
    "plateau": {**PLATEAU, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4},
}


def posts_of(kind: str) -> list[dict[str, Any]]:
    """Without shuffling, rank 0 takes posts 0 and 1 of every global batch of 4, rank 1 posts 2 and 3."""
    posts = reasoning_rows("llava", 9 if kind == "nine" else 8)
    for index, post in enumerate(posts):
        if kind == "one rank has chains" and index % 4 >= 2:
            post["rationale"] = None
    return posts


def run(name: str, out: Path, ranks: int, soft_labels: str) -> None:
    case = dict(CASES[name])
    accumulation = case.pop("accumulation", 1)
    posts = posts_of(case.pop("posts", "eight"))
    if case.pop("soft_labels", False):
        case["soft_labels"] = soft_labels
    else:
        case["assistant_model"] = assistant_model()
    AcceleratorState._reset_state()  # the process is the same as for the last case, its ZeRO options may not be
    trainer = reasoning_trainer(
        "llava",
        out / name,
        posts,
        eval_dataset=reasoning_rows("llava", 5),
        eval_generation_posts=None if name == "online" else 0,
        eval_max_new_tokens=3,
        per_device_train_batch_size=4 // ranks // accumulation,
        per_device_eval_batch_size=4 // ranks,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        **{"max_steps": 2, **case},
    )
    assert trainer.accelerator.num_processes == ranks, f"{trainer.accelerator.num_processes} processes instead of {ranks}"
    trainer.train()
    metrics = trainer.evaluate()
    timed = ("runtime", "per_second", "preparation")
    seen = {
        "world_size": trainer.accelerator.num_processes,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "checksum": sum(parameter.double().abs().sum().item() for parameter in trainer.model.parameters()),
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "metrics": {key: value for key, value in metrics.items() if not any(word in key for word in timed)},
    }
    rank = trainer.accelerator.process_index
    (out / f"{name}.{rank}.json").write_text(json.dumps(seen))
    if rank == 0:
        state = {key: value.contiguous().clone() for key, value in trainer.model.state_dict().items()}
        save_file(state, out / f"{name}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case_name in CASES:
        run(case_name, Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
