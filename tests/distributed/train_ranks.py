"""Run by torchrun or alone: trains every case named on the command line and leaves what the ranks saw as JSON.

python -m torch.distributed.run --nproc_per_node 2 train_ranks.py OUT 2 CASE ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import conftest  # noqa: E402, F401  no network, no telemetry, one thread
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from posts_for_tests import rows  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from trainers_for_tests import trainer_of  # noqa: E402

# Global batches of 4: two ranks take 2 posts each, one process 4. Nine posts leave a last batch of one.
CASES: dict[str, dict[str, Any]] = {
    "avg": {"family": "llava", "gamma": "avg"},
    "quantile": {"family": "qwen2_5_vl", "gamma": "quantile:0.5"},
    "token": {"family": "llava", "gamma": "6.0", "loss_normalization": "token"},
    "accumulated": {"family": "llava", "gamma": "6.0", "accumulation": 2},
    "accumulated_token": {"family": "qwen2_5_vl", "gamma": "avg", "accumulation": 2, "loss_normalization": "token"},
    "checkpointing": {"family": "llava", "gamma": "6.0", "gradient_checkpointing": True},
    "one_rank_easy": {"family": "llava", "gamma": "inf", "posts": "one rank has rationales"},
    "one_rank_pictures": {"family": "llava", "gamma": "6.0", "posts": "one rank has pictures"},
    "no_pictures": {"family": "gemma3", "gamma": "6.0", "posts": "no pictures"},
    "short": {"family": "llava", "gamma": "avg", "posts": "nine", "max_steps": 6},
    "stream": {"family": "llama", "gamma": "avg", "posts": "stream"},
}


def posts_of(kind: str, family: str) -> Any:
    """Without shuffling, rank 0 takes posts 0 and 1 of every global batch of 4, rank 1 posts 2 and 3."""
    count = 9 if kind == "nine" else 8
    posts = rows(family, count, images=kind != "no pictures")
    if kind == "stream":
        from datasets import IterableDataset

        columns = ("id", "text", "keyphrases", "rationale")
        return IterableDataset.from_generator(lambda: iter({name: post[name] for name in columns} for post in posts))
    for index, post in enumerate(posts):
        first_rank = index % 4 < 2
        if kind == "one rank has rationales":
            post["rationale"] = "Because of the goal." if first_rank else None
        if kind == "one rank has pictures":
            post["text"] = post["text"] or "dusk"
            post["images"] = [] if first_rank else rows(family, 1)[0]["images"]
    return posts


def run(name: str, out: Path, ranks: int) -> None:
    case = dict(CASES[name])
    family, accumulation = case.pop("family"), case.pop("accumulation", 1)
    posts = posts_of(case.pop("posts", "eight"), family)
    trainer = trainer_of(
        family,
        out / name,
        posts,
        eval_dataset=rows(family, 7),
        log_choices=True,
        per_device_train_batch_size=4 // ranks // accumulation,
        per_device_eval_batch_size=4 // ranks,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        **{"max_steps": 4, **case},
    )
    assert trainer.accelerator.num_processes == ranks, f"{trainer.accelerator.num_processes} processes instead of {ranks}"
    trainer.train()
    metrics = trainer.evaluate()
    seen = {
        "world_size": trainer.accelerator.num_processes,
        "gamma": trainer.gamma.state(),
        "checksum": sum(parameter.double().abs().sum().item() for parameter in trainer.model.parameters()),
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "metrics": {key: value for key, value in metrics.items() if "runtime" not in key and "per_second" not in key},
    }
    rank = trainer.accelerator.process_index
    (out / f"{name}.{rank}.json").write_text(json.dumps(seen))
    if rank == 0:
        state = {key: value.contiguous().clone() for key, value in trainer.model.state_dict().items()}
        save_file(state, out / f"{name}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case_name in sys.argv[3:]:
        run(case_name, Path(sys.argv[1]), int(sys.argv[2]))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
