"""Dynamic CoT against knowing its choices beforehand (oracle) and against computing every prompt twice (naive).

Given   a LLaVA-shaped model with random weights (LoRA on the language model, a full projector, a frozen vision tower)
        and a batch of random posts, of which a wanted share is easy.
Gives   one row per share: seconds and bytes of one forward and backward, and their ratios.
Holds   all three ways compute logits at target positions only and are timed only once their losses and gradients agree.

The three ways:

- oracle: plain fine-tuning on the targets the switch would choose, known beforehand. Posts whose lengths agree go
  through the model together, so nothing is padded.
- naive: a pass without gradients over prompts and direct targets; then plain fine-tuning on the chosen ones, in one
  padded batch. Prompt and vision tower are computed twice.
- ours: what [`~dynkp.trainer.dynamic_cot_trainer.DynamicCoTTrainer`] computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dynkp.batches.targets import Targets, mixed_targets, select
from dynkp.bench.measure import Setting, Step, environment, median_seconds, peak_bytes
from dynkp.mechanics.shared_prompt import PlainPrompt, Scorer, SharedPrompt, score_targets
from dynkp.objectives.switching import below_threshold, switched_loss
from dynkp.objectives.token_loss import target_loss
from dynkp.trainer.keyphrase_trainer import freeze_vision_tower

SUITE = "dynamic_cot"
HEADINGS = ("share of easy posts", "naive / oracle", "ours / oracle", "naive / ours", "peak MiB: oracle, naive, ours")

# Rounding in float32: the sums of the three ways differ in order.
AGREEMENT = 1e-4


class Scenario(NamedTuple):
    """One row: `unequal` draws each post's text and targets at half to one and a half times the usual length."""

    easy_share: float
    checkpointing: bool = False
    unequal: bool = False

    @property
    def label(self) -> str:
        notes = ["gradient checkpointing"] * self.checkpointing + ["unequal lengths"] * self.unequal
        return ", ".join([f"{self.easy_share:g}", *notes])


SCENARIOS = (
    *(Scenario(share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)),
    Scenario(0.5, checkpointing=True),
    Scenario(0.5, unequal=True),
)


class Sizes(NamedTuple):
    """The model's and the posts' sizes; lengths in tokens.

    Proportions are those of the paper's smaller models. A picture costs the vision tower about 0.85 times what its
    tokens cost the language model (Qwen2.5-VL-3B: 0.67 B parameters over four patches per token against 3.1 B;
    InternVL3-2B: 0.3 B over four against 1.5 B). A rationale of the paper has 157 words, one of the Twitter-2015
    chains 199 words or 287 tokens.
    """

    batch: int = 4
    image_side: int = 24  # patches
    text_tokens: int = 30
    direct_tokens: int = 4
    reasoning_tokens: int = 256
    vocabulary: int = 32_000
    hidden: int = 512
    layers: int = 8
    vision_hidden: int = 512
    vision_layers: int = 7

    @property
    def image_tokens(self) -> int:
        return self.image_side**2

    @property
    def image_token(self) -> int:
        """The last of the vocabulary: the others are words, 0 pads."""
        return self.vocabulary - 1


QUICK = Sizes(image_side=4, text_tokens=8, reasoning_tokens=12, vocabulary=64, hidden=32, layers=2, vision_hidden=64,
              vision_layers=1)  # fmt: skip


class Batch(NamedTuple):
    """Posts as the collator would give them, and the threshold that makes the wanted share easy."""

    prompt: dict[str, torch.Tensor]
    direct: Targets
    reasoning: Targets
    gamma: Any  # a number, or one per post
    easy: list[bool]


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """Measure the suite.

    Args:
        setting: device, threads, rounds and whether the model is the quick one.

    Yields:
        One row per scenario, as soon as it is measured. Times are medians, in seconds; memory is in MiB.

    Raises:
        RuntimeError: if the three ways disagree in loss or gradients, so that their times could not be compared.
    """
    sizes = QUICK if setting.quick else Sizes()
    model = build_model(sizes).to(setting.device)
    everything = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    for scenario in SCENARIOS:
        if scenario.checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        batch = draw_batch(model, sizes, scenario)
        steps: dict[str, Step] = {way.__name__: partial(way, model, batch) for way in (oracle, naive, ours)}
        memory, disagreement = first_round(model, steps, scenario)
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
            **{f"{name}_s": value for name, value in seconds.items()},
            **{f"{name}_mib": value / 2**20 for name, value in memory.items()},
            "largest_disagreement": disagreement,
            **sizes._asdict(),
            "image_tokens": sizes.image_tokens,
            "parameters": everything,
            "trained_parameters": trained,
            "quick": setting.quick,
            **environment(setting),
        }


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the printed table, under `HEADINGS`."""
    ratios = (f"{row[key]:.2f}" for key in ("naive_over_oracle", "ours_over_oracle", "naive_over_ours"))
    memory = ", ".join(f"{row[f'{name}_mib']:.0f}" for name in ("oracle", "naive", "ours"))
    return row["label"], *ratios, memory


# The three ways


def oracle(model: nn.Module, batch: Batch) -> torch.Tensor:
    """One forward and backward per group of posts of equal lengths, on the right targets at once."""
    model.zero_grad()
    groups: dict[tuple[bool, int, int], list[int]] = {}
    prompt_lengths = batch.prompt["attention_mask"].sum(dim=1).tolist()
    for row, (easy, prompt_length) in enumerate(zip(batch.easy, prompt_lengths, strict=True)):
        length = (batch.reasoning if easy else batch.direct)["lengths"][row]
        groups.setdefault((easy, prompt_length, length), []).append(row)
    losses = []
    for (easy, prompt_length, length), rows in groups.items():
        targets = _rows(batch.reasoning if easy else batch.direct, rows, length)
        prompt = {key: select(value, rows) for key, value in batch.prompt.items()}
        prompt.update({key: prompt[key][:, -prompt_length:] for key in ("input_ids", "attention_mask")})
        loss = target_loss(PlainPrompt(model, prompt).log_probs(targets), targets["weights"]).mean.sum() / len(batch.easy)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def naive(model: nn.Module, batch: Batch, score: Scorer = score_targets) -> torch.Tensor:
    """A pass to decide, a pass to learn."""
    model.zero_grad()
    with torch.no_grad():
        direct = PlainPrompt(model, batch.prompt, score).loss(batch.direct)
    targets = mixed_targets(batch.direct, batch.reasoning, below_threshold(direct.mean, batch.gamma))
    loss = PlainPrompt(model, batch.prompt, score).loss(targets).mean.mean()
    loss.backward()
    return loss.detach()


def ours(model: nn.Module, batch: Batch, score: Scorer = score_targets) -> torch.Tensor:
    """`DynamicCoTTrainer.compute_post_losses` and the mean over posts."""
    model.zero_grad()
    prompt = SharedPrompt(model, batch.prompt, score)
    direct = prompt.loss(batch.direct)
    chosen = below_threshold(direct.mean, batch.gamma)
    reasoning = prompt.loss(batch.reasoning, chosen)
    loss = switched_loss(chosen, reasoning, direct).mean.mean()
    loss.backward()
    return loss.detach()


def first_round(model: nn.Module, steps: dict[str, Step], scenario: Scenario) -> tuple[dict[str, int], float]:
    """Warm up, and see what each step needs and whether all compute the same.

    Returns:
        Peak bytes of each step; and the largest difference, in the loss or in the whole gradient, between the oracle and
        one of the others, relative to the oracle's.
    """
    memory, results = {}, {}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for name, step in steps.items():
        model.zero_grad()  # or the gradients of the step before would be released in this one
        memory[name], loss = peak_bytes(step, parameters[0].device)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if len(gradients) < len(parameters):
            raise RuntimeError(f"{scenario}: {name} gave {len(gradients)} of {len(parameters)} trained parameters a gradient.")
        results[name] = loss.double(), torch.cat([gradient.double().flatten() for gradient in gradients])
    loss, gradient = results.pop("oracle")
    worst = 0.0
    for name, (other_loss, other_gradient) in results.items():
        differences = (other_loss - loss).abs() / loss.abs(), (other_gradient - gradient).norm() / gradient.norm()
        if not all(difference <= AGREEMENT for difference in differences):
            raise RuntimeError(
                f"{scenario}: {name} and oracle differ by {differences[0]:.1e} in the loss and {differences[1]:.1e} in the "
                f"gradient, more than {AGREEMENT:g}: they do not compute the same, so their times mean nothing."
            )
        worst = max(worst, *(float(difference) for difference in differences))
    return memory, worst


# Model and posts


def build_model(sizes: Sizes) -> PeftModel:
    """LLaVA's shape with random weights, as it is trained: LoRA, a full projector, a frozen vision tower."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=sizes.vision_hidden,
            intermediate_size=4 * sizes.vision_hidden,
            num_hidden_layers=sizes.vision_layers,
            num_attention_heads=sizes.vision_hidden // 64,
            image_size=14 * sizes.image_side,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.hidden,
            intermediate_size=11 * sizes.hidden // 4,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.hidden // 32 if sizes.hidden < 256 else sizes.hidden // 64,
            tie_word_embeddings=True,
        ),
        image_token_index=sizes.image_token,
        image_seq_length=sizes.image_tokens,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    linear = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    # Adapters that start at zero would leave half of their gradients zero, and zeros agree whatever is computed.
    lora = LoraConfig(
        r=16, target_modules=linear, modules_to_save=["multi_modal_projector"], lora_dropout=0.0, init_lora_weights=False
    )
    model = get_peft_model(LlavaForConditionalGeneration(config), lora)
    freeze_vision_tower(model)
    return model.train()


def draw_batch(model: nn.Module, sizes: Sizes, scenario: Scenario) -> Batch:
    """Random posts, and the threshold that makes the wanted share of them easy."""
    generator = torch.Generator().manual_seed(1)
    device = next(model.parameters()).device

    def lengths(usual: int) -> list[int]:
        if not scenario.unequal:
            return [usual] * sizes.batch
        spread = torch.linspace(0.5 * usual, 1.5 * usual, sizes.batch).int()
        return spread[torch.randperm(sizes.batch, generator=generator)].tolist()

    def words(rows_lengths: list[int]) -> torch.Tensor:
        shape = (sizes.batch, max(rows_lengths))
        return torch.randint(sizes.image_token, shape, generator=generator)

    def targets(usual: int) -> Targets:
        rows_lengths = lengths(usual)
        mask = torch.arange(max(rows_lengths)) < torch.tensor(rows_lengths)[:, None]
        ids, mask = words(rows_lengths).to(device), mask.to(device)
        return Targets(input_ids=ids, mask=mask, weights=mask.float(), lengths=rows_lengths)

    text_lengths = lengths(sizes.text_tokens)
    longest = max(text_lengths)
    attention_mask = torch.ones(sizes.batch, sizes.image_tokens + longest, dtype=torch.long)
    input_ids = torch.full(attention_mask.shape, sizes.image_token)
    for row, (length, text) in enumerate(zip(text_lengths, words(text_lengths), strict=True)):
        input_ids[row, -length:] = text[:length]
        attention_mask[row, : longest - length] = 0  # left padding
        input_ids[row, : longest - length] = 0
    side = 14 * sizes.image_side
    prompt = {
        "input_ids": input_ids.to(device),
        "attention_mask": attention_mask.to(device),
        "pixel_values": torch.randn(sizes.batch, 3, side, side, generator=generator).to(device),
    }
    direct, reasoning = targets(sizes.direct_tokens), targets(sizes.reasoning_tokens)
    with torch.no_grad():
        losses = PlainPrompt(model, prompt).loss(direct).mean
    gamma = _threshold(losses.tolist(), easy=round(scenario.easy_share * sizes.batch))
    return Batch(prompt, direct, reasoning, gamma, below_threshold(losses, gamma).tolist())


def _threshold(losses: list[float], easy: int) -> float:
    """Halfway between the losses of the hardest easy and the easiest hard post."""
    bounds = [-float("inf"), *sorted(losses), float("inf")]
    if easy in (0, len(losses)):
        return bounds[0 if easy == 0 else -1]
    return (bounds[easy] + bounds[easy + 1]) / 2


def _rows(targets: Targets, rows: list[int], length: int) -> Targets:
    ids, mask, weights = (select(targets[key], rows)[:, :length] for key in ("input_ids", "mask", "weights"))
    return Targets(input_ids=ids, mask=mask, weights=weights, lengths=[length] * len(rows))
