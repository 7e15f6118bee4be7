"""The posts of a training run: read, mixed, held out, and restricted to one modality."""

from __future__ import annotations

import logging

from datasets import Dataset, IterableDataset

from dynkp import MulCoTRDConfig, PostConfig, load_posts
from dynkp.data.mixing import load_mixture
from dynkp.data.rows import LOAD_FINDINGS, undecoded, without_images
from dynkp.data.tasks import resolve_task
from dynkp.training import mulcot_rd
from dynkp.training.options import DataArguments, check_modality

logger = logging.getLogger(__name__)


def load_data(data: DataArguments, args: PostConfig) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """Load the training posts and, if there are any, the evaluation posts.

    Args:
        data: where they are, and how many to hold out.
        args: options of the trainer; `unique_ids` is set to False for a mixture, which may repeat posts.

    Returns:
        Both sets, with all their modalities. They are validated later, by the trainer.

    Raises:
        FileNotFoundError: if a file or a folder of images does not exist.
        ValueError: if posts cannot be read, held out or scored.
    """
    train_posts, eval_posts = _load_train_posts(data, args), None
    if data.eval_file:
        eval_image_dir = data.image_dir if data.eval_image_dir is None else data.eval_image_dir
        if isinstance(args, MulCoTRDConfig):
            eval_posts = mulcot_rd.load(data.eval_file, args, eval_image_dir, split="test")
        else:
            eval_posts = load_posts(data.eval_file, image_dir=eval_image_dir, split="test")
    elif data.eval_posts:
        if data.streaming:
            raise ValueError("`eval_posts` cannot hold out posts of a stream; give `eval_file`, or streaming=False.")
        split = train_posts.train_test_split(test_size=data.eval_posts, seed=args.seed)
        train_posts, eval_posts = split["train"], split["test"]
    if eval_posts is not None and "keyphrases" not in eval_posts.column_names and not isinstance(args, MulCoTRDConfig):
        raise ValueError(
            "The evaluation posts have no column 'keyphrases', so nothing could be scored after the training. Give posts with "
            "`id`, `text` and `keyphrases`; rows of prompt and completion can be trained on only."
        )
    return train_posts, eval_posts


def _load_train_posts(data: DataArguments, args: PostConfig) -> Dataset | IterableDataset:
    """One dataset of posts, or a mixture of several."""
    if isinstance(args, MulCoTRDConfig):
        if data.datasets or data.streaming:
            raise ValueError("`method` is 'mulcot_rd', which reads one `train_file` whole: no `datasets`, no `streaming`.")
        return mulcot_rd.load(data.train_file, args, data.image_dir)
    if data.datasets:
        separator = resolve_task(args.task).separator if args.separator is None else args.separator
        train_posts = load_mixture(data, on_invalid=args.on_invalid, separator=separator, use_images=False)
        # The trainer checks the images, and knows whether its model reads any.
        args.unique_ids = False  # each dataset was checked by itself, and a mixture may repeat its posts
        return train_posts
    return load_posts(data.train_file, image_dir=data.image_dir, streaming=data.streaming)


def only(posts: Dataset | IterableDataset, modality: str) -> Dataset | IterableDataset:
    """Restrict posts to one modality.

    Args:
        posts: the posts.
        modality: `"both"` changes nothing, `"text"` removes the images, `"image"` the texts.

    Returns:
        The posts of which something is left; how many that are is logged.

    Raises:
        ValueError: if the modality is not known.
    """
    check_modality(modality, "modality")
    if modality == "both":
        return posts
    if modality == "text":
        kept = without_images(posts).filter(lambda text: bool((text or "").strip()), input_columns=["text"])
    else:
        column = "images" if "images" in (posts.column_names or ()) else "image"
        # A post whose image could not be read stays, for the trainer to report it.
        columns = [name for name in (column, LOAD_FINDINGS) if name in (posts.column_names or ())]
        kept = posts.filter(lambda *values: any(values), input_columns=columns)
        kept = kept.map(lambda _: {"text": ""}, input_columns=["text"])
    if isinstance(posts, Dataset):
        logger.info("Of %d posts %d have the modality %r.", len(posts), len(kept), modality)
    return kept


def check_images_present(posts: Dataset | IterableDataset, name: str) -> None:
    """Refuse a set without any image for a model that reads images; that is nearly always a column of another name.

    Args:
        posts: the posts that are trained on; a stream is not read ahead.
        name: `"training"` or `"evaluation"`, for the error.

    Raises:
        ValueError: if no post has an image.
    """
    if not isinstance(posts, Dataset):
        return
    if "prompt" in posts.column_names:  # TRL's rows say themselves what the model is shown
        return
    for column in {"image", "images"} & set(posts.column_names):
        only_images = posts.select_columns([column])
        if any(row[column] for row in undecoded(only_images, only_images.features)):
            return
    raise ValueError(
        f"The model reads images, but none of the {len(posts):,} {name} posts has one. Images are read from the column "
        f"'images' (or 'image'); the columns are {', '.join(posts.column_names)}. If text alone is meant, give --modality text."
    )
