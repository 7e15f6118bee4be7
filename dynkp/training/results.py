"""The end of a keyphrase run: the evaluation posts predicted on all processes, scored beside baselines, printed, written."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from dynkp import PostTrainer, generate_keyphrases, write_predictions
from dynkp.data.baselines import most_frequent_keyphrase, nearest_neighbour_keyphrases
from dynkp.files.json_files import write_json
from dynkp.prediction.empty_outputs import advice_on_empty_outputs
from dynkp.report.evaluation import Evaluation, gold_posts
from dynkp.report.scores import score_predictions
from dynkp.training.closing import aligned, closing_table, wrapped
from dynkp.training.options import TrainingOptions

logger = logging.getLogger(__name__)


def evaluate(trainer: PostTrainer, eval_posts: Dataset, options: TrainingOptions) -> None:
    """Predict on all processes; score, print and write on the first.

    Leaves `predictions.jsonl` (of the first modality asked for), `predictions.MODALITY.jsonl` (of the others) and
    `metrics.json` in `output_dir`. Scores are of convention `eval_convention`, as during the training.

    Args:
        trainer: the trainer, when its training is over.
        eval_posts: posts with keyphrases, with all their modalities.
        options: the run's options.
    """
    method, convention = options.data.method, trainer.args.eval_convention
    name = getattr(trainer.args, "strategy", method) if method == "dynamic_cot" else method
    limit = longest_output(trainer, options)
    modalities = options.prediction.eval_modalities or [options.data.modality]
    predictions = {modality: predict(trainer, eval_posts, modality, options) for modality in modalities}
    if not trainer.accelerator.is_main_process:
        return
    train_posts = trainer.train_dataset
    # Rows of prompt and completion have no such column: without it there is neither "seen" nor a baseline.
    has_keyphrases = "keyphrases" in train_posts.column_names
    train_keyphrases = {phrase for phrases in train_posts["keyphrases"] for phrase in phrases} if has_keyphrases else None
    output_dir = Path(trainer.args.output_dir)
    systems, by_modality = {}, Evaluation(gold_posts(eval_posts), convention=convention, resamples=0)
    for number, (modality, rows) in enumerate(predictions.items()):
        system = name if modality == "both" else f"{name}, {modality} only"
        systems[system] = score_predictions(rows, eval_posts, train_keyphrases, convention=convention)
        by_modality.add(system, rows)
        write_predictions(output_dir / ("predictions.jsonl" if not number else f"predictions.{modality}.jsonl"), rows)
    for system, lists in (baselines(train_posts, eval_posts) if has_keyphrases else {}).items():
        constant = [{"id": post_id, "keyphrases": list_} for post_id, list_ in zip(eval_posts["id"], lists, strict=True)]
        systems[system] = score_predictions(constant, eval_posts, train_keyphrases, convention=convention)
    write_json(
        output_dir / "metrics.json",
        {"method": method, "strategy": name, "systems": systems, "log": trainer.state.log_history},
    )
    print(f"\n{closing_table(systems)}")
    if len(predictions) > 1:
        print(f"\n{aligned([row[1:] for row in by_modality.modality_table()])}")  # a system's name says its modality
    print(f"\n{wrapped(f'Written: predictions.jsonl, metrics.json and the model in {output_dir}')}")
    every = [row for rows in predictions.values() for row in rows]
    if advice := advice_on_empty_outputs(every, limit, str(output_dir / "predictions.jsonl")):
        logger.warning("%s", wrapped(advice))


def longest_output(trainer: PostTrainer, options: TrainingOptions) -> int:
    """The most tokens of an output: as asked for, or 32 for a model that was taught direct answers alone, else 512."""
    return options.prediction.max_new_tokens or (512 if "reasoning" in trainer.target_kinds else 32)


def predict(trainer: PostTrainer, posts: Dataset, modality: str, options: TrainingOptions) -> list[Any]:
    """Predict this process's share of the posts; every process gets the predictions of all, in the posts' order."""
    state = trainer.accelerator
    rows: list[Any] = list(
        generate_keyphrases(
            state.unwrap_model(trainer.model),
            trainer.processing_class,
            posts.select(range(state.process_index, len(posts), state.num_processes)),
            task=trainer.task,
            batch_size=options.prediction.predict_batch_size,
            max_new_tokens=longest_output(trainer, options),
            modality=modality,  # type: ignore[arg-type]
            progress=state.is_main_process and not trainer.args.disable_tqdm,
        )
    )
    order = {post_id: index for index, post_id in enumerate(posts["id"])}
    return sorted(trainer.gather_list(rows), key=lambda row: order[row["id"]])


def baselines(train_posts: Dataset | IterableDataset, eval_posts: Dataset) -> dict[str, list[list[str]]]:
    """Predict without a model, for comparison.

    Args:
        train_posts: posts with keyphrases.
        eval_posts: the posts to predict.

    Returns:
        System -> each post's keyphrases: the most frequent keyphrase of the training set, and, where scikit-learn is
        installed and the training posts are in memory, the keyphrases of the training post with the most similar text.
    """
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
