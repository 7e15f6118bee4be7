"""Train a model to predict keyphrases, predict the evaluation posts, score them.

--method chooses how: dynamic_cot (the default; --strategy direct is plain fine-tuning), aimkp, dynamic_aimkp (both
in one), or mulcot_rd (chains of reasons and sentiments; examples/mulcot_rd.sh has its whole pipeline).
`--method aimkp --help` shows that method's options.

Without arguments: the embedded default. Posts with pictures are drawn, a small LLaVA-shaped model is built and
trained on them from scratch, once on direct answers and once with Dynamic CoT, and the two are compared. A few
minutes on two cores, nothing downloaded:

    python examples/train.py

Your own posts, still with a small model from scratch (JSONL rows: id, text, keyphrases, image, rationale):

    python examples/train.py --train_file train.jsonl --eval_file test.jsonl --image_dir images --output_dir out

A published setting, on as many GPUs as there are; any option of the recipe can be overridden behind it:

    accelerate launch examples/train.py --config examples/recipes/mmkp_dynamic_cot_qwen2_5_vl_3b.yaml \
        --train_file train.jsonl --eval_file test.jsonl --image_dir images --gamma avg

A model that masks, and what it knows from either modality alone (AimKP's Table 1):

    python examples/train.py --method aimkp --train_file train.jsonl --eval_file test.jsonl --image_dir images \
        --eval_modalities both text image

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

import torch
import yaml
from datasets import Dataset, IterableDataset
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from dynkp import (
    AimKPConfig,
    AimKPTrainer,
    DynamicAimKPConfig,
    DynamicAimKPTrainer,
    DynamicCoTConfig,
    DynamicCoTTrainer,
    KeyphraseConfig,
    KeyphraseTrainer,
    MulCoTRDConfig,
    MulCoTRDTrainer,
    generate_keyphrases,
    load_posts,
    write_predictions,
)
from dynkp.data.baselines import most_frequent_keyphrase, nearest_neighbour_keyphrases
from dynkp.data.mixing import PostMixtureConfig, load_mixture
from dynkp.data.tasks import resolve_task
from dynkp.files.json_files import write_json
from dynkp.report.evaluation import Evaluation, gold_posts
from dynkp.report.scores import comparison_table, score_predictions
from dynkp.report.tables import markdown_table
from dynkp.synthetic.tiny_model import build_tiny_vlm
from dynkp.training import drawn_posts, reasoning_posts

logger = logging.getLogger("train")

# --method: the trainer and its options.
METHODS: dict[str, tuple[type[KeyphraseTrainer], type[KeyphraseConfig]]] = {
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


@dataclass
class DataArguments(PostMixtureConfig):
    """How to train, and what to train, evaluate and predict on."""

    method: str = field(
        default="dynamic_cot",
        metadata={"help": "How to train: dynamic_cot (default), aimkp, dynamic_aimkp (both in one) or mulcot_rd."},
    )
    modality: str = field(
        default="both",
        metadata={"help": "What of a post to train on and to predict from: both (default), text or image (a specialist)."},
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
        default=None, metadata={"help": "Folder that image names are relative to. Without it, posts have no pictures."}
    )
    eval_image_dir: str | None = field(default=None, metadata={"help": "The same for --eval_file; --image_dir if not given."})


@dataclass
class PredictionArguments:
    """How to predict."""

    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Longest output in tokens; by default 32 after strategy 'direct', else 512."}
    )
    predict_batch_size: int = field(default=32, metadata={"help": "Posts per generation batch and process."})
    eval_modalities: list[str] = field(
        default_factory=list,
        metadata={"help": "What of the posts to predict from, one after the other: both, text, image. By default --modality."},
    )


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
            "0.6, or 0 where posts have rationales (their losses would never fall below γ) or are masked."
        },
    )
    tiny_vocab_size: int = field(default=8192, metadata={"help": "Size of its byte-level BPE vocabulary."})
    tiny_image_size: int = field(default=64, metadata={"help": "Side of its square pictures in pixels; patches are 8 px."})


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    trainer_class, config_class = METHODS[method_of(argv)]
    parser = TrlParser(
        (DataArguments, config_class, ModelConfig, PredictionArguments, TinyModelArguments),
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
        if trainer_class is not DynamicCoTTrainer:
            raise ValueError(f"`method` is {data.method!r}, and posts are drawn for dynamic_cot only: give a `train_file`.")
        drawn_posts.compare_on_drawn_posts(args, prediction.predict_batch_size)
        return

    if prediction.eval_modalities and trainer_class is MulCoTRDTrainer:
        raise ValueError(
            "`eval_modalities` is not for `method` mulcot_rd: dynkp predict --modality answers from text or image."
        )
    train_posts, eval_posts = load_data(data, args)
    model, processor = load_model(model_args, tiny, train_posts, args)
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=only(train_posts, data.modality),
        eval_dataset=None if eval_posts is None else only(eval_posts, data.modality),
        processing_class=processor,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args) if model_args.model_name_or_path else None,
    )
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(args))
    trainer.save_model(args.output_dir)
    if eval_posts is None:
        return
    if isinstance(trainer, MulCoTRDTrainer):
        batch_size = prediction.predict_batch_size
        reasoning_posts.evaluate(trainer, eval_posts, prediction.max_new_tokens, batch_size, data.modality)
    else:
        evaluate(trainer, eval_posts, data, prediction)


def method_of(argv: list[str]) -> str:
    """--method, on the command line or in the recipe; needed before the options are read, because it decides on them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method")
    parser.add_argument("--config")
    known, _ = parser.parse_known_args(argv)
    recipe = yaml.safe_load(Path(known.config).read_text(encoding="utf-8")) if known.config else None
    method = known.method or (recipe or {}).get("method", "dynamic_cot")
    if method not in METHODS:
        raise ValueError(f"`method` is {method!r}; choose one of {', '.join(METHODS)}.")
    return method


def only(posts: Dataset | IterableDataset, modality: str) -> Dataset | IterableDataset:
    """The posts without their pictures, or without their texts; posts of which nothing is left are dropped and counted."""
    if modality == "both":
        return posts
    if modality == "text":
        pictures = [column for column in ("image", "images") if column in (posts.column_names or ())]
        kept = posts.remove_columns(pictures).filter(lambda text: bool((text or "").strip()), input_columns=["text"])
    elif modality == "image":
        column = "images" if "images" in (posts.column_names or ()) else "image"
        kept = posts.filter(bool, input_columns=[column]).map(lambda _: {"text": ""}, input_columns=["text"])
    else:
        raise ValueError(f"`modality` is {modality!r}; choose 'both', 'text' or 'image'.")
    if isinstance(posts, Dataset):
        logger.info("Of %d posts %d have the modality %r.", len(posts), len(kept), modality)
    return kept


def load_data(data: DataArguments, args: KeyphraseConfig) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """Training posts and, if there are any, evaluation posts."""
    train_posts, eval_posts = load_train_posts(data, args), None
    if data.eval_file:
        eval_image_dir = data.image_dir if data.eval_image_dir is None else data.eval_image_dir
        if isinstance(args, MulCoTRDConfig):
            eval_posts = reasoning_posts.load(data.eval_file, args, eval_image_dir, split="test")
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


def load_train_posts(data: DataArguments, args: KeyphraseConfig) -> Dataset | IterableDataset:
    """One dataset of posts, or a mixture of several."""
    if isinstance(args, MulCoTRDConfig):
        if data.datasets or data.streaming:
            raise ValueError("`method` is 'mulcot_rd', which reads one `train_file` whole: no `datasets`, no `streaming`.")
        return reasoning_posts.load(data.train_file, args, data.image_dir)
    if data.datasets:
        separator = resolve_task(args.task).separator if args.separator is None else args.separator
        train_posts = load_mixture(data, on_invalid=args.on_invalid, separator=separator)
        args.unique_ids = False  # each dataset was checked by itself, and a mixture may repeat its posts
        return train_posts
    return load_posts(data.train_file, image_dir=data.image_dir, streaming=data.streaming)


def load_model(
    model_args: ModelConfig, tiny: TinyModelArguments, train_posts: Dataset | IterableDataset, args: KeyphraseConfig
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
    texts = reasoning_posts.texts(train_posts, args) if isinstance(args, MulCoTRDConfig) else texts_of(train_posts, args)
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
    logger.info("No model named: one of %.1f M parameters is trained from scratch.", model.num_parameters() / 1e6)
    return model, processor


def texts_of(train_posts: Dataset, args: KeyphraseConfig) -> list[str]:
    """What a tokenizer made for these posts must know."""
    if "keyphrases" not in train_posts.column_names:
        raise ValueError("A model from scratch needs posts; name one (--model_name_or_path) for prompts and completions.")
    rows = train_posts.select_columns(["text", "keyphrases", "rationale"])
    texts = [" ".join([row["text"] or "", *row["keyphrases"], row["rationale"] or ""]) for row in rows]
    return [resolve_task(args.task).instruction, *texts]


def checkpoint_to_resume(args: KeyphraseConfig) -> str | bool | None:
    """`--resume_from_checkpoint last` (or true) stands for the newest checkpoint in `output_dir`, if there is one."""
    wanted = args.resume_from_checkpoint
    if wanted is None or wanted.lower() in ("false", "none"):
        return None
    if wanted.lower() not in ("last", "true"):
        return wanted
    # True lets the trainer choose: it passes over a checkpoint that a killed run left unfinished.
    return (Path(args.output_dir).is_dir() and get_last_checkpoint(args.output_dir) is not None) or None


def evaluate(trainer: KeyphraseTrainer, eval_posts: Dataset, data: DataArguments, options: PredictionArguments) -> None:
    """Predict on all ranks; score, print and write on the first."""
    name = getattr(trainer.args, "strategy", data.method) if data.method == "dynamic_cot" else data.method
    predictions = {
        modality: predict(trainer, eval_posts, modality, options) for modality in options.eval_modalities or [data.modality]
    }
    if not trainer.accelerator.is_main_process:
        return
    train_posts = trainer.train_dataset
    # Rows of prompt and completion have no such column: without it there is neither "seen" nor a baseline.
    has_keyphrases = "keyphrases" in train_posts.column_names
    train_keyphrases = {phrase for phrases in train_posts["keyphrases"] for phrase in phrases} if has_keyphrases else None
    output_dir = Path(trainer.args.output_dir)
    systems, by_modality = {}, Evaluation(gold_posts(eval_posts), convention=trainer.args.eval_convention, resamples=0)
    for number, (modality, rows) in enumerate(predictions.items()):
        system = name if modality == "both" else f"{name}, {modality} only"
        systems[system] = score_predictions(rows, eval_posts, train_keyphrases)
        by_modality.add(system, rows)
        write_predictions(output_dir / ("predictions.jsonl" if not number else f"predictions.{modality}.jsonl"), rows)
    for system, lists in (baselines(train_posts, eval_posts) if has_keyphrases else {}).items():
        constant = [{"id": post_id, "keyphrases": list_} for post_id, list_ in zip(eval_posts["id"], lists, strict=True)]
        systems[system] = score_predictions(constant, eval_posts, train_keyphrases)
    write_json(
        output_dir / "metrics.json",
        {"method": data.method, "strategy": name, "systems": systems, "log": trainer.state.log_history},
    )
    written = f"{output_dir}/predictions.jsonl, {output_dir}/metrics.json"
    print(f"\n{comparison_table(systems)}\n\nPercent, convention cmkp. Written: {written}")
    if len(predictions) > 1:
        print(f"\n{markdown_table(by_modality.modality_table())}\n\nPercent, convention {trainer.args.eval_convention}.")


def predict(trainer: KeyphraseTrainer, posts: Dataset, modality: str, options: PredictionArguments) -> list[Any]:
    """Every rank's share of the predictions, together and in the posts' order."""
    state = trainer.accelerator
    reasons = "reasoning" in trainer.target_kinds
    rows: list[Any] = list(
        generate_keyphrases(
            state.unwrap_model(trainer.model),
            trainer.processing_class,
            posts.select(range(state.process_index, len(posts), state.num_processes)),
            task=trainer.task,
            batch_size=options.predict_batch_size,
            max_new_tokens=options.max_new_tokens or (512 if reasons else 32),
            modality=modality,  # type: ignore[arg-type]
            progress=state.is_main_process and not trainer.args.disable_tqdm,
        )
    )
    order = {post_id: index for index, post_id in enumerate(posts["id"])}
    return sorted(trainer.gather_list(rows), key=lambda row: order[row["id"]])


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
