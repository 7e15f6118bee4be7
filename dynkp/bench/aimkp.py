"""AimKP's step against plain fine-tuning, and against the published way of computing it.

Given   the small model of `dynkp.bench.workload` and a batch of its posts, each with one image.
Gives   one row for a step of the warm-up and one per stride: seconds and bytes of one forward and backward, and their ratios.
Holds   all ways compute logits at target positions only and are timed only once their losses and gradients agree: ours with
        the published way at the same stride, the warm-up with plain fine-tuning.

The ways:

- sft: plain fine-tuning, one forward and backward of the batch, with transformers alone.
- warmup: the training step of [`~dynkp.trainer.aimkp_trainer.AimKPTrainer`] in the first epoch, which masks nothing.
- ours: its step in a later epoch, every post masked with the row's stride.
- plain: the same with `similarity_backend="plain"`, the published way: three forwards and backwards for each post.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device

from dynkp.bench.measure import FirstRound, Setting, Step, first_round, median_seconds
from dynkp.bench.steps import fine_tune, train, train_masked
from dynkp.bench.workload import QUICK, Sizes, build_model, build_processor, build_trainer, columns, draw_posts
from dynkp.trainer.aimkp_config import AimKPConfig
from dynkp.trainer.aimkp_trainer import AimKPTrainer

SUITE = "aimkp"
HEADINGS = (
    "stride",
    "ours / fine-tuning",
    "plain / ours",
    "memory: ours / fine-tuning",
    "ours / (fine-tuning + kept gradients)",
    "peak MiB: fine-tuning, ours, plain",
)

STRIDES = (2, 4, 8)
WAYS = ("sft", "ours", "plain")


class Bench(NamedTuple):
    """Two trainers around one model, and the batch they train on.

    Attributes:
        ours: The trainer that is measured.
        plain: The same with `similarity_backend="plain"`.
        batch: A batch of `plain`'s collator, on the device.
        sizes: Sizes of model and posts.
    """

    ours: AimKPTrainer
    plain: AimKPTrainer
    batch: dict[str, Any]
    sizes: Sizes


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measure the suite.

    Args:
        setting: Device, threads, rounds and whether the model is the quick one.

    Yields:
        The warm-up's row (`stride` 1, `warmup_over_sft`), then one row per stride, as soon as it is measured. Times are
        medians, in seconds; memory is in MiB. `kept_lora_gradients_mib` is the size of LoRA's gradients of all posts and
        variants; the ratio `memory_over_sft_and_kept` adds it to plain fine-tuning's peak.

    Raises:
        RuntimeError: If ways that compute the same disagree in loss or gradients, so that their times could not be compared.
    """
    with tempfile.TemporaryDirectory(prefix="dynkp-bench-") as folder:
        bench = build(QUICK if setting.quick else Sizes(), setting.device, folder)
        model = bench.ours.model
        steps: dict[str, Step] = {"sft": partial(sft, bench), "ours": partial(warmup, bench)}
        found = first_round(model, steps, "the warm-up", {"ours": "sft"})
        seconds = median_seconds(steps, setting)
        yield {**_row(bench, setting, 1, seconds, found), "warmup_over_sft": seconds["ours"] / seconds["sft"]}
        for stride in STRIDES:
            steps = {
                "sft": partial(sft, bench),
                "ours": partial(train_masked, bench.ours, bench.batch, stride),
                "plain": partial(train_masked, bench.plain, bench.batch, stride),
            }
            found = first_round(model, steps, f"stride {stride}", {"ours": "plain"})
            seconds = median_seconds(steps, setting)
            yield {
                **_row(bench, setting, stride, seconds, found),
                "plain_over_ours": seconds["plain"] / seconds["ours"],
                "plain_over_sft": seconds["plain"] / seconds["sft"],
                **kept_shares(bench.ours, stride),
            }


def _row(bench: Bench, setting: Setting, stride: int, seconds: dict[str, float], found: FirstRound) -> dict[str, Any]:
    memory = found.memory
    kept = kept_gradients_bytes(bench) if stride > 1 else 0
    return {
        "suite": SUITE,
        "label": "warm-up" if stride == 1 else f"stride {stride}",
        "stride": stride,
        "batch_size": len(bench.batch["id"]),
        "ours_over_sft": seconds["ours"] / seconds["sft"],
        "memory_over_sft": memory["ours"] / memory["sft"],
        "memory_over_sft_and_kept": memory["ours"] / (memory["sft"] + kept),
        "kept_lora_gradients_mib": kept / 2**20,
        "prompt_tokens": int(bench.batch["prompt"]["attention_mask"].sum(dim=1).max()),
        "target_tokens": max(bench.batch["direct"]["lengths"]),
        **columns(setting, bench.sizes, bench.ours.model, seconds, found),
    }


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Format a row for the printed table, under `HEADINGS`."""
    plain = f"{row['plain_over_ours']:.2f}" if "plain_over_ours" in row else "-"
    memory = ", ".join(f"{row[f'{way}_mib']:.0f}" if f"{way}_mib" in row else "-" for way in WAYS)
    ratios = (f"{row[key]:.2f}" for key in ("memory_over_sft", "memory_over_sft_and_kept"))
    return row["label"], f"{row['ours_over_sft']:.2f}", plain, *ratios, memory


# The ways, beside `train_masked`


def sft(bench: Bench) -> torch.Tensor:
    """Run one forward and backward of the batch, the loss the mean over target tokens."""
    bench.ours.model.zero_grad()
    return fine_tune(bench.ours.model, bench.batch["prompt"], bench.batch["direct"])


def warmup(bench: Bench) -> torch.Tensor:
    """Run the trainer's training step of the first epoch."""
    bench.ours.begin_training()
    bench.ours.state.epoch = 0.5
    return train(bench.ours, bench.batch)


def kept_shares(trainer: AimKPTrainer, stride: int) -> dict[str, float]:
    """Read from the schedule, per modality, the share of posts whose variant passed the filter at this stride.

    Their next stride is the doubled one.
    """
    return {f"{name}_kept_share": trainer.schedule.shares(name).get(2 * stride, 0.0) for name in trainer.args.modalities}


def kept_gradients_bytes(bench: Bench) -> int:
    """Compute the size of LoRA's gradients of every post and variant, which exist until the filter has decided."""
    sizes = [
        parameter.numel() * parameter.element_size()
        for name, parameter in bench.ours.model.named_parameters()
        if parameter.requires_grad and "lora_" in name
    ]
    views = 1 + len(bench.ours.args.modalities)  # the full input, and a variant per modality
    return sum(sizes) * len(bench.batch["id"]) * views


def build(sizes: Sizes, device: torch.device, folder: str) -> Bench:
    """Build the model, the trainers and the batch.

    Args:
        sizes: Sizes of model and posts; the posts have no rationale.
        device: Where model and batch are.
        folder: The trainers' `output_dir`; nothing is written to it.
    """
    sizes = sizes._replace(reasoning_tokens=0)
    processor, posts = build_processor(sizes), draw_posts(sizes)
    model = build_model(sizes, processor).to(device)
    ours, plain = (
        build_trainer(AimKPTrainer, AimKPConfig, model, posts, processor, folder, similarity_backend=backend)
        for backend in ("batched", "plain")
    )
    return Bench(ours, plain, send_to_device(plain.data_collator(posts), device), sizes)
