"""Run by a launcher or alone: trains every case named on the command line and leaves what the ranks saw as JSON.

accelerate launch --config_file examples/accelerate/zero2.yaml train_ranks.py OUT 2 CASE ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from peft import LoraConfig
from safetensors.torch import save_file

from dynkp import AimKPConfig, AimKPTrainer, DynamicCoTConfig, DynamicCoTTrainer
from tests import conftest  # noqa: F401  no network, no telemetry, one thread
from tests.support.posts import rows
from tests.support.trainers import trainer_of

METHODS: dict[str, tuple[type, type]] = {
    "dynamic_cot": (DynamicCoTTrainer, DynamicCoTConfig),
    "aimkp": (AimKPTrainer, AimKPConfig),
}
LOGS = {"dynamic_cot": ("log_choices", "choices.jsonl"), "aimkp": ("log_visits", "visits.jsonl")}

# Global batches of 4: two ranks take 2 posts each, one process 4. Nine posts leave a last batch of one. Every method's
# cases bear its name, those of Dynamic CoT none.
AIMKP: dict[str, Any] = {"method": "aimkp", "warmup_epochs": 0, "image_threshold": 0.2}
PROJECTOR, MERGER = {"adapters": "multi_modal_projector"}, {"adapters": "merger"}
CASES: dict[str, dict[str, Any]] = {
    "avg": {"family": "llava", "gamma": "avg"},
    "quantile": {"family": "qwen2_5_vl", "gamma": "quantile:0.5"},
    "token": {"family": "llava", "gamma": "6.0", "loss_normalization": "token"},
    "accumulated": {"family": "llava", "gamma": "6.0", "accumulation": 2},
    "accumulated_token": {"family": "qwen2_5_vl", "gamma": "avg", "accumulation": 2, "loss_normalization": "token"},
    "checkpointing": {"family": "llava", "gamma": "6.0", "gradient_checkpointing": True},
    "bf16": {"family": "llava", "gamma": "6.0", "accumulation": 2, "bf16": True},
    "one_rank_easy": {"family": "llava", "gamma": "inf", "posts": "one rank has rationales"},
    "one_rank_pictures": {"family": "llava", "gamma": "6.0", "posts": "one rank has pictures"},
    "no_pictures": {"family": "gemma3", "gamma": "6.0", "posts": "no pictures"},
    "short": {"family": "llava", "gamma": "avg", "posts": "nine", "max_steps": 5, "logging_steps": 2},
    "stream": {"family": "llama", "gamma": "avg", "posts": "stream", "on_invalid": "skip", "unique_ids": False},
    "aimkp": {**AIMKP, "family": "llava", **PROJECTOR},
    "aimkp_accumulated": {**AIMKP, "family": "qwen2_5_vl", "accumulation": 2, "gradient_checkpointing": True, **MERGER},
    "aimkp_one_rank_pictures": {**AIMKP, "family": "llava", "posts": "one rank has pictures", **PROJECTOR},
    "aimkp_short": {**AIMKP, "family": "llava", "posts": "nine", "max_steps": 5},
}
# Refused when the trainer is built.
ZERO3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}
REFUSED: dict[str, dict[str, Any]] = {"zero3": {"family": "llama", "deepspeed": ZERO3}}


def posts_of(kind: str, family: str) -> Any:
    """Without shuffling, rank 0 takes posts 0 and 1 of every global batch of 4, rank 1 posts 2 and 3."""
    count = 9 if kind == "nine" else 8
    posts = rows(family, count, images=kind != "no pictures")
    if kind == "stream":  # with a post in the second rank's share that cannot be trained on
        from datasets import IterableDataset

        columns = ("id", "text", "keyphrases", "rationale")
        posts.insert(2, posts[0] | {"keyphrases": []})
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
    case = {"method": "dynamic_cot", **(CASES | REFUSED)[name]}
    family, accumulation = case.pop("family"), case.pop("accumulation", 1)
    posts = posts_of(case.pop("posts", "eight"), family)
    AcceleratorState._reset_state()  # the process is the same as for the last case, its precision and ZeRO options may not be
    method = case.pop("method")
    if projector := case.pop("adapters", None):  # on the language model, and the whole projector: gradients in batches
        modules = r"^(?!.*(vision|visual|projector|lm_head)).*_proj$"
        case["peft_config"] = LoraConfig(r=4, target_modules=modules, modules_to_save=[projector], init_lora_weights=False)
        torch.manual_seed(0)
    log_option, log_file = LOGS[method]
    trainer = trainer_of(
        family,
        out / name,
        posts,
        classes=METHODS[method],
        eval_dataset=rows(family, 7),
        per_device_train_batch_size=4 // ranks // accumulation,
        per_device_eval_batch_size=4 // ranks,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        **{"max_steps": 4, log_option: True, **case},
    )
    assert trainer.accelerator.num_processes == ranks, f"{trainer.accelerator.num_processes} processes instead of {ranks}"
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    train_loss = trainer.train().training_loss
    metrics = trainer.evaluate()
    rank = trainer.accelerator.process_index
    visits = (out / name / log_file).read_text().splitlines()
    seen = {
        "world_size": trainer.accelerator.num_processes,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "state": trainer.method_state(),
        "checksum": sum(parameter.double().abs().sum().item() for parameter in trainer.model.parameters()),
        "train_loss": train_loss,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "metrics": {key: value for key, value in metrics.items() if "runtime" not in key and "per_second" not in key},
        "visits": sorted(map(json.loads, visits), key=lambda row: (row["step"], row["id"], row.get("modality"))),
    }
    (out / f"{name}.{rank}.json").write_text(json.dumps(seen))
    if rank == 0:
        after = trainer.model.state_dict()
        save_file({key: (after[key].float() - before[key].float()).contiguous() for key in before}, out / f"{name}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case_name in sys.argv[3:]:
        try:
            run(case_name, Path(sys.argv[1]), int(sys.argv[2]))
        except ValueError as error:  # on all ranks alike; a case that should not be refused then lacks its figures
            rank = dist.get_rank() if dist.is_initialized() else 0
            Path(sys.argv[1], f"{case_name}.{rank}.refused").write_text(str(error))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
