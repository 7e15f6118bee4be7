"""Validation of posts before the first step of a training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from tqdm import tqdm

from dynkp.batches.collators import PairedTargetCollator
from dynkp.batches.lengths import post_lengths
from dynkp.data.posts import validate_posts
from dynkp.data.reasoning_tasks import ReasoningTask
from dynkp.data.rows import LOAD_FINDINGS
from dynkp.files.json_lines import write_json_lines
from dynkp.trainer.post_config import PostConfig

logger = logging.getLogger(__name__)


def prepare_posts(
    dataset: Any,
    name: str,
    args: PostConfig,
    takes_images: bool,
    separator: str = "; ",
    need_keyphrases: bool = True,
    refuses: Callable[[tuple[int, int]], str | None] | None = None,
) -> Dataset | IterableDataset:
    """Bring a dataset of posts into the package's schema and validate it.

    Args:
        dataset (`Dataset`, `IterableDataset` or a list of rows): what [`~dynkp.data.posts.validate_posts`] takes.
        name (`str`): `"train"`, `"eval"` or an evaluation set's name; part of the report's file name.
        args ([`~dynkp.trainer.post_config.PostConfig`]): options `on_invalid`, `check_images`, `output_dir`, `disable_tqdm`.
        takes_images (`bool`): whether the model has a vision tower; for a text model, images are removed.
        separator (`str`, *optional*, defaults to `"; "`): what must not occur inside a keyphrase.
        need_keyphrases (`bool`, *optional*, defaults to `True`): whether a post without keyphrases is invalid.
        refuses (`Callable`, *optional*): returns why the processor refuses images of a size, as in `validate_posts`.

    Returns:
        `Dataset` or `IterableDataset`: the posts that can be trained on, in their order.

    Raises:
        InvalidPostsError: if a post cannot be trained on and `args.on_invalid` is `"error"`.
        ValueError: if there is no post.
    """
    main = PartialState().is_main_process
    report_file = None
    if args.on_invalid == "skip" and main:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        report_file = Path(args.output_dir) / f"invalid_posts.{name}.jsonl"
    posts, report = validate_posts(
        dataset,
        separator=separator,
        need_keyphrases=need_keyphrases,
        on_invalid=args.on_invalid,
        report_file=report_file,
        check_images=args.check_images,
        use_images=takes_images,
        refuses=refuses,
        unique_ids=args.unique_ids,
        progress=main and not args.disable_tqdm,
    )
    if isinstance(posts, Dataset) and not len(posts):
        raise ValueError(f"the {name} set has no posts; give at least one, or None for no such set.")
    if main and report.total:
        logger.info("%s set: %s", name, report.summary())
    if takes_images and main and report.total and report.without_image == report.total:
        logger.warning(
            "The model reads images, but none of the %d %s posts has one. Images are read from the column 'images'.",
            report.total,
            name,
        )
    if not takes_images:
        if report.total > report.without_image:
            logger.warning(
                "The model reads text only: the images of %d %s posts are left out.",
                report.total - report.without_image,
                name,
            )
        removed = ("image", "images", LOAD_FINDINGS)
        posts = posts.remove_columns([column for column in removed if column in (posts.column_names or ())])
    return posts


def fit_max_length(dataset: Any, name: str, args: PostConfig, collator: Any) -> Any:
    """Find posts whose prompt leaves no token for a target within `max_length`, before the first step.

    Such a prompt would lose image placeholders or its end. Posts whose target is cut are counted. A stream is not read ahead,
    nor are posts for a collator other than [`~dynkp.batches.collators.PairedTargetCollator`]; there, the collator raises the
    error when it comes to such a post.

    Args:
        dataset (`Dataset` or `IterableDataset`): validated posts.
        name (`str`): name of the set, for messages and files.
        args ([`~dynkp.trainer.post_config.PostConfig`]): options `max_length`, `on_invalid`, `output_dir`, `disable_tqdm`.
        collator (`Callable`): the collator of the batches.

    Returns:
        `Dataset` or `IterableDataset`: the posts that fit: all of them, or with `args.on_invalid="skip"` without the others,
        which are listed in `too_long_posts.<name>.jsonl`.

    Raises:
        ValueError: with the first ids and the remedy, if prompts are too long and `args.on_invalid` is `"error"`, or if all
        are.
    """
    if args.max_length is None or not isinstance(dataset, Dataset) or not isinstance(collator, PairedTargetCollator):
        return dataset
    main = PartialState().is_main_process
    bar = tqdm(dataset, desc="Measuring posts", unit="post", disable=not main or args.disable_tqdm)
    lengths = list(post_lengths(collator, bar))
    too_long = [length for length in lengths if length.prompt >= args.max_length]
    cut = [length.id for length in lengths if length.prompt < args.max_length < length.prompt + length.target]
    if cut and main:
        logger.warning(
            "%d of %d %s posts have a target that is cut at `max_length`=%d (first: %s); a rationale that is cut loses its "
            "answer. The longest post has %d tokens.",
            len(cut), len(lengths), name, args.max_length, ", ".join(cut[:5]),
            max(length.prompt + length.target for length in lengths),
        )  # fmt: skip
    if not too_long:
        return dataset
    if args.on_invalid == "error" or len(too_long) == len(lengths):
        first = ", ".join(f"{length.id} ({length.prompt} tokens)" for length in too_long[:10])
        raise ValueError(
            f"`max_length` is {args.max_length}, but the prompts of {len(too_long)} {name} posts, image placeholders included, "
            f"leave nothing of it for a target: {first}. Set max_length to None or above "
            f"{max(length.prompt for length in too_long)}, make the images smaller, or, if others are left, drop these posts "
            "with on_invalid='skip'."
        )
    if main:
        report_file = Path(args.output_dir) / f"too_long_posts.{name}.jsonl"
        write_json_lines(report_file, (length._asdict() for length in too_long))
        logger.warning("%d %s posts are dropped: their prompts fill `max_length`; see %s.", len(too_long), name, report_file)
    dropped = {length.id for length in too_long}
    return dataset.select([index for index, length in enumerate(lengths) if length.id not in dropped])


def keep_answerable(
    posts: Dataset | IterableDataset, name: str, task: ReasoningTask, on_invalid: str
) -> Dataset | IterableDataset:
    """Find posts without an answer or an aspect before the first step.

    A stream is not read ahead; there, the collator raises the error when it comes to such a post.

    Args:
        posts (`Dataset` or `IterableDataset`): validated posts.
        name (`str`): name of the set, for messages.
        task ([`~dynkp.data.reasoning_tasks.ReasoningTask`]): the task they must fit.
        on_invalid (`str`): `"error"` or `"skip"`.

    Returns:
        `Dataset` or `IterableDataset`: the posts that fit.

    Raises:
        ValueError: with the first ids, if there are others and `on_invalid` is `"error"`, or if none fits.
    """
    if not isinstance(posts, Dataset):
        return posts
    columns = [column for column in ("id", "text", "aspect", "label", "keyphrases") if column in posts.column_names]
    kept, problems = [], []
    for index, row in enumerate(posts.select_columns(columns)):
        try:
            task.answer(row)
            task.label_prompt(row)
        except ValueError as error:
            problems.append(str(error))
        else:
            kept.append(index)
    if problems and (on_invalid == "error" or not kept):
        shown = "\n  ".join(problems[:10])
        raise ValueError(
            f"{len(problems)} of {len(posts)} {name} posts do not fit task {task.name!r}:\n  {shown}\n"
            "Correct them, or drop them with on_invalid='skip'."
        )
    if problems:
        logger.warning("%d %s posts are dropped, first: %s", len(problems), name, problems[0])
        return posts.select(kept)
    return posts
