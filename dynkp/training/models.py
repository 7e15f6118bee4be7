"""The model of a training run: a named one, or a small one from scratch."""

from __future__ import annotations

import logging
from typing import Any

from datasets import Dataset, IterableDataset

from dynkp import AimKPConfig, MulCoTRDConfig, PostConfig
from dynkp.data.tasks import resolve_task
from dynkp.synthetic.tiny_model import build_tiny_vlm
from dynkp.training import mulcot_rd
from dynkp.training.options import TrainingOptions

logger = logging.getLogger(__name__)


def load_model(options: TrainingOptions, train_posts: Dataset | IterableDataset) -> tuple[Any, Any]:
    """Choose or build the model.

    Args:
        options: the model's name and how to load it, which goes into `options.args.model_init_kwargs`; or the sizes of the
            model to build.
        train_posts: the posts whose texts a tokenizer built from scratch must know.

    Returns:
        What the trainer takes as `model` and `processing_class`: the name and None, or a model and its processor.

    Raises:
        ValueError: if a model from scratch is wanted for posts that cannot be read first.
    """
    named, tiny, args = options.model, options.tiny, options.args
    if named.model_name_or_path:
        args.model_init_kwargs = {
            "revision": named.model_revision,
            "attn_implementation": named.attn_implementation,
            "dtype": named.dtype,
        }
        return named.model_name_or_path, None
    if isinstance(train_posts, IterableDataset):
        raise ValueError("A model from scratch reads all training texts first; name one (--model_name_or_path) to stream.")
    texts = mulcot_rd.texts(train_posts, args) if isinstance(args, MulCoTRDConfig) else texts_of(train_posts, args)
    dropout = tiny.tiny_attention_dropout
    if dropout is None:
        # Every view of a post would draw its own: gradients would differ by that rather than by what is masked.
        dropout = 0.0 if any(train_posts["rationale"]) or isinstance(args, AimKPConfig) else 0.6
    model, processor = build_tiny_vlm(
        texts,
        word_level=False,
        vocab_size=tiny.tiny_vocab_size,
        hidden_size=tiny.tiny_hidden_size,
        layers=tiny.tiny_layers,
        heads=tiny.tiny_heads,
        attention_dropout=dropout,
        image_size=tiny.tiny_image_size,
        seed=args.seed,
    )
    logger.info("No model is named (--model_name_or_path): a small one is trained from scratch.")
    return model, processor


def texts_of(train_posts: Dataset, args: PostConfig) -> list[str]:
    """Collect the texts that a tokenizer built for these posts must know.

    Raises:
        ValueError: for rows of prompt and completion, which are no posts.
    """
    if "keyphrases" not in train_posts.column_names:
        raise ValueError("A model from scratch needs posts; name one (--model_name_or_path) for prompts and completions.")
    rows = train_posts.select_columns(["text", "keyphrases", "rationale"])
    texts = [" ".join([row["text"] or "", *row["keyphrases"], row["rationale"] or ""]) for row in rows]
    return [resolve_task(args.task).instruction, *texts]
