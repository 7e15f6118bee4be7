"""MulCoT-RD's student against plain training on both tasks: what the assistant's soft labels cost.

Given   the LLaVA-shaped student of `dynkp.bench.dynamic_cot`, an assistant about twice its size, and a batch of random
        posts with both tasks' prompts and answers.
Gives   one row per setting: seconds and bytes of one forward and backward, and their ratios.
Holds   the ways that compute the same agree in loss and gradients before any is timed: cached (all tokens kept) and online.

The ways:

- plain: both tasks on their hard labels alone (λ = 0), the prompts' common beginning computed once, as the trainer does.
- twice: the same, each task in an ordinary forward of its own.
- cached: the student's step with K soft labels per token from the disk, reading included.
- online: the student's step with the assistant's forward in it.
- assistant: that forward alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from dynkp.batches.branches import Branches
from dynkp.batches.targets import Targets
from dynkp.bench.dynamic_cot import AGREEMENT, QUICK, Sizes, build_model
from dynkp.bench.measure import Setting, Step, environment, median_seconds, peak_bytes
from dynkp.data.reasoning_tasks import REASONING_TASKS
from dynkp.distillation.assistant import Assistant
from dynkp.distillation.soft_labels import SoftLabelCache, SoftLabelWriter
from dynkp.mechanics.branched_prompt import PlainBranches, SharedBranches
from dynkp.objectives.distillation import (
    SoftLabels,
    distilled,
    hard_label_loss,
    multitask_loss,
    soft_label_divergence,
    truncate,
)
from dynkp.objectives.token_loss import TargetLoss, sum_per_post

SUITE = "mulcot_rd"
HEADINGS = (
    "soft labels",
    "cached / plain",
    "online / (plain + assistant)",
    "plain / two forwards",
    "peak MiB: plain, cached, online",
)

TEMPERATURE, WEIGHT = 2.0, 0.3
# Tokens of the two prompts behind what they share, and of the label's answer: those of task "masc" with Qwen's tokenizer.
LABEL_END, CHAIN_END, LABEL_TOKENS = 16, 96, 8


class Scenario(NamedTuple):
    """One row: how many of the assistant's tokens the cache keeps."""

    top_k: int
    checkpointing: bool = False

    @property
    def label(self) -> str:
        return f"top {self.top_k}" + ", gradient checkpointing" * self.checkpointing


SCENARIOS = (Scenario(64), Scenario(256), Scenario(64, checkpointing=True))


class Batch(NamedTuple):
    """Posts as the collator would give them, and where their soft labels lie."""

    ids: list[str]
    branches: Branches
    answers: dict[str, Targets]
    cache: SoftLabelCache


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measure the suite.

    Args:
        setting: device, threads, rounds and whether the models are the quick ones.

    Yields:
        One row per scenario, as soon as it is measured. Times are medians, in seconds; memory is in MiB.

    Raises:
        RuntimeError: if online training and training from a whole cache disagree, so that their times could not be compared.
    """
    sizes = QUICK if setting.quick else Sizes(batch=2)
    student = build_model(sizes).to(setting.device)
    assistant = build_assistant(sizes, setting.device)
    with tempfile.TemporaryDirectory(prefix="dynkp-bench-") as folder:
        whole = draw_batch(assistant, sizes, f"{folder}/whole", top_k=sizes.vocabulary)
        disagreement = compare(student, assistant, whole)
        for scenario in SCENARIOS:
            if scenario.checkpointing:
                student.activation_checkpointing_enable({"use_reentrant": False})
            top_k = min(scenario.top_k, sizes.vocabulary)
            batch = draw_batch(assistant, sizes, f"{folder}/{top_k}", top_k=top_k)
            steps: dict[str, Step] = {
                "plain": partial(plain, student, batch),
                "twice": partial(twice, student, batch),
                "cached": partial(cached, student, batch),
                "online": partial(online, student, assistant, batch),
                "assistant": partial(assistant.logits, batch.branches, batch.answers),
            }
            for step in steps.values():  # the first round, which is not timed
                step()
            memory = {}
            for name in ("plain", "cached", "online"):
                student.zero_grad()
                memory[name], _ = peak_bytes(steps[name], setting.device)
            seconds = median_seconds(steps, setting)
            if scenario.checkpointing:
                student.activation_checkpointing_disable()
            yield {
                "suite": SUITE,
                "label": scenario.label,
                **scenario._asdict(),
                "cached_over_plain": seconds["cached"] / seconds["plain"],
                "online_over_plain_and_assistant": seconds["online"] / (seconds["plain"] + seconds["assistant"]),
                "plain_over_twice": seconds["plain"] / seconds["twice"],
                **{f"{name}_s": value for name, value in seconds.items()},
                **{f"{name}_mib": value / 2**20 for name, value in memory.items()},
                "largest_disagreement": disagreement,
                **sizes._asdict(),
                "image_tokens": sizes.image_tokens,
                "parameters": sum(parameter.numel() for parameter in student.parameters()),
                "assistant_parameters": sum(parameter.numel() for parameter in assistant.model.parameters()),
                "quick": setting.quick,
                **environment(setting),
            }


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the printed table, under `HEADINGS`."""
    ratios = (f"{row[key]:.2f}" for key in ("cached_over_plain", "online_over_plain_and_assistant", "plain_over_twice"))
    memory = ", ".join(f"{row[f'{name}_mib']:.0f}" for name in ("plain", "cached", "online"))
    return row["label"], *ratios, memory


# The ways


def plain(model: nn.Module, batch: Batch) -> torch.Tensor:
    return _step(model, SharedBranches, batch, {})


def twice(model: nn.Module, batch: Batch) -> torch.Tensor:
    return _step(model, PlainBranches, batch, {})


def cached(model: nn.Module, batch: Batch) -> torch.Tensor:
    device = batch.branches["prompt"]["input_ids"].device
    labels = batch.cache.of_batch(batch.ids, {task: _on_host(answers) for task, answers in batch.answers.items()})
    soft_labels = {
        task: SoftLabels(parts["ids"].to(device), parts["log_probs"].to(device), parts["rest"].to(device), parts["vocabulary"])
        for task, parts in labels.items()
    }
    return _step(model, SharedBranches, batch, soft_labels)


def online(model: nn.Module, assistant: Assistant, batch: Batch) -> torch.Tensor:
    return _step(model, SharedBranches, batch, assistant.logits(batch.branches, batch.answers))


def _step(model: nn.Module, backend: Any, batch: Batch, soft_labels: dict[str, Any]) -> torch.Tensor:
    """`MulCoTRDTrainer.compute_post_losses` and the mean over posts."""
    model.zero_grad()
    student = backend(model, batch.branches)
    losses: list[TargetLoss] = []
    for task, answers in batch.answers.items():
        logits = student.logits(task, answers)
        loss = sum_per_post(hard_label_loss(logits, answers["input_ids"][answers["mask"]]), answers["mask"])
        if soft_labels:
            divergence = soft_label_divergence(logits, soft_labels[task], TEMPERATURE)
            loss = distilled(loss, sum_per_post(divergence, answers["mask"]), WEIGHT)
        losses.append(loss)
    total, weight = multitask_loss(losses, [1.0] * len(losses))
    mean = total.sum() / weight.sum()
    mean.backward()
    return mean.detach()


def compare(student: nn.Module, assistant: Assistant, whole: Batch) -> float:
    """The largest difference, in the loss or in the whole gradient, between online and a cache that keeps every token."""
    results = []
    for step in (partial(online, student, assistant, whole), partial(cached, student, whole)):
        loss = step()
        gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
        results.append((loss.double(), torch.cat([gradient.double().flatten() for gradient in gradients])))
    (loss, gradient), (other_loss, other_gradient) = results
    differences = (other_loss - loss).abs() / loss.abs(), (other_gradient - gradient).norm() / gradient.norm()
    if not all(difference <= AGREEMENT for difference in differences):
        raise RuntimeError(
            f"online and cached differ by {differences[0]:.1e} in the loss and {differences[1]:.1e} in the gradient, more than "
            f"{AGREEMENT:g}: they do not compute the same, so their times mean nothing."
        )
    return max(float(difference) for difference in differences)


# Models and posts


def build_assistant(sizes: Sizes, device: torch.device) -> Assistant:
    """A model of the student's shape with twice its layers: about what 7B is to 3B."""
    return Assistant(build_model(sizes._replace(layers=2 * sizes.layers)).to(device))


def draw_batch(assistant: Assistant, sizes: Sizes, folder: str, top_k: int) -> Batch:
    """Random posts, and the assistant's labels of them in a folder."""
    generator = torch.Generator().manual_seed(1)
    device = assistant.model.device
    side = 14 * sizes.image_side

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(sizes.image_token, shape, generator=generator).to(device)

    def targets(length: int) -> Targets:
        ids = words(sizes.batch, length)
        mask, weights = torch.ones_like(ids).bool(), torch.ones(ids.shape, device=device)
        return Targets(input_ids=ids, mask=mask, weights=weights, lengths=[length] * sizes.batch)

    picture = torch.full((sizes.batch, sizes.image_tokens), sizes.image_token, device=device)
    beginning = torch.cat([picture, words(sizes.batch, sizes.text_tokens)], dim=1)
    ends = {"label": words(sizes.batch, LABEL_END), "chain": words(sizes.batch, CHAIN_END)}
    ids = torch.cat([beginning, ends["label"]], dim=1)
    pixels = torch.randn(sizes.batch, 3, side, side, generator=generator).to(device)
    branches = Branches(
        prompt={"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels},
        shared=beginning.shape[1],
        ends={task: {"input_ids": end, "attention_mask": torch.ones_like(end)} for task, end in ends.items()},
        separate={},
    )
    answers = {"label": targets(LABEL_TOKENS), "chain": targets(sizes.reasoning_tokens)}
    post_ids = [str(index) for index in range(sizes.batch)]
    writer = SoftLabelWriter(folder, {"task": REASONING_TASKS["masc"].name, "vocabulary": sizes.vocabulary})
    for task, logits in assistant.logits(branches, answers).items():
        labels = truncate(logits.float(), top_k, TEMPERATURE)
        parts = [part.split(answers[task]["lengths"]) for part in (labels.ids, labels.log_probs, labels.rest)]
        for row, post_id in enumerate(post_ids):
            own = SoftLabels(parts[0][row], parts[1][row], parts[2][row], labels.vocabulary)
            writer.add(post_id, task, answers[task]["input_ids"][row], own)
    writer.close()
    return Batch(post_ids, branches, answers, SoftLabelCache(folder))


def _on_host(answers: Targets) -> Targets:
    """As the collator has them when it reads soft labels."""
    ids, mask, weights = (answers[key].cpu() for key in ("input_ids", "mask", "weights"))
    return Targets(input_ids=ids, mask=mask, weights=weights, lengths=answers["lengths"])
