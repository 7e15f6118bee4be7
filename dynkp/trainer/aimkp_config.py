"""Options of AimKP."""

from __future__ import annotations

from dataclasses import dataclass, field

from dynkp.mechanics.masked_views import MASK_PATTERNS
from dynkp.mechanics.stride_schedule import SCHEDULES
from dynkp.objectives.filtering import REDUCTIONS
from dynkp.trainer.post_config import PostConfig, one_of


@dataclass
class AimKPConfig(PostConfig):
    """Configuration of [`~dynkp.trainer.aimkp_trainer.AimKPTrainer`].

    Defaults are the paper's (AimKP, AAAI 2026, implementation details and Table 4). The rows of its Table 2 and Table 5 each
    need one option: `mask_text=False`, `mask_image=False`, `filter_gradients=False`, `stride_schedule="fixed"` (with
    `initial_stride` 2 or 4), `warmup_epochs=0`, `mask_pattern="random"` and `"pooled"`, `stride_schedule="linear"`.

    Raises:
        ValueError: if an option is out of range, or not supported by this method.
    """

    learning_rate: float = field(default=2e-4, metadata={"help": "Initial learning rate of AdamW (paper: 2e-4, of LoRA)."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule (paper: cosine decay)."})
    warmup_steps: float = field(
        default=0.03,
        metadata={"help": "Steps, or below 1 the share of all steps, in which the learning rate rises (paper: 0.03)."},
    )
    num_train_epochs: float = field(
        default=4.0, metadata={"help": "Epochs, the warm-up without masking included (paper: 4; 6 for Qwen2-VL)."}
    )
    task: str = field(
        default="aimkp",
        metadata={"help": "Task, that is prompt and targets: 'aimkp' (default, keyphrases joined by ', ') or 'dynamic_cot'."},
    )
    loss_normalization: str = field(
        default="token",
        metadata={
            "help": "'token' (default, as the authors' code): mean over all target tokens of the optimizer step. 'sample': "
            "mean over a target's tokens, then over posts."
        },
    )
    text_threshold: float = field(
        default=0.1,
        metadata={"help": "'τ_t': a text-masked variant is kept if its gradient's cosine is above it. Paper: 0.1."},
    )
    image_threshold: float = field(
        default=0.4,
        metadata={"help": "'τ_v': an image-masked variant is kept if its gradient's cosine is above it. Paper: 0.4."},
    )
    warmup_epochs: int = field(
        default=1, metadata={"help": "Epochs of plain fine-tuning before any masking. Paper: 1; 0 is its row 'w/o warm up'."}
    )
    initial_stride: int = field(
        default=2, metadata={"help": "'s' at a post's first masked visit; the last token of each stride is kept. Paper: 2."}
    )
    stride_schedule: str = field(
        default="adaptive",
        metadata={
            "help": "How a post's stride changes from epoch to epoch: 'adaptive' (doubled if its variant was kept, else "
            "halved, never below 2; the paper's), 'fixed', or 'linear' (one up, one down)."
        },
    )
    freeze_failed_strides: bool = field(
        default=False,
        metadata={"help": "Whether a stride never changes again after its variant was not kept (authors' code). Paper: False."},
    )
    mask_pattern: str = field(
        default="strided",
        metadata={
            "help": "What is kept of a masked modality: 'strided' (the paper's), 'random' (as many tokens, drawn for each "
            "visit) or 'pooled' (as many, each the mean of its stride, without gaps: 'feature compression')."
        },
    )
    mask_text: bool = field(default=True, metadata={"help": "Whether to train on text-masked variants. Paper: True."})
    mask_image: bool = field(default=True, metadata={"help": "Whether to train on image-masked variants. Paper: True."})
    filter_gradients: bool = field(
        default=True,
        metadata={"help": "Whether variants below the threshold are dropped. False keeps all: 'w/o gradient-based filtering'."},
    )
    variant_reduction: str = field(
        default="mean",
        metadata={
            "help": "'mean' divides a post's loss by the number of losses that it adds up (the authors' code), 'sum' does not "
            "(the paper's Eq. 4)."
        },
    )
    projector_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of a projector that is trained. None (default) takes `learning_rate`. Paper: 2e-5."},
    )
    similarity_backend: str = field(
        default="auto",
        metadata={
            "help": "How single posts' gradients are compared: 'batched' (one backward per variant for the whole batch), "
            "'plain' (one forward and backward per post and variant, as published: slower, more memory, same numbers), 'auto' "
            "(default) takes 'batched' where the model allows it, and logs once where it does not."
        },
    )
    log_visits: bool = field(
        default=False,
        metadata={
            "help": "Whether to write one row per post, visit and modality (stride, cosine, kept or not, losses) to "
            "`visits.jsonl` in `output_dir`; `dynkp plot` draws the paper's Figures 3 and 7 from it."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.stride_schedule, "stride_schedule", SCHEDULES)
        one_of(self.mask_pattern, "mask_pattern", MASK_PATTERNS)
        one_of(self.variant_reduction, "variant_reduction", REDUCTIONS)
        one_of(self.similarity_backend, "similarity_backend", ("auto", "batched", "plain"))
        for name in ("text_threshold", "image_threshold"):
            if not -1.0 <= (value := getattr(self, name)) <= 1.0:
                raise ValueError(f"`{name}` is {value}; a cosine is between -1 and 1. To keep all, set filter_gradients=False.")
        if self.initial_stride < 2:
            raise ValueError(f"`initial_stride` is {self.initial_stride}, which masks nothing; give 2 or more.")
        if self.warmup_epochs < 0:
            raise ValueError(f"`warmup_epochs` is {self.warmup_epochs}; give 0 (mask from the start) or more.")
        if self.projector_learning_rate is not None and self.projector_learning_rate < 0:
            raise ValueError(f"`projector_learning_rate` is {self.projector_learning_rate}; give a number >= 0, or None.")
        if self.fp16:
            raise ValueError(
                "`fp16` is True, but its loss scaling does not cover the gradients of single posts, which would underflow "
                "without notice. Use bf16=True, or fp16=False."
            )
        if self.gradient_checkpointing and (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "`gradient_checkpointing_kwargs` sets reentrant checkpointing, with which gradients of single posts cannot be "
                "computed. Set use_reentrant to False."
            )

    @property
    def modalities(self) -> tuple[str, ...]:
        """The masked modalities, of `"text"` and `"image"`."""
        return ("text",) * self.mask_text + ("image",) * self.mask_image

    def threshold(self, modality: str) -> float:
        """Return τ of a modality, `"text"` or `"image"`."""
        return self.text_threshold if modality == "text" else self.image_threshold

    @property
    def thresholds(self) -> list[float] | None:
        """τ of each masked modality; `None` if variants are not filtered."""
        return [self.threshold(modality) for modality in self.modalities] if self.filter_gradients else None
