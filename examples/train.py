"""Train a model to predict keyphrases, predict the evaluation posts, score them.

Without arguments: the embedded default. Posts with pictures are drawn, a small LLaVA-shaped model is built and
trained on them from scratch, once on direct answers and once with Dynamic CoT, and the two are compared. A few
minutes on two cores, nothing downloaded:

    python examples/train.py

Your own posts, still with a small model from scratch (JSONL rows: id, text, keyphrases, image, rationale):

    python examples/train.py --train_file train.jsonl --eval_file test.jsonl --image_dir images --output_dir out

A published setting, on as many GPUs as there are; any option of the recipe can be overridden behind it:

    accelerate launch examples/train.py --config examples/recipes/mmkp_dynamic_cot_qwen2_5_vl_3b.yaml \
        --train_file train.jsonl --eval_file test.jsonl --image_dir images --gamma avg

Every run leaves `predictions.jsonl` and `metrics.json` in `--output_dir`, beside the model and its checkpoints.
`--resume_from_checkpoint last` continues an interrupted run.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import drawn_posts
import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from dynkp import DynamicCoTConfig, DynamicCoTTrainer, generate_keyphrases, load_posts, write_predictions
from dynkp.data.baselines import most_frequent_keyphrase, nearest_neighbour_keyphrases
from dynkp.data.mixing import PostMixtureConfig, load_mixture
from dynkp.data.prompts import resolve_task
from dynkp.report.scores import summarise, table, write_json
from dynkp.synthetic.tiny_model import build_tiny_vlm

logger = logging.getLogger("train")

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


@dataclass
class DataArguments(PostMixtureConfig):
    """What to train, evaluate and predict on."""

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
        default=None, metadata={"help": "Folder that image names are relative to. Without it, posts have no pictures."}
    )
    eval_image_dir: str | None = field(
        default=None, metadata={"help": "The same for --eval_file; --image_dir if not given."}
    )


@dataclass
class PredictionArguments:
    """How to predict."""

    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Longest output in tokens; by default 32 after strategy 'direct', else 512."}
    )
    predict_batch_size: int = field(default=32, metadata={"help": "Posts per generation batch and process."})


@dataclass
class TinyModelArguments:
    """The model that is built where none is named."""

    tiny_hidden_size: int = field(default=128, metadata={"help": "Width of the language model built from scratch."})
    tiny_layers: int = field(default=1, metadata={"help": "Its layers."})
    tiny_heads: int = field(default=2, metadata={"help": "Its attention heads."})
    tiny_attention_dropout: float | None = field(
        default=None,
        metadata={
            "help": "Its attention dropout: with few heads it drops words, which keeps it from memorising posts. By default "
            "0.6, or 0 where posts have rationales: their losses would never fall below γ."
        },
    )
    tiny_vocab_size: int = field(default=8192, metadata={"help": "Size of its byte-level BPE vocabulary."})
    tiny_image_size: int = field(default=64, metadata={"help": "Side of its square pictures in pixels; patches are 8 px."})


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = TrlParser(
        (DataArguments, DynamicCoTConfig, ModelConfig, PredictionArguments, TinyModelArguments),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    named = {argument.partition("=")[0].lstrip("-").replace("-", "_") for argument in argv if argument.startswith("--")}
    if not named & {"model_name_or_path", "config"}:
        parser.set_defaults_with_config(**FROM_SCRATCH)
    if not named & {"train_file", "datasets", "config"}:
        parser.set_defaults_with_config(**drawn_posts.DEFAULTS)
    data, args, model_args, prediction, tiny = parser.parse_args_and_config(argv)
    logging.basicConfig(level=logging.INFO if args.process_index == 0 else logging.ERROR, format="%(message)s")
    if not data.train_file and not data.datasets:
        drawn_posts.compare_on_drawn_posts(args, prediction.predict_batch_size)
        return

    train_posts, eval_posts = load_data(data, args)
    model, processor = load_model(model_args, tiny, train_posts, args)
    trainer = DynamicCoTTrainer(
        model=model,
        args=args,
        train_dataset=train_posts,
        eval_dataset=eval_posts,
        processing_class=processor,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args) if model_args.model_name_or_path else None,
    )
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(args))
    trainer.save_model(args.output_dir)
    if eval_posts is not None:
        evaluate(trainer, prediction)


def load_data(data: DataArguments, args: DynamicCoTConfig) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """Training posts and, if there are any, evaluation posts."""
    train_posts, eval_posts = load_train_posts(data, args), None
    if data.eval_file:
        eval_image_dir = data.image_dir if data.eval_image_dir is None else data.eval_image_dir
        eval_posts = load_posts(data.eval_file, image_dir=eval_image_dir, split="test")
    elif data.eval_posts:
        if data.streaming:
            raise ValueError("`eval_posts` cannot hold out posts of a stream; give `eval_file`, or streaming=False.")
        split = train_posts.train_test_split(test_size=data.eval_posts, seed=args.seed)
        train_posts, eval_posts = split["train"], split["test"]
    if eval_posts is not None and "keyphrases" not in eval_posts.column_names:
        raise ValueError(
            "The evaluation posts have no column 'keyphrases', so nothing could be scored after the training. Give posts with "
            "`id`, `text` and `keyphrases`; rows of prompt and completion can be trained on only."
        )
    return train_posts, eval_posts


def load_train_posts(data: DataArguments, args: DynamicCoTConfig) -> Dataset | IterableDataset:
    """One dataset of posts, or a mixture of several."""
    if data.datasets:
        separator = resolve_task(args.task).separator if args.separator is None else args.separator
        train_posts = load_mixture(data, on_invalid=args.on_invalid, separator=separator)
        args.unique_ids = False  # each dataset was checked by itself, and a mixture may repeat its posts
        return train_posts
    return load_posts(data.train_file, image_dir=data.image_dir, streaming=data.streaming)


def load_model(
    model_args: ModelConfig, tiny: TinyModelArguments, train_posts: Dataset | IterableDataset, args: DynamicCoTConfig
) -> tuple[Any, Any]:
    """What the trainer takes as `model` and `processing_class`."""
    if model_args.model_name_or_path:
        args.model_init_kwargs = {
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
        }
        return model_args.model_name_or_path, None
    if isinstance(train_posts, IterableDataset):
        raise ValueError("A model from scratch reads all training texts first; name one (--model_name_or_path) to stream.")
    if "keyphrases" not in train_posts.column_names:
        raise ValueError("A model from scratch needs posts; name one (--model_name_or_path) for prompts and completions.")
    texts = train_posts.select_columns(["text", "keyphrases", "rationale"])
    dropout = tiny.tiny_attention_dropout
    if dropout is None:
        dropout = 0.0 if any(texts["rationale"]) else 0.6
    model, processor = build_tiny_vlm(
        [resolve_task(args.task).instruction]
        + [" ".join([row["text"] or "", *row["keyphrases"], row["rationale"] or ""]) for row in texts],
        word_level=False,
        vocab_size=tiny.tiny_vocab_size,
        hidden_size=tiny.tiny_hidden_size,
        layers=tiny.tiny_layers,
        heads=tiny.tiny_heads,
        attention_dropout=dropout,
        image_size=tiny.tiny_image_size,
        seed=args.seed,
    )
    logger.info("No model named: one of %.1f M parameters is trained from scratch.", model.num_parameters() / 1e6)
    return model, processor


def checkpoint_to_resume(args: DynamicCoTConfig) -> str | bool | None:
    """`--resume_from_checkpoint last` (or true) stands for the newest checkpoint in `output_dir`, if there is one."""
    wanted = args.resume_from_checkpoint
    if wanted is None or wanted.lower() in ("false", "none"):
        return None
    if wanted.lower() not in ("last", "true"):
        return wanted
    # True lets the trainer choose: it passes over a checkpoint that a killed run left unfinished.
    return (Path(args.output_dir).is_dir() and get_last_checkpoint(args.output_dir) is not None) or None


def evaluate(trainer: DynamicCoTTrainer, options: PredictionArguments) -> None:
    """Predict on all ranks; score, print and write on the first."""
    state, eval_posts = trainer.accelerator, trainer.eval_dataset
    mine = range(state.process_index, len(eval_posts), state.num_processes)
    model = state.unwrap_model(trainer.model)
    predictions: list[Any] = list(
        generate_keyphrases(
            model,
            trainer.processing_class,
            eval_posts.select(mine),
            task=trainer.task,
            batch_size=options.predict_batch_size,
            max_new_tokens=options.max_new_tokens or (32 if trainer.args.strategy == "direct" else 512),
            progress=state.is_main_process and not trainer.args.disable_tqdm,
        )
    )
    if state.num_processes > 1:
        predictions = gather_object(predictions)
    if not state.is_main_process:
        return
    train_posts = trainer.train_dataset
    # Rows of prompt and completion have no such column: without it there is neither "seen" nor a baseline.
    has_keyphrases = "keyphrases" in train_posts.column_names
    train_keyphrases = {phrase for phrases in train_posts["keyphrases"] for phrase in phrases} if has_keyphrases else None
    systems = {f"{trainer.args.strategy}": summarise(predictions, eval_posts, train_keyphrases)}
    for name, lists in (baselines(train_posts, eval_posts) if has_keyphrases else {}).items():
        rows = [{"id": post_id, "keyphrases": list_} for post_id, list_ in zip(eval_posts["id"], lists, strict=True)]
        systems[name] = summarise(rows, eval_posts, train_keyphrases)
    output_dir = Path(trainer.args.output_dir)
    order = {post_id: index for index, post_id in enumerate(eval_posts["id"])}
    write_predictions(output_dir / "predictions.jsonl", sorted(predictions, key=lambda row: order[row["id"]]))
    write_json(
        output_dir / "metrics.json",
        {"strategy": trainer.args.strategy, "systems": systems, "log": trainer.state.log_history},
    )
    print(f"\n{table(systems)}\n\nPercent, convention cmkp. Written: {output_dir}/predictions.jsonl, {output_dir}/metrics.json")


def baselines(train_posts: Dataset | IterableDataset, eval_posts: Dataset) -> dict[str, list[list[str]]]:
    """What needs no model: the yardsticks to print beside one."""
    frequent = most_frequent_keyphrase(train_posts.select_columns(["keyphrases"]))
    lists = {f"most frequent keyphrase ({frequent})": [[frequent]] * len(eval_posts)}
    if isinstance(train_posts, IterableDataset):
        return lists  # a neighbour could only be found among texts in memory
    try:
        texts = [text or "" for text in train_posts["text"]]
        lists["nearest neighbour in text"] = nearest_neighbour_keyphrases(
            texts, train_posts["keyphrases"], [text or "" for text in eval_posts["text"]]
        )
    except ImportError as error:
        logger.warning("%s", error)
    return lists


if __name__ == "__main__":
    main()
