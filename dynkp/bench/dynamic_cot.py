"""Dynamic CoT against knowing its choices beforehand (oracle) and against computing every prompt twice (naive).

Given   the small model of `dynkp.bench.workload` and a batch of its posts, of which a wanted share is easy.
Gives   one row per share: seconds and bytes of one forward and backward, and their ratios.
Holds   all three ways compute logits at target positions only and are timed only once their losses and gradients agree.

The three ways:

- oracle: plain fine-tuning on the targets that the switch would choose, known beforehand, with transformers alone. Posts
  whose lengths agree go through the model together, so nothing is padded.
- naive: a pass without gradients over prompts and direct targets, then plain fine-tuning on the chosen targets, in one
  padded batch. Prompt and vision tower are computed twice.
- ours: the training step of [`~dynkp.trainer.dynamic_cot_trainer.DynamicCoTTrainer`].

Easy posts are those with a rationale, at γ = inf; where none is to be easy, every post has a rationale and γ is 0.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device

from dynkp.batches.targets import select, targets_of
from dynkp.bench.measure import Setting, Step, first_round, median_seconds
from dynkp.bench.steps import TwoPassTrainer, fine_tune, train
from dynkp.bench.workload import QUICK, Sizes, build_model, build_processor, build_trainer, columns, draw_posts
from dynkp.trainer.dynamic_cot_config import DynamicCoTConfig
from dynkp.trainer.dynamic_cot_trainer import DynamicCoTTrainer

SUITE = "dynamic_cot"
HEADINGS = ("share of easy posts", "naive / oracle", "ours / oracle", "naive / ours", "peak MiB: oracle, naive, ours")


class Scenario(NamedTuple):
    """One row.

    Attributes:
        easy_share: Share of the batch's posts that are easy, between 0 and 1.
        checkpointing: Whether gradient checkpointing is on.
        unequal: Whether posts have texts and targets of half to one and a half times the usual length.
    """

    easy_share: float
    checkpointing: bool = False
    unequal: bool = False

    @property
    def label(self) -> str:
        """The row's name in the table."""
        notes = ["gradient checkpointing"] * self.checkpointing + ["unequal lengths"] * self.unequal
        return ", ".join([f"{self.easy_share:g}", *notes])


SCENARIOS = (
    *(Scenario(share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)),
    Scenario(0.5, checkpointing=True),
    Scenario(0.5, unequal=True),
)


class Bench(NamedTuple):
    """The trainers of one scenario around one model, and the batch they train on.

    Attributes:
        ours: The trainer that is measured.
        naive: Its reference with two passes.
        batch: A batch of `ours`' collator.
        easy: For each post, whether the switch chooses its reasoning target.
    """

    ours: DynamicCoTTrainer
    naive: TwoPassTrainer
    batch: dict[str, Any]
    easy: list[bool]


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measure the suite.

    Args:
        setting: Device, threads, rounds and whether the model is the quick one.

    Yields:
        One row per scenario, as soon as it is measured. Times are medians, in seconds; memory is in MiB.

    Raises:
        RuntimeError: If the three ways disagree in loss or gradients, so that their times could not be compared.
    """
    sizes = QUICK if setting.quick else Sizes()
    processor = build_processor(sizes)
    model = build_model(sizes, processor).to(setting.device)
    for scenario in SCENARIOS:
        with tempfile.TemporaryDirectory(prefix="dynkp-bench-") as folder:
            bench = build(model, processor, sizes, scenario, folder)
            steps: dict[str, Step] = {way.__name__: partial(way, bench) for way in (oracle, naive, ours)}
            found = first_round(model, steps, scenario.label, {"naive": "oracle", "ours": "oracle"})
            seconds = median_seconds(steps, setting)
            if scenario.checkpointing:
                model.activation_checkpointing_disable()
        yield {
            "suite": SUITE,
            "label": scenario.label,
            **scenario._asdict(),
            "ours_over_oracle": seconds["ours"] / seconds["oracle"],
            "naive_over_oracle": seconds["naive"] / seconds["oracle"],
            "naive_over_ours": seconds["naive"] / seconds["ours"],
            **columns(setting, sizes, model, seconds, found),
        }


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Format a row for the printed table, under `HEADINGS`."""
    ratios = (f"{row[key]:.2f}" for key in ("naive_over_oracle", "ours_over_oracle", "naive_over_ours"))
    memory = ", ".join(f"{row[f'{name}_mib']:.0f}" for name in ("oracle", "naive", "ours"))
    return row["label"], *ratios, memory


def build(model: Any, processor: Any, sizes: Sizes, scenario: Scenario, folder: str) -> Bench:
    """Build the trainers and the batch of a scenario.

    Args:
        model: The model, on its device; gradient checkpointing is turned on where the scenario asks for it.
        processor: Its processor.
        sizes: Sizes of the posts.
        scenario: Which posts are easy, and how long they are.
        folder: The trainers' `output_dir`; nothing is written to it.
    """
    if scenario.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    easy = [index < round(scenario.easy_share * sizes.batch) for index in range(sizes.batch)]
    # Without easy posts all have a rationale: the step must not know beforehand that it needs none.
    posts = draw_posts(sizes, easy if any(easy) else None, scenario.unequal)
    gamma = "inf" if any(easy) else "0"
    ours = build_trainer(DynamicCoTTrainer, DynamicCoTConfig, model, posts, processor, folder, gamma=gamma)
    naive = build_trainer(
        TwoPassTrainer,
        DynamicCoTConfig,
        model,
        posts,
        processor,
        folder,
        gamma=gamma,
        strategy="direct",
        prompt_backend="plain",
    )
    return Bench(ours, naive, send_to_device(ours.data_collator(posts), ours.args.device), easy)


# The three ways


def oracle(bench: Bench) -> torch.Tensor:
    """Run one forward and backward per group of posts of equal lengths, on the right targets at once."""
    bench.ours.model.zero_grad()
    batch = bench.batch
    prompt_lengths = batch["prompt"]["attention_mask"].sum(dim=1).tolist()
    groups: dict[tuple[bool, int, int], list[int]] = {}
    for index, (easy, prompt_length) in enumerate(zip(bench.easy, prompt_lengths, strict=True)):
        length = batch["reasoning" if easy else "direct"]["lengths"][index]
        groups.setdefault((easy, prompt_length, length), []).append(index)
    losses = []
    for (easy, prompt_length, _), indices in groups.items():
        targets = targets_of(batch["reasoning" if easy else "direct"], indices)
        prompt = {key: select(value, indices) for key, value in batch["prompt"].items()}
        prompt.update({key: prompt[key][:, -prompt_length:] for key in ("input_ids", "attention_mask")})
        losses.append(fine_tune(bench.ours.model, prompt, targets, share=len(indices) / len(bench.easy)))
    return torch.stack(losses).sum()


def naive(bench: Bench) -> torch.Tensor:
    """Run a pass to decide and a pass to train."""
    return train(bench.naive, bench.batch)


def ours(bench: Bench) -> torch.Tensor:
    """Run the trainer's training step."""
    return train(bench.ours, bench.batch)
