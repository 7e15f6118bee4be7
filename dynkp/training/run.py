"""A training run from its options to its scores: what `dynkp train` and examples/train.py do."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

from transformers import ProcessorMixin
from transformers.trainer_utils import get_last_checkpoint
from trl import get_peft_config, get_quantization_config

from dynkp import DynamicCoTTrainer, MulCoTRDConfig, MulCoTRDTrainer, PostConfig, PostTrainer
from dynkp.data.tasks import resolve_task
from dynkp.models.checkpoints import find_checkpoint
from dynkp.models.saved_task import Modality, find_saved_task
from dynkp.training import drawn_posts, mulcot_rd
from dynkp.training.models import load_model
from dynkp.training.opening import announce
from dynkp.training.options import TrainingOptions
from dynkp.training.posts import check_images_present, load_data, only
from dynkp.training.results import evaluate

logger = logging.getLogger(__name__)


def train(options: TrainingOptions) -> None:
    """Train a model, save it, predict the evaluation posts and score them.

    Leaves in `output_dir` the model and its checkpoints and, where there are evaluation posts, `predictions.jsonl` and
    `metrics.json`. Where no posts are named, posts are drawn and strategies compared on them.

    Args:
        options: everything that was asked for.

    Raises:
        ValueError: if options, posts or model do not fit together.
        FileNotFoundError: if a file or folder does not exist.
    """
    data, args, method = options.data, options.args, options.data.method
    if options.draws_posts:
        if options.trainer_class is not DynamicCoTTrainer:
            raise ValueError(f"`method` is {method!r}, and posts are drawn for dynamic_cot only: give a `train_file`.")
        if unused := options.unused_without_posts():
            given = f"{', '.join(unused)} {'is' if len(unused) == 1 else 'are'} given"
            raise ValueError(
                f"--train_file is missing, but {given}: name the training posts. Without these options, posts are drawn and a "
                "small model is trained on them."
            )
        drawn_posts.compare_on_drawn_posts(options.args, options.prediction.predict_batch_size)
        return
    if options.prediction.eval_modalities and options.trainer_class is MulCoTRDTrainer:
        raise ValueError(
            "`eval_modalities` is not for `method` mulcot_rd: dynkp predict --modality answers from text or image."
        )
    if isinstance(args, MulCoTRDConfig):  # whose `task` is checked already
        mulcot_rd.check_assistant(args, cast(Modality, data.modality))
    else:
        resolve_task(args.task)
    train_posts, eval_posts = load_data(data, args)
    model, processor = load_model(options, train_posts)
    trainer = options.trainer_class(
        model=model,
        args=args,
        train_dataset=only(train_posts, data.modality),
        eval_dataset=None if eval_posts is None else only(eval_posts, data.modality),
        processing_class=processor,
        peft_config=get_peft_config(options.model),
        quantization_config=get_quantization_config(options.model) if options.model.model_name_or_path else None,
    )
    # A small model from scratch, of no name, is built for whatever posts there are.
    named = options.model.model_name_or_path
    if named and data.modality == "both" and isinstance(trainer.processing_class, ProcessorMixin):
        check_images_present(train_posts, "training")
        if eval_posts is not None and "prompt" not in (train_posts.column_names or ()):
            check_images_present(eval_posts, "evaluation")
    trainer.modality = cast(Modality, data.modality)  # saved with the model
    announce(trainer, method, data.modality)
    if named and trainer.accelerator.is_main_process:
        announce_replaced_task(named, trainer)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(args))
    trainer.save_model(args.output_dir)
    if eval_posts is None:
        return
    if isinstance(trainer, MulCoTRDTrainer):
        mulcot_rd.evaluate(trainer, eval_posts, options)
    else:
        evaluate(trainer, eval_posts, options)


def announce_replaced_task(name: str, trainer: PostTrainer) -> None:
    """Log one line if the model that is trained further was saved with another task, which the run replaces.

    Args:
        name: the folder or Hub id of the model.
        trainer: the trainer.
    """
    try:
        saved = find_saved_task(find_checkpoint(name))
    except (OSError, ValueError) as error:  # the training needs no saved task
        logger.warning("The task that %s was saved with cannot be read: %s", name, error)
        return
    new = trainer.saved_task()
    if saved is None or (saved.task, saved.modality, saved.method) == (new.task, new.modality, new.method):
        return
    logger.info(
        "%s was trained with task %r (method %s, modality %s), which this run replaces with %r (method %s, modality %s).",
        name, saved.task.name, saved.method, saved.modality, new.task.name, new.method, new.modality,
    )  # fmt: skip


def checkpoint_to_resume(args: PostConfig) -> str | bool | None:
    """Find what `--resume_from_checkpoint` stands for.

    Args:
        args: with `resume_from_checkpoint`: `last` (or `true`) is the newest complete checkpoint in `output_dir`, if there is
            one.

    Returns:
        What `Trainer.train` takes; None for a run from the start.
    """
    wanted = args.resume_from_checkpoint
    if wanted is None or wanted.lower() in ("false", "none"):
        return None
    if wanted.lower() not in ("last", "true"):
        return wanted
    # True lets the trainer choose: it passes over a checkpoint that a killed run left unfinished.
    return (Path(args.output_dir).is_dir() and get_last_checkpoint(args.output_dir) is not None) or None
