"""Dynamic CoT: train on the reasoning target where the direct target is easy, and on the direct target where it is hard.

Ma et al., "Boosting Multi-modal Keyphrase Prediction with Dynamic Chain-of-Thought in Vision-Language Models",
EMNLP 2025, Section 3.3.
"""

from __future__ import annotations

import logging
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn

from dynkp.batches.typed_batches import PostBatch
from dynkp.objectives.switching import below_threshold, dropped_at_random, mixed_loss, parse_gamma, switched_loss
from dynkp.objectives.token_loss import PostLosses, TargetLoss
from dynkp.trainer.dynamic_cot_config import DynamicCoTConfig
from dynkp.trainer.post_streams import repeated_posts
from dynkp.trainer.post_trainer import PostTrainer
from dynkp.trainer.visit_log import VisitLog

logger = logging.getLogger(__name__)


class DynamicCoTTrainer(PostTrainer):
    r"""Dynamic CoT, and the strategies the paper compares it with: `direct`, `cot`, `multitask`, and the control `random:p`.

    At every step, under the current weights θ, the direct loss of a post selects its target (paper's Eq. 2 to 5):

    $$\mathcal{L}_{sft} = \mathrm{NLL}(y^s \mid x), \qquad
    y^d = y^c \text{ if } \mathcal{L}_{sft} < \gamma \text{ else } y^s, \qquad
    \mathcal{L}_d = \mathrm{NLL}(y^d \mid x)$$

    with y^s the direct and y^c the reasoning target, and NLL the mean over the target's tokens, end of turn included. A tie
    and a post without rationale are direct. The loss of an optimizer step is the mean of L_d over its posts (all micro-batches
    and ranks); the paper's batch size is 1. Departure: the prompt is computed once for both targets, which changes the cost,
    not the numbers.

    Logged per window: `reasoning_share` (share of posts trained on their reasoning target), `direct_loss` (mean L_sft),
    `gamma`, `gamma_tokens` (γ times the mean length of the direct targets: at about 1.0 to 1.5 a model keeps answering both
    with and without reasoning), `direct_tokens`, `direct_target_loss` and `reasoning_target_loss` (means over the posts
    trained on that target).

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): as for
            [`~dynkp.trainer.post_trainer.PostTrainer`].
        args ([`~dynkp.trainer.dynamic_cot_config.DynamicCoTConfig`]): options.
        **kwargs: as for [`~dynkp.trainer.post_trainer.PostTrainer`].

    Raises:
        ValueError: if options, model and posts do not fit together.

    Example:
    ```python
    trainer = DynamicCoTTrainer(
        model="Qwen/Qwen2.5-VL-3B-Instruct",
        args=DynamicCoTConfig(output_dir="out", gamma=0.4),
        train_dataset=load_posts("train.jsonl", image_dir="images"),
    )
    trainer.train()
    ```
    """

    _name = "Dynamic CoT"
    method = "dynamic_cot"
    args: DynamicCoTConfig

    def __init__(self, model: Any, args: DynamicCoTConfig, **kwargs: Any):
        self.gamma = parse_gamma(args.gamma, args.gamma_window)
        self.drop_rate = args.drop_rate()
        self.target_kinds = ("direct",) if args.strategy == "direct" else ("direct", "reasoning")
        self._visits: list[tuple[str, float | None, bool]] = []  # of the current optimizer step
        self.choice_log = VisitLog(Path(args.output_dir, "choices.jsonl")) if args.log_choices else None
        super().__init__(model, args, **kwargs)
        if "reasoning" in self.target_kinds and not may_have_rationales(self.train_dataset):
            logger.warning(
                "No train post has a rationale: with strategy %r all are trained on their direct target.", args.strategy
            )
        if self.chooses_denominators and self.is_deepspeed_enabled and args.gradient_accumulation_steps > 1:
            raise ValueError(
                f"`loss_normalization` is 'token' under strategy {args.strategy!r} with gradient accumulation under DeepSpeed, "
                "which makes gradients accessible only after they are averaged. Use loss_normalization='sample' or "
                "gradient_accumulation_steps=1."
            )

    def collator_options(self) -> dict[str, Any]:
        """Return the options that the collator is built with."""
        return {**super().collator_options(), "answer_weight": self.args.answer_weight}

    def compute_post_losses(self, model: nn.Module, inputs: PostBatch) -> PostLosses:
        """Compute L_d, the loss of the target that the strategy selects for each post (Eq. 4 and 5).

        Args:
            model (`torch.nn.Module`): the unwrapped model.
            inputs (`dict`): a batch of B posts.

        Returns:
            [`~dynkp.objectives.token_loss.PostLosses`]: parts of shape (B,).
        """
        may_be_direct, may_reason = self.candidates(inputs)  # before any loss is known, (B,) bool each
        prompt = self.open_prompt(model, inputs["prompt"], may_be_direct, may_reason)  # prompts and images computed once

        direct = prompt.loss(inputs["direct"], may_be_direct)  # L_sft = NLL(y^s | x), Eq. 2
        easy = may_reason
        if self.args.strategy == "dynamic":
            easy = may_reason & below_threshold(direct.mean, self.gamma.value)  # L_sft < γ, Eq. 5
        reasoning = prompt.loss(inputs["reasoning"], easy)  # L_cot = NLL(y^c | x), Eq. 3

        self.record_choices(inputs, easy, direct, reasoning)
        if self.args.strategy == "multitask":
            return mixed_loss(direct, reasoning, self.args.multitask_weight * easy, self.normalizes_over_tokens)
        return self.normalized(switched_loss(easy, reasoning, direct))  # L_d = NLL(y^d | x), Eq. 4

    def candidates(self, inputs: PostBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Determine which targets the strategy may select for each post, before any loss is known.

        Args:
            inputs (`dict`): a batch of B posts.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: for the direct and for the reasoning target, shape (B,), bool. A post without
            rationale is never a candidate for reasoning.
        """
        may_reason = inputs["has_rationale"]
        if self.args.strategy == "direct":
            may_reason = torch.zeros_like(may_reason)
        elif self.drop_rate is not None:
            dropped = dropped_at_random(inputs["id"], int(self.state.epoch or 0), self.drop_rate, self.args.seed)
            may_reason = may_reason & ~torch.tensor(dropped, device=may_reason.device)
        return torch.ones_like(may_reason) if self.observes_direct_losses else ~may_reason, may_reason

    @property
    def observes_direct_losses(self) -> bool:
        """Whether the strategy computes the direct loss of every post."""
        return self.args.strategy in ("dynamic", "multitask")

    def record_choices(
        self, inputs: PostBatch, easy: torch.Tensor, direct: TargetLoss, reasoning: TargetLoss | None = None
    ) -> None:
        """Record the selected targets for the log, for the adaptive γ and for the file of choices.

        Args:
            inputs (`dict`): the batch.
            easy (`torch.Tensor` of shape `(B,)`): bool, the posts that are trained on their reasoning target.
            direct ([`~dynkp.objectives.token_loss.TargetLoss`]): loss of the direct targets.
            reasoning ([`~dynkp.objectives.token_loss.TargetLoss`], *optional*): loss of the reasoning targets, where both are
                losses that are trained on.
        """
        counted = ~repeated_posts(inputs)
        self.record("reasoning_share", easy.float(), counted)
        if reasoning is not None:
            trains_direct, trains_reasoning = ~easy, easy
            if self.args.strategy == "multitask":
                trains_direct, trains_reasoning = torch.ones_like(easy), easy & (self.args.multitask_weight > 0)
            self.record("direct_target_loss", direct.mean, counted & trains_direct)
            self.record("reasoning_target_loss", reasoning.mean, counted & trains_reasoning)
        self.record("direct_tokens", torch.tensor(inputs["direct"]["lengths"], dtype=torch.float32), counted.cpu())
        if self.observes_direct_losses:
            self.record("direct_loss", direct.mean, counted)
        if self.args.strategy == "dynamic":
            self.record("gamma", torch.tensor([self.gamma.value], dtype=torch.float64))
        if self.model.training and (self.choice_log or self.args.strategy == "dynamic"):
            losses = direct.mean.tolist() if self.observes_direct_losses else [None] * len(inputs["id"])
            visits = zip(inputs["id"], losses, easy.tolist(), strict=True)
            self._visits.extend(compress(visits, counted.tolist()))

    def begin_training(self) -> None:
        """Start with a new threshold and a new file of choices."""
        super().begin_training()
        self.gamma = parse_gamma(self.args.gamma, self.args.gamma_window)
        self._visits.clear()
        if self.choice_log and self.accelerator.is_main_process:
            self.choice_log.begin(self.state.global_step)

    def end_of_step(self) -> None:
        """Write the step's choices of all ranks to the file, and update an adaptive γ with their direct losses."""
        # A constant threshold needs no losses: without a file there is nothing to gather.
        if self.choice_log or not self.gamma.is_constant:
            visits = self.gather_list(self._visits)
            if self.choice_log and self.accelerator.is_main_process:
                gamma = self.gamma.value
                rows = (
                    {"id": post_id, "direct_loss": loss, "gamma": gamma, "choice": "reasoning" if reasoned else "direct"}
                    for post_id, loss, reasoned in visits
                )
                self.choice_log.write(rows, self.state)
            self.gamma.observe([loss for _, loss, _ in visits if loss is not None])
        self._visits.clear()

    def method_state(self) -> dict[str, Any]:
        """Return the state of the threshold, for checkpoints."""
        return {"gamma": self.args.gamma, "statistics": self.gamma.state()}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Continue with the threshold of a checkpoint.

        Args:
            state (`dict`): what [`method_state`] returned when the checkpoint was written.

        Raises:
            ValueError: if γ depends on the losses, and the checkpoint was written with another option `gamma`.
        """
        if self.gamma.is_constant:
            return
        if state.get("gamma") != self.args.gamma:
            raise ValueError(
                f"`gamma` is {self.args.gamma!r}, but the checkpoint was written with gamma={state.get('gamma')!r} and has no "
                f"statistics for it. Resume with the checkpoint's gamma, with a number, or start a new run."
            )
        self.gamma.load_state(state["statistics"])

    def derive_metrics(self, logs: dict[str, float], prefix: str) -> None:
        """Add `gamma_tokens` to the log.

        Args:
            logs (`dict`): what is about to be logged; changed in place.
            prefix (`str`): prefix of the names in `logs`.
        """
        if f"{prefix}gamma" in logs:
            logs[f"{prefix}gamma_tokens"] = logs[f"{prefix}gamma"] * logs[f"{prefix}direct_tokens"]


def may_have_rationales(posts: Dataset | IterableDataset) -> bool:
    """Return whether any post may have a reasoning target.

    Args:
        posts (`Dataset` or `IterableDataset`): training posts. A stream is not read: it may have rationales.

    Example:
        >>> may_have_rationales(Dataset.from_list([{"id": "1", "rationale": None}]))
        False
    """
    if not isinstance(posts, Dataset):
        return True
    return any(any(posts[name]) for name in ("rationale", "reasoning_completion") if name in posts.column_names)
