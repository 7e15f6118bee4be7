"""The lines that a run logs before its first step, and its progress bar."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import ProgressCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from dynkp import PostTrainer

logger = logging.getLogger(__name__)


class OpeningLines(TrainerCallback):
    """Logs method, model, posts, steps and output folder, once the number of steps is known.

    Args:
        trainer: the trainer.
        method: the method, as `--method` calls it.
        modality: what of the posts it is trained on.
    """

    def __init__(self, trainer: PostTrainer, method: str, modality: str = "both") -> None:
        self.trainer, self.method, self.modality = trainer, method, modality

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the lines, on the first process."""
        if not state.is_world_process_zero:
            return
        trainer = self.trainer
        strategy = getattr(args, "strategy", None)
        seen = "" if self.modality == "both" else f", {self.modality} only"
        evaluation = "" if trainer.eval_dataset is None else f"; evaluation: {_count_posts(trainer.eval_dataset)}"
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        begun = f", {state.global_step:,} of them done" if state.global_step else ""
        epochs = ""
        if isinstance(trainer.train_dataset, Dataset):
            epochs = f" ({state.max_steps * batch / len(trainer.train_dataset):.3g} epochs)"
        steps = f"{state.max_steps:,} optimizer steps of {batch:,} posts{epochs}{begun}"
        processes = f"; {args.world_size} processes" if args.world_size > 1 else ""
        lines = {
            "Method": f"{self.method}{f' (strategy {strategy})' if strategy else ''}, task {trainer.task.name}{seen}",
            "Model": _describe_model(trainer.model),
            "Posts": f"{_describe_posts(trainer.train_dataset)}{evaluation}",
            "Training": f"{steps}{processes}",
            "Output": str(Path(args.output_dir)),
        }
        logger.info("%s", "\n".join(f"{name + ':':10}{text}" for name, text in lines.items()))


class TrainingBar(ProgressCallback):
    """The bar of a training whose evaluation generates, which has a bar of its own."""

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Show nothing: the bar of the evaluation's loss would stand, finished, above that of the generation."""


def announce(trainer: PostTrainer, method: str, modality: str = "both") -> None:
    """Make a trainer log its opening lines, and show one progress bar at a time.

    Args:
        trainer: the trainer, before `train` is called.
        method: the method, as `--method` calls it.
        modality: what of the posts it is trained on.
    """
    trainer.add_callback(OpeningLines(trainer, method, modality))
    if not trainer.args.disable_tqdm and trainer.args.eval_generation_posts != 0:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(TrainingBar)
    transformers_logging.disable_progress_bar()  # "Writing model shards" at every checkpoint


def _describe_model(model: Any) -> str:
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    name = getattr(model.config, "_name_or_path", "") or "from scratch"
    adapted = " with an adapter" if hasattr(model, "peft_config") else ""
    share = f"{trainable / 1e6:,.1f} M trainable ({trainable / total:.1%})"
    return f"{name}{adapted}, {total / 1e6:,.1f} M parameters, {share}"


def _describe_posts(posts: Any) -> str:
    if not isinstance(posts, Dataset):
        return "a stream"
    count = len(posts)
    images, rationales = _count_filled(posts, "images"), _count_filled(posts, "rationale")
    return f"{count:,}: {images:,} with and {count - images:,} without image, {rationales:,} with rationale"


def _count_posts(posts: Any) -> str:
    if isinstance(posts, dict):
        return ", ".join(f"{name} {_count_posts(part)}" for name, part in posts.items())
    return f"{len(posts):,}" if isinstance(posts, Dataset) else "a stream"


def _count_filled(posts: Dataset, column: str) -> int:
    """Count the posts whose list or text in a column is not empty, without reading the images' bytes."""
    if column not in posts.column_names:
        return 0
    values = posts.data.column(column)
    if pa.types.is_null(values.type):
        return 0
    text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    filled = pc.greater(pc.utf8_length(values) if text else pc.list_value_length(values), 0)
    if posts._indices is not None:  # which rows of the table are posts; to ask for the rows themselves would copy the images
        filled = filled.take(posts._indices.column(0))
    return pc.sum(filled.cast("int64")).as_py() or 0
