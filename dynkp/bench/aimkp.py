"""AimKP's step against plain fine-tuning, and against the published way of computing it.

Given   a LLaVA-shaped model with random weights (LoRA on the language model, a full projector, a frozen vision tower)
        and a batch of drawn posts, each with one picture.
Gives   one row for a step of the warm-up and one per stride: seconds and bytes of one forward and backward, and their ratios.
Holds   the steps are those of [`~dynkp.trainer.aimkp_trainer.AimKPTrainer`] itself, `training_step` on a collated batch.
        All ways compute logits at target positions only and are timed only once their losses and gradients agree: ours
        with the published way at the same stride, the warm-up with plain fine-tuning.

The ways:

- sft: plain fine-tuning, one forward and backward of the batch, with no trainer around it.
- warmup: the trainer's step in the first epoch, which masks nothing.
- ours: its step in a later epoch, every post masked with the row's stride.
- plain: the same with `similarity_backend="plain"`, the published way: three forwards and backwards for each post.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from PIL import Image

from dynkp.bench.dynamic_cot import AGREEMENT, QUICK, Sizes, build_model
from dynkp.bench.measure import Setting, Step, environment, median_seconds, peak_bytes
from dynkp.mechanics.masked_views import FULL
from dynkp.mechanics.stride_schedule import StrideSchedule
from dynkp.objectives.token_loss import target_loss
from dynkp.synthetic.tiny_model import IMAGE_TOKEN, build_tiny_vlm
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
    """Both ways' trainers around one model, and the batch they train on."""

    ours: AimKPTrainer
    plain: AimKPTrainer
    batch: dict[str, Any]


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measure the suite.

    Args:
        setting: device, threads, rounds and whether the model is the quick one.

    Yields:
        The warm-up's row (`stride` 1, `warmup_over_sft`), then one row per stride, as soon as it is measured. Times are
        medians, in seconds; memory is in MiB. `kept_lora_gradients_mib` is what LoRA's gradients of all posts and variants
        take, which `memory_over_sft_and_kept` adds to plain fine-tuning's peak.

    Raises:
        RuntimeError: if ways that compute the same disagree in loss or gradients, so that their times could not be compared.
    """
    sizes = QUICK if setting.quick else Sizes(reasoning_tokens=0)
    with tempfile.TemporaryDirectory(prefix="dynkp-bench-") as folder:
        bench = build(sizes, setting.device, folder)
        steps: dict[str, Step] = {"sft": partial(sft, bench), "ours": partial(warmup, bench)}
        memory, disagreement = first_round(bench, steps, "the warm-up", ("sft", "ours"))
        seconds = median_seconds(steps, setting)
        yield {
            **_row(bench, sizes, setting, 1, seconds, memory, disagreement),
            "warmup_over_sft": seconds["ours"] / seconds["sft"],
        }
        for stride in STRIDES:
            steps = {
                "sft": partial(sft, bench),
                "ours": partial(masked, bench, "ours"),
                "plain": partial(masked, bench, "plain"),
            }
            mask_with(bench, stride)
            memory, disagreement = first_round(bench, steps, f"stride {stride}", ("plain", "ours"))
            seconds = median_seconds(steps, setting)
            yield {
                **_row(bench, sizes, setting, stride, seconds, memory, disagreement),
                "plain_over_ours": seconds["plain"] / seconds["ours"],
                "plain_over_sft": seconds["plain"] / seconds["sft"],
                **kept_shares(bench.ours, stride),
            }


def _row(
    bench: Bench,
    sizes: Sizes,
    setting: Setting,
    stride: int,
    seconds: dict[str, float],
    memory: dict[str, int],
    disagreement: float,
) -> dict[str, Any]:
    parameters = list(bench.ours.model.parameters())
    kept = kept_gradients_bytes(bench) if stride > 1 else 0
    return {
        "suite": SUITE,
        "label": "warm-up" if stride == 1 else f"stride {stride}",
        "stride": stride,
        "batch_size": len(bench.batch["id"]),
        "ours_over_sft": seconds["ours"] / seconds["sft"],
        "memory_over_sft": memory["ours"] / memory["sft"],
        "memory_over_sft_and_kept": memory["ours"] / (memory["sft"] + kept),
        **{f"{name}_s": value for name, value in seconds.items()},
        **{f"{name}_mib": value / 2**20 for name, value in memory.items()},
        "kept_lora_gradients_mib": kept / 2**20,
        "largest_disagreement": disagreement,
        "image_tokens": sizes.image_tokens,
        "prompt_tokens": int(bench.batch["prompt"]["attention_mask"].sum(dim=1).max()),
        "target_tokens": max(bench.batch["direct"]["lengths"]),
        **{name: getattr(sizes, name) for name in ("hidden", "layers", "vision_hidden", "vision_layers")},
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trained_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "quick": setting.quick,
        **environment(setting),
    }


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the printed table, under `HEADINGS`."""
    plain = f"{row['plain_over_ours']:.2f}" if "plain_over_ours" in row else "-"
    memory = ", ".join(f"{row[f'{way}_mib']:.0f}" if f"{way}_mib" in row else "-" for way in WAYS)
    ratios = (f"{row[key]:.2f}" for key in ("memory_over_sft", "memory_over_sft_and_kept"))
    return row["label"], f"{row['ours_over_sft']:.2f}", plain, *ratios, memory


# The ways


def sft(bench: Bench) -> torch.Tensor:
    """One forward and backward, the mean over target tokens."""
    model, targets = bench.ours.model, bench.batch["direct"]
    model.zero_grad()
    log_probs = bench.ours.open_prompt(model, bench.batch["prompt"]).log_probs(targets)
    loss = target_loss(log_probs, targets["weights"]).total.sum() / targets["weights"].sum()
    loss.backward()
    return loss.detach()


def warmup(bench: Bench) -> torch.Tensor:
    """The trainer's step before any masking."""
    return _training_step(bench.ours, bench.batch, epoch=0)


def masked(bench: Bench, way: str) -> torch.Tensor:
    """The trainer's step afterwards, ours or the published way."""
    return _training_step(getattr(bench, way), bench.batch, epoch=1)


def _training_step(trainer: AimKPTrainer, batch: dict[str, Any], epoch: int) -> torch.Tensor:
    trainer.model.zero_grad()
    trainer.state.epoch = epoch + 0.5
    tokens = torch.tensor(sum(batch["direct"]["lengths"]), device=trainer.args.device)
    loss = trainer.training_step(trainer.model, dict(batch), tokens)
    trainer.end_of_step()
    return loss


def mask_with(bench: Bench, stride: int) -> None:
    """Give every post this stride in the second epoch, whatever its visits in it."""
    for trainer in (bench.ours, bench.plain):
        trainer.schedule = StrideSchedule(bench.batch["id"], initial_stride=stride, warmup_epochs=1)


def first_round(bench: Bench, steps: dict[str, Step], what: str, same: tuple[str, str]) -> tuple[dict[str, int], float]:
    """Warm up, and see what each step needs and whether those that should compute the same.

    Returns:
        Peak bytes of each step; and the larger difference, in the loss or in the whole gradient, between the two of `same`,
        relative to the first.
    """
    memory, results = {}, {}
    parameters = [parameter for parameter in bench.ours.model.parameters() if parameter.requires_grad]
    for name, step in steps.items():
        bench.ours.model.zero_grad()  # or the gradients of the step before would be released in this one
        memory[name], loss = peak_bytes(step, parameters[0].device)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if len(gradients) < len(parameters):
            raise RuntimeError(f"{what}: {name} gave {len(gradients)} of {len(parameters)} trained parameters a gradient.")
        results[name] = loss.double(), torch.cat([gradient.double().flatten() for gradient in gradients])
    (loss, gradient), (other_loss, other_gradient) = (results[name] for name in same)
    differences = (other_loss - loss).abs() / loss.abs(), (other_gradient - gradient).norm() / gradient.norm()
    if not all(difference <= AGREEMENT for difference in differences):
        raise RuntimeError(
            f"{what}: {same[1]} and {same[0]} differ by {differences[0]:.1e} in the loss and {differences[1]:.1e} in the "
            f"gradient, more than {AGREEMENT:g}: they do not compute the same, so their times mean nothing."
        )
    return memory, max(float(difference) for difference in differences)


def kept_shares(trainer: AimKPTrainer, stride: int) -> dict[str, float]:
    """Of each modality, the share of posts whose variant passed the filter: their next stride is the doubled one."""
    shares = {modality: trainer.schedule.shares(modality) for modality in trainer.args.modalities}
    return {f"{modality}_kept_share": strides.get(2 * stride, 0.0) for modality, strides in shares.items()}


def kept_gradients_bytes(bench: Bench) -> int:
    """What LoRA's gradients take, of every post given every variant: kept until the filter has decided."""
    sizes = [
        parameter.numel() * parameter.element_size()
        for name, parameter in bench.ours.model.named_parameters()
        if parameter.requires_grad and "lora_" in name
    ]
    return sum(sizes) * len(bench.batch["id"]) * len((FULL, *bench.ours.args.modalities))


# Model and posts


def build(sizes: Sizes, device: torch.device, folder: str) -> Bench:
    """Trainers and batch, on the device.

    Args:
        sizes: of model and posts.
        device: where both are.
        folder: for the trainers to call their own; nothing is written to it.
    """
    posts = draw_posts(sizes)
    texts = [" ".join([post["text"], *post["keyphrases"]]) for post in posts]
    _, processor = build_tiny_vlm(texts, image_size=14 * sizes.image_side, patch_size=14)
    # A word of the drawn posts is one token, so the tokenizer needs few; the embeddings have the model's own size.
    sizes = sizes._replace(vocabulary=max(sizes.vocabulary, len(processor.tokenizer)))
    model = build_model(sizes)
    model.get_base_model().config.image_token_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    model.to(device)

    def trainer(backend: str) -> AimKPTrainer:
        args = AimKPConfig(
            output_dir=folder,
            per_device_train_batch_size=sizes.batch,
            similarity_backend=backend,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=device.type == "cpu",
            report_to="none",
            disable_tqdm=True,
            eval_generation_posts=0,
        )
        return AimKPTrainer(model=model, args=args, train_dataset=posts, processing_class=processor)

    bench = Bench(trainer("batched"), trainer("plain"), {})
    return bench._replace(batch=send_to_device(bench.plain.data_collator(posts), device))


def draw_posts(sizes: Sizes) -> list[dict[str, Any]]:
    """Posts of random words, all equally long, and of noise."""
    generator = random.Random(1)
    pixels = np.random.default_rng(1)
    side = 14 * sizes.image_side
    words = [f"{first}{second}" for first in "bcdfghklmnprstvw" for second in ("ab", "ed", "ig", "ol", "up", "ox")]

    def draw(count: int) -> str:
        return " ".join(generator.sample(words, count))

    return [
        {
            "id": str(index),
            "text": draw(sizes.text_tokens),
            "keyphrases": [draw(sizes.direct_tokens - 1)],  # and the end of the turn
            "images": [Image.fromarray(pixels.integers(0, 256, (side, side, 3), dtype=np.uint8))],
        }
        for index in range(sizes.batch)
    ]
