"""The options of a training run, beside those of its method's trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from trl import ModelConfig

from dynkp import (
    AimKPConfig,
    AimKPTrainer,
    DynamicAimKPConfig,
    DynamicAimKPTrainer,
    DynamicCoTConfig,
    DynamicCoTTrainer,
    MulCoTRDConfig,
    MulCoTRDTrainer,
    PostConfig,
    PostTrainer,
)
from dynkp.data.choices import did_you_mean
from dynkp.data.mixing import PostMixtureConfig

# --method: the trainer and its options.
METHODS: dict[str, tuple[type[PostTrainer], type[PostConfig]]] = {
    "dynamic_cot": (DynamicCoTTrainer, DynamicCoTConfig),
    "aimkp": (AimKPTrainer, AimKPConfig),
    "dynamic_aimkp": (DynamicAimKPTrainer, DynamicAimKPConfig),
    "mulcot_rd": (MulCoTRDTrainer, MulCoTRDConfig),
}

# A model of a million parameters from scratch wants other settings than a pretrained one; the command line overrides.
FROM_SCRATCH: dict[str, Any] = {
    "learning_rate": 3e-3,
    "weight_decay": 0.7,
    "warmup_steps": 100,
    "num_train_epochs": 20.0,
    "per_device_train_batch_size": 32,
    "freeze_vision_tower": False,
    "activation_checkpointing": False,
    "bf16": False,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 50.0,
    "report_to": ["none"],
    "dataloader_pin_memory": torch.accelerator.is_available(),
}

MODALITIES = ("both", "text", "image")


@dataclass
class DataArguments(PostMixtureConfig):
    """The method, and the posts to train, evaluate and predict on."""

    method: str = field(
        default="dynamic_cot",
        metadata={"help": "How to train: dynamic_cot (default), aimkp, dynamic_aimkp (both in one) or mulcot_rd."},
    )
    modality: str = field(
        default="both",
        metadata={
            "help": "What of a post to train on and to predict from: both (default), text or image (a specialist). It is saved "
            "with the model."
        },
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Training posts: a JSONL, JSON or Parquet file, CMKP's raw files, AimKP/LLaVA conversations, a MASC file, "
            "a saved dataset or a Hub id. Without it (and without `datasets:`) posts are drawn."
        },
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "Posts to predict and score, in the same formats; checked before the training."}
    )
    eval_posts: int = field(
        default=0, metadata={"help": "Without --eval_file: hold out this many training posts, drawn with the seed."}
    )
    image_dir: str | None = field(
        default=None, metadata={"help": "Folder that image names are relative to. Without it, posts have no images."}
    )
    eval_image_dir: str | None = field(default=None, metadata={"help": "The same for --eval_file; --image_dir if not given."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_method(self.method)
        check_modality(self.modality, "modality")


@dataclass
class PredictionArguments:
    """How to predict the evaluation posts after the training."""

    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Longest output in tokens; by default 32 after strategy 'direct', else 512."}
    )
    predict_batch_size: int = field(default=32, metadata={"help": "Posts per generation batch and process."})
    eval_modalities: list[str] = field(
        default_factory=list,
        metadata={"help": "What of the posts to predict from, one after the other: both, text, image. By default --modality."},
    )

    def __post_init__(self) -> None:
        for modality in self.eval_modalities:
            check_modality(modality, "eval_modalities")
        for name in ("max_new_tokens", "predict_batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; give 1 or more.")


@dataclass
class TinyModelArguments:
    """The small model that is built from scratch where no model is named."""

    tiny_hidden_size: int = field(default=128, metadata={"help": "Width of the language model built from scratch."})
    tiny_layers: int = field(default=1, metadata={"help": "Its layers."})
    tiny_heads: int = field(default=2, metadata={"help": "Its attention heads."})
    tiny_attention_dropout: float | None = field(
        default=None,
        metadata={
            "help": "Its attention dropout: with few heads it drops words, which keeps it from memorising posts. By default "
            "0.6, or 0 where posts have rationales (their losses would never fall below γ) or are masked."
        },
    )
    tiny_vocab_size: int = field(default=8192, metadata={"help": "Size of its byte-level BPE vocabulary."})
    tiny_image_size: int = field(default=64, metadata={"help": "Side of its square images in pixels; patches are 8 px."})


class TrainingOptions(NamedTuple):
    """All options of a run.

    Attributes:
        data: the method and the posts.
        args: the options of the method's trainer.
        model: the model, its precision and adapters, as in TRL.
        prediction: the prediction after the training.
        tiny: the model that is built where none is named.
    """

    data: DataArguments
    args: PostConfig
    model: ModelConfig
    prediction: PredictionArguments
    tiny: TinyModelArguments

    @property
    def draws_posts(self) -> bool:
        """Whether no posts are named, so that the package draws some."""
        return not self.data.train_file and not self.data.datasets

    def unused_without_posts(self) -> list[str]:
        """Return the given options that have no effect on drawn posts, by their names on the command line."""
        given = {
            "--model_name_or_path": self.model.model_name_or_path,
            "--use_peft": self.model.use_peft,
            "--eval_file": self.data.eval_file,
            "--eval_posts": self.data.eval_posts,
            "--image_dir": self.data.image_dir,
            "--modality": self.data.modality != "both",
            "--eval_modalities": self.prediction.eval_modalities,
            "--resume_from_checkpoint": self.args.resume_from_checkpoint,
        }
        return [name for name, value in given.items() if value]

    @property
    def trainer_class(self) -> type[PostTrainer]:
        """The method's trainer."""
        return METHODS[self.data.method][0]


def check_method(method: str) -> None:
    """Refuse a method that there is not.

    Raises:
        ValueError: with the methods there are.
    """
    if method not in METHODS:
        raise ValueError(f"`method` is {method!r}; choose one of {', '.join(METHODS)}.{did_you_mean(method, METHODS)}")


def check_modality(modality: str, option: str) -> None:
    """Refuse a modality that there is not.

    Raises:
        ValueError: with the modalities there are.
    """
    if modality not in MODALITIES:
        hint = did_you_mean(modality, MODALITIES)
        raise ValueError(f"`{option}` is {modality!r}; choose 'both', 'text' or 'image'.{hint}")
