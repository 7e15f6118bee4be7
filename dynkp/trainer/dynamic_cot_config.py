"""Options of Dynamic CoT."""

from __future__ import annotations

from dataclasses import dataclass, field

from dynkp.data.choices import did_you_mean
from dynkp.objectives.switching import parse_gamma
from dynkp.trainer.post_config import PostConfig

STRATEGIES = ("dynamic", "direct", "cot", "multitask", "random:p")


@dataclass
class DynamicCoTConfig(PostConfig):
    """Configuration of [`~dynkp.trainer.dynamic_cot_trainer.DynamicCoTTrainer`].

    Defaults are the paper's (Ma et al., EMNLP 2025, Section 4.2).

    Raises:
        ValueError: if an option is out of range, or not supported by this method.
    """

    learning_rate: float = field(
        default=5e-5,
        metadata={"help": "Initial learning rate of AdamW (paper: 5e-5; 3e-5 on MMKP-360k)."},
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule (paper: cosine annealing)."})
    strategy: str = field(
        default="dynamic",
        metadata={
            "help": "Which target each post is trained on: 'dynamic' (the reasoning target where the direct loss is below γ, "
            "else the direct target), 'direct' (SFT), 'cot' (Fine-tune-CoT: the reasoning target where there is a rationale), "
            "'multitask' (both as two objectives), 'random:p' (control: the rationale is dropped at random with rate p)."
        },
    )
    gamma: str = field(
        default="0.4",
        metadata={
            "help": "'γ': threshold on a post's direct loss in nats per token. A number (0 and inf included), 'avg' (running "
            "mean of the direct losses) or 'quantile:q' (of recent direct losses; fixes the share of reasoning). Paper: 0.4."
        },
    )
    gamma_window: int = field(
        default=1024,
        metadata={"help": "Number of last posts that gamma='quantile:q' is computed from."},
    )
    loss_normalization: str = field(
        default="sample",
        metadata={
            "help": "'sample' (default, as the paper's batch size of 1): mean over a target's tokens, then over posts. "
            "'token': mean over all target tokens of the optimizer step; long rationales then outweigh direct targets."
        },
    )
    answer_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of a reasoning target's tokens from <answer> on, against 1 for those of its reasoning. 1.0 is the "
            "paper's mean over tokens."
        },
    )
    multitask_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the reasoning objective against 1 for the direct one under strategy='multitask'."},
    )
    log_choices: bool = field(
        default=False,
        metadata={
            "help": "Whether to write one row per post and visit (id, epoch, step, direct loss, γ, choice) to `choices.jsonl` "
            "in `output_dir`."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.gamma = str(self.gamma)
        if self.gamma_window < 1:
            raise ValueError(f"`gamma_window` is {self.gamma_window}; it counts posts and must be at least 1.")
        parse_gamma(self.gamma, self.gamma_window)
        self.drop_rate()
        for name in ("answer_weight", "multitask_weight"):
            if not 0.0 <= (value := getattr(self, name)) < float("inf"):
                raise ValueError(f"`{name}` is {value}; a weight must be finite and not negative.")

    def drop_rate(self) -> float | None:
        """Return p of strategy 'random:p'; `None` for the other strategies.

        Raises:
            ValueError: if there is no such strategy.
        """
        kind, colon, rate = self.strategy.partition(":")
        if self.strategy in STRATEGIES[:-1]:
            return None
        try:
            if kind == "random" and colon and 0.0 <= float(rate) <= 1.0:
                return float(rate)
        except ValueError:
            pass
        raise ValueError(
            f"`strategy` is {self.strategy!r}; choose one of {', '.join(map(repr, STRATEGIES))} with 0 <= p <= 1."
            f"{did_you_mean(self.strategy, STRATEGIES[:-1])}"
        )
