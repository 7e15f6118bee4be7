"""MulCoT-RD's student against plain training on both tasks: what the assistant's soft labels cost.

Given   the small model of `dynkp.bench.workload` as student, an assistant about twice its size, and a batch of posts with a
        label and a response chain each.
Gives   one row per setting: seconds and bytes of one forward and backward, and their ratios.
Holds   the ways that compute the same agree in loss and gradients before any is timed: cached (all tokens kept) and online,
        plain and twice.

The ways, each but the last a training step of [`~dynkp.trainer.mulcot_rd_trainer.MulCoTRDTrainer`]:

- plain: both tasks on their hard labels alone (λ = 0), the prompts' common beginning computed once.
- twice: the same with `prompt_backend="plain"`, each task in an ordinary forward of its own.
- cached: the student's step with K soft labels per token from the disk, reading included.
- online: the student's step with the assistant's forward in it.
- assistant: that forward alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import send_to_device

from dynkp.batches.two_task_collator import TwoTaskCollator
from dynkp.bench.measure import Setting, Step, first_round, median_seconds
from dynkp.bench.steps import train
from dynkp.bench.workload import QUICK, Sizes, build_model, build_processor, build_trainer, columns, draw_posts
from dynkp.distillation.assistant import Assistant
from dynkp.distillation.soft_labels import SoftLabelWriter, task_fingerprint, write_soft_labels
from dynkp.trainer.mulcot_rd_config import MulCoTRDConfig
from dynkp.trainer.mulcot_rd_trainer import MulCoTRDTrainer

SUITE = "mulcot_rd"
HEADINGS = (
    "soft labels",
    "cached / plain",
    "online / (plain + assistant)",
    "plain / two forwards",
    "peak MiB: plain, cached, online",
)

TEMPERATURE, DISTILLATION_WEIGHT = 2.0, 0.3


class Scenario(NamedTuple):
    """One row.

    Attributes:
        top_k: Tokens that the cache keeps of each of the assistant's distributions.
        checkpointing: Whether gradient checkpointing is on.
    """

    top_k: int
    checkpointing: bool = False

    @property
    def label(self) -> str:
        """The row's name in the table."""
        return f"top {self.top_k}" + ", gradient checkpointing" * self.checkpointing


SCENARIOS = (Scenario(64), Scenario(256), Scenario(64, checkpointing=True))


class Bench:
    """The trainers around one student, their assistant, and the batch they train on.

    Args:
        sizes: Sizes of the student and its posts; the assistant has twice the layers, about what 7B is to 3B.
        device: Where models and batch are.
        folder: The trainers' `output_dir`, and where soft labels are written.
    """

    def __init__(self, sizes: Sizes, device: torch.device, folder: str):
        self.folder = folder
        self.processor = build_processor(sizes)
        self.posts = draw_posts(sizes)
        self.student = build_model(sizes, self.processor).to(device)
        larger = sizes._replace(layers=2 * sizes.layers)
        self.assistant = Assistant(build_model(larger, self.processor).to(device))
        self.plain = self.trainer(distillation_weight=0.0)
        self.twice = self.trainer(distillation_weight=0.0, prompt_backend="plain")
        self.online = self.trainer(assistant=self.assistant)
        self.batch: dict[str, Any] = send_to_device(self.plain.data_collator(self.posts), device)

    def trainer(self, **options: Any) -> MulCoTRDTrainer:
        """Build a trainer of the student; `options` go to `build_trainer`."""
        options = {"temperature": TEMPERATURE, "distillation_weight": DISTILLATION_WEIGHT, **options}
        return build_trainer(MulCoTRDTrainer, MulCoTRDConfig, self.student, self.posts, self.processor, self.folder, **options)

    def with_cache(self, top_k: int) -> MulCoTRDTrainer:
        """Write the batch's soft labels to a folder of their own, and build a trainer that reads them."""
        vocabulary, collator = self.assistant.vocabulary, cast(TwoTaskCollator, self.plain.data_collator)
        folder = f"{self.folder}/top-{top_k}"
        settings = {"task": task_fingerprint(self.plain.task), "temperature": TEMPERATURE, "vocabulary": vocabulary}
        writer = SoftLabelWriter(folder, settings, self.processor.tokenizer)
        write_soft_labels(
            writer,
            self.assistant,
            collator,
            self.plain.train_dataset,
            top_k=min(top_k, vocabulary),
            temperature=TEMPERATURE,
            batch_size=len(self.posts),
            progress=False,
        )
        writer.close()
        return self.trainer(soft_labels=folder)


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measure the suite.

    Args:
        setting: Device, threads, rounds and whether the models are the quick ones.

    Yields:
        One row per scenario, as soon as it is measured. Times are medians, in seconds; memory is in MiB.

    Raises:
        RuntimeError: If ways that compute the same disagree in loss or gradients, so that their times could not be compared.
    """
    sizes = QUICK if setting.quick else Sizes(batch=2)
    with tempfile.TemporaryDirectory(prefix="dynkp-bench-") as folder:
        bench = Bench(sizes, setting.device, folder)
        student = bench.student
        whole = bench.with_cache(bench.assistant.vocabulary)
        pair: dict[str, Step] = {"online": partial(online, bench), "cached": partial(cached, bench, whole)}
        disagreement = first_round(student, pair, "soft labels of every token", {"cached": "online"}).disagreement
        for scenario in SCENARIOS:
            trainer = bench.with_cache(scenario.top_k)
            if scenario.checkpointing:
                student.activation_checkpointing_enable({"use_reentrant": False})
            steps: dict[str, Step] = {
                "plain": partial(plain, bench),
                "twice": partial(twice, bench),
                "cached": partial(cached, bench, trainer),
                "online": partial(online, bench),
            }
            found = first_round(student, steps, scenario.label, {"twice": "plain"})
            steps["assistant"] = partial(bench.assistant.logits, bench.batch["prompts"], answers_of(bench))
            steps["assistant"]()  # once untimed, as the others
            seconds = median_seconds(steps, setting)
            if scenario.checkpointing:
                student.activation_checkpointing_disable()
            found = found._replace(disagreement=max(disagreement, found.disagreement))
            yield {
                "suite": SUITE,
                "label": scenario.label,
                **scenario._asdict(),
                "cached_over_plain": seconds["cached"] / seconds["plain"],
                "online_over_plain_and_assistant": seconds["online"] / (seconds["plain"] + seconds["assistant"]),
                "plain_over_twice": seconds["plain"] / seconds["twice"],
                **columns(setting, sizes, student, seconds, found),
                "assistant_parameters": sum(parameter.numel() for parameter in bench.assistant.model.parameters()),
            }


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Format a row for the printed table, under `HEADINGS`."""
    ratios = (f"{row[key]:.2f}" for key in ("cached_over_plain", "online_over_plain_and_assistant", "plain_over_twice"))
    memory = ", ".join(f"{row[f'{name}_mib']:.0f}" for name in ("plain", "cached", "online"))
    return row["label"], *ratios, memory


# The ways


def plain(bench: Bench) -> torch.Tensor:
    """Run the student's training step without soft labels."""
    return train(bench.plain, bench.batch)


def twice(bench: Bench) -> torch.Tensor:
    """Run the student's training step without soft labels, each task in a forward of its own."""
    return train(bench.twice, bench.batch)


def cached(bench: Bench, trainer: MulCoTRDTrainer) -> torch.Tensor:
    """Read the batch's soft labels from the disk, as the data loader does, and run the student's training step with them."""
    assert trainer.cache is not None
    labels = trainer.cache.of_batch(bench.batch["id"], send_to_device(answers_of(bench), "cpu"))
    return train(trainer, {**bench.batch, "soft_labels": labels})


def online(bench: Bench) -> torch.Tensor:
    """Run the student's training step with the assistant's forward in it."""
    return train(bench.online, bench.batch)


def answers_of(bench: Bench) -> dict[str, Any]:
    """The batch's targets of both tasks."""
    return {task: bench.batch[task] for task in bench.plain.target_kinds}
