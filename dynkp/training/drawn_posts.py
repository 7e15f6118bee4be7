"""The default of `dynkp train`: direct answers against Dynamic CoT on posts that the package draws.

A drawn post's keyphrase names an icon and a mood; the icon needs image and text, the mood the text (see
docs/drawn_posts.md). A small LLaVA-shaped model first learns to see and to read, without keyphrases, in place of
pretraining; then a copy of it is trained with each strategy. To show that posts need both modalities, the trained
models are also scored with the image removed and with the text removed.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from dynkp import DynamicCoTConfig, DynamicCoTTrainer, KeyphraseTask, generate_keyphrases, write_predictions
from dynkp.data.baselines import most_frequent_keyphrase
from dynkp.files.json_files import write_json
from dynkp.prediction.empty_outputs import advice_on_empty_outputs
from dynkp.report.scores import score_predictions
from dynkp.synthetic.tiny_model import build_tiny_vlm
from dynkp.synthetic.world import describe_posts, draw_posts
from dynkp.training.closing import closing_table, wrapped
from dynkp.training.opening import announce

logger = logging.getLogger(__name__)

TASK = KeyphraseTask("drawn_posts", "tags ?")
TRAIN_POSTS, TEST_POSTS, PRETRAINING_ROWS = 4000, 600, 16000
PRETRAINING: dict[str, Any] = {"max_steps": 600, "learning_rate": 1e-3, "strategy": "direct", "log_choices": False}
# What the command line may override.
DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/drawn_posts",
    "max_steps": 600,
    "per_device_train_batch_size": 48,
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "adam_beta2": 0.98,
    "warmup_steps": 50,
    # Direct targets have 3 tokens here, so this makes γ·L = 1.5 nats: outputs stay mixed (docs/methods/dynamic_cot.md).
    "gamma": "0.5",
    "save_strategy": "no",
    # Images are decoded and prompts tokenized in a process beside the training step.
    "dataloader_num_workers": 1,
}
# Reasoning takes about 30 words of this world's vocabulary.
MAX_NEW_TOKENS = 48


def compare_on_drawn_posts(args: DynamicCoTConfig, predict_batch_size: int) -> None:
    """Draw posts, pretrain a model, train it with each strategy, predict, score and print.

    Leaves the last model, `predictions.jsonl`, `predictions.STRATEGY.jsonl` and `metrics.json` in `args.output_dir`.

    Args:
        args: options of the trainings; the strategy is compared with `"direct"`.
        predict_batch_size: posts per generation batch.
    """
    started = time.perf_counter()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # more threads cost a model this small more than they give, and its worker wants a core
    train_posts = draw_posts(TRAIN_POSTS, split="train", seed=args.seed)
    test_posts = draw_posts(TEST_POSTS, split="test", seed=args.seed)
    descriptions = describe_posts(PRETRAINING_ROWS, seed=args.seed)
    words = vocabulary(train_posts, descriptions)
    pretrained, processor = build_tiny_vlm(words, patch_size=16, seed=args.seed)
    logger.info(
        "Drawn: %d posts to train on, %d to test, %d rows to pretrain on. A model of %.2f M parameters, from scratch.",
        len(train_posts), len(test_posts), len(descriptions), pretrained.num_parameters() / 1e6,
    )  # fmt: skip

    logger.info("Pretraining: describe images, find the icon that a text means; no keyphrases.")
    train(pretrained, processor, descriptions, dataclasses.replace(args, **PRETRAINING))

    output_dir = Path(args.output_dir)
    train_keyphrases = {phrase for phrases in train_posts["keyphrases"] for phrase in phrases}
    systems: dict[str, dict[str, Any]] = {}
    logs: dict[str, Any] = {}
    outputs: list[Any] = []
    for strategy in dict.fromkeys(("direct", args.strategy)):
        logger.info("Training with strategy %r.", strategy)
        # Not a deep copy: TRL's trainer has bound the model's forward to the original (docs/footguns.md).
        model, _ = build_tiny_vlm(words, patch_size=16, seed=args.seed)
        model.load_state_dict(pretrained.state_dict())
        trainer = train(model, processor, train_posts, dataclasses.replace(args, strategy=strategy))
        logs[strategy] = trainer.state.log_history
        for modality, name in (("both", strategy), ("text", f"{strategy}, no image"), ("image", f"{strategy}, no text")):
            predictions = list(
                generate_keyphrases(
                    trainer.model,
                    processor,
                    test_posts,
                    task=TASK,
                    batch_size=predict_batch_size,
                    max_new_tokens=MAX_NEW_TOKENS,
                    modality=modality,  # type: ignore[arg-type]
                    progress=not args.disable_tqdm,
                )
            )
            systems[name] = score_predictions(predictions, test_posts, train_keyphrases, convention=args.eval_convention)
            if modality == "both":
                outputs += predictions
                write_predictions(output_dir / f"predictions.{strategy}.jsonl", predictions)
                write_predictions(output_dir / "predictions.jsonl", predictions)
    trainer.save_model(args.output_dir)

    frequent = most_frequent_keyphrase(train_posts.select_columns(["keyphrases"]))
    constant = [{"id": post_id, "keyphrases": [frequent]} for post_id in test_posts["id"]]
    systems[f"most frequent ({frequent})"] = score_predictions(
        constant, test_posts, train_keyphrases, convention=args.eval_convention
    )
    write_json(output_dir / "metrics.json", {"strategy": args.strategy, "systems": systems, "logs": logs})
    print(f"\n{closing_table(systems)}\n")
    print(wrapped("Unseen are compositions of seen words that no training post has."))
    print(
        wrapped(
            f"Written: predictions.jsonl, metrics.json and the model in {output_dir}; {time.perf_counter() - started:.0f} s"
        )
    )
    if advice := advice_on_empty_outputs(outputs, MAX_NEW_TOKENS, str(output_dir / "predictions.jsonl")):
        logger.warning("%s", wrapped(advice))


def vocabulary(train_posts: Dataset, descriptions: Dataset) -> list[str]:
    """Collect the texts that the word-level tokenizer must know."""
    texts = [TASK.instruction]
    for post in train_posts.select_columns(["text", "keyphrases", "rationale"]):
        texts += [post["text"], TASK.reasoning_target(post["keyphrases"], post["rationale"])]
    for row in descriptions.select_columns(["prompt", "completion"]):
        texts += [message["content"] for message in (*row["prompt"], *row["completion"])]
    return texts


def train(model: Any, processor: Any, posts: Dataset, args: DynamicCoTConfig) -> DynamicCoTTrainer:
    """Train `model` in place; return its trainer."""
    trainer = DynamicCoTTrainer(model=model, args=args, train_dataset=posts, processing_class=processor, task=TASK)
    announce(trainer, "dynamic_cot")
    trainer.train()
    return trainer
