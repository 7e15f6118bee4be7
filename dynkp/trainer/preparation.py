"""From whatever a user calls a dataset to validated posts a trainer can read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset

from dynkp.data.posts import validate_posts
from dynkp.data.prompts import KeyphraseTask
from dynkp.trainer.keyphrase_config import KeyphraseConfig


logger = logging.getLogger(__name__)


def prepare_posts(
    dataset: Any, name: str, args: KeyphraseConfig, task: KeyphraseTask, takes_images: bool
) -> Dataset | IterableDataset:
    """Normalise and validate a dataset of posts before the first step.

    Args:
        dataset: what [`~dynkp.data.posts.validate_posts`] takes: a dataset, a streaming dataset or a list of rows.
        name: `"train"`, `"eval"` or an evaluation set's name; it is part of the report's file name.
        args: options `on_invalid`, `check_images`, `output_dir`, `disable_tqdm`.
        task: its separator must not occur inside a keyphrase.
        takes_images: whether the model has a vision tower; for a text model pictures are left out.

    Returns:
        The posts that can be trained on, in their order.

    Raises:
        InvalidPostsError: if a post cannot be trained on and `args.on_invalid` is `"error"`.
    """
    main = PartialState().is_main_process
    report_file = None
    if args.on_invalid == "skip" and main:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        report_file = Path(args.output_dir) / f"invalid_posts.{name}.jsonl"
    posts, report = validate_posts(
        dataset,
        separator=task.separator,
        on_invalid=args.on_invalid,
        report_file=report_file,
        check_images=args.check_images and takes_images,
        unique_ids=args.unique_ids,
        progress=main and not args.disable_tqdm,
    )
    if main and report.total:
        logger.info("%s set: %s", name, report.summary())
    if not takes_images:
        if report.total > report.without_image:
            logger.warning(
                "The model reads text only: the pictures of %d %s posts are left out.", report.total - report.without_image, name
            )
        posts = posts.remove_columns([column for column in ("image", "images") if column in (posts.column_names or ())])
    return posts
