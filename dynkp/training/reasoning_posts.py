"""What train.py does for MulCoT-RD in place of keyphrases: posts with labels, and their evaluation by label and chain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset

from dynkp import KeyphraseTrainer, MulCoTRDConfig, generate_reasoning, load_posts, write_predictions
from dynkp.batches.reasoning_renderer import PromptKind
from dynkp.data.reasoning_tasks import KeyphraseReasoningTask, ReasoningTask, resolve_reasoning_task
from dynkp.data.sentiment_posts import load_sentiment_posts
from dynkp.files.json_files import write_json
from dynkp.report.scores import comparison_table, score_predictions
from dynkp.report.sentiment import SentimentEvaluation, labelled_posts
from dynkp.report.tables import markdown_table


def load(source: Any, args: MulCoTRDConfig, image_dir: str | None, split: str = "train") -> Dataset:
    """The posts of the options' task; pictures are checked by the trainer."""
    if isinstance(resolve_reasoning_task(args.task), KeyphraseReasoningTask):
        return load_posts(source, image_dir=image_dir, split=split)
    posts, _ = load_sentiment_posts(
        source,
        task=args.task,
        image_dir=image_dir,
        split=split,
        on_invalid=args.on_invalid,
        check_images=False,
        progress=not args.disable_tqdm,
    )
    return posts


def texts(posts: Dataset, args: MulCoTRDConfig) -> list[str]:
    """What a tokenizer made for these posts must know: their prompts and targets."""
    task = resolve_reasoning_task(args.task)
    known = []
    for row in posts.remove_columns("images"):
        prompts = (ask(row)[0]["content"][-1]["text"] for ask in (task.label_prompt, task.chain_prompt))
        known.append("\n".join([*prompts, task.label_target(row), task.chain_target(row) or ""]))
    return known


def evaluate(
    trainer: KeyphraseTrainer, eval_posts: Dataset, max_new_tokens: int | None, batch_size: int, modality: Any = "both"
) -> None:
    """Answer both prompts on all ranks, from one modality or both; score, print and write on the first.

    Leaves `predictions.jsonl` (the label prompt, by which systems are compared), `chains.jsonl` and `metrics.json`.
    """
    state, task = trainer.accelerator, trainer.task
    assert isinstance(task, ReasoningTask)
    order = {post_id: index for index, post_id in enumerate(eval_posts["id"])}
    answers: dict[str, list[Any]] = {}
    kinds: tuple[PromptKind, ...] = ("label", "chain")
    for kind in kinds:
        rows: list[Any] = list(
            generate_reasoning(
                state.unwrap_model(trainer.model),
                trainer.processing_class,
                eval_posts.select(range(state.process_index, len(eval_posts), state.num_processes)),
                task=task,
                prompt=kind,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens or (512 if kind == "chain" else 32),
                modality=modality,
                progress=state.is_main_process and not trainer.args.disable_tqdm,
            )
        )
        answers[kind] = sorted(trainer.gather_list(rows), key=lambda row: order[row["id"]])
    if not state.is_main_process:
        return
    output_dir = Path(trainer.args.output_dir)
    write_predictions(output_dir / "predictions.jsonl", answers["label"])
    write_predictions(output_dir / "chains.jsonl", answers["chain"])
    scores: dict[str, Any]
    if isinstance(task, KeyphraseReasoningTask):
        train_keyphrases = {phrase for phrases in trainer.train_dataset["keyphrases"] for phrase in phrases}
        scores = {"systems": {"mulcot_rd": score_predictions(answers["label"], eval_posts, train_keyphrases)}}
        print(f"\n{comparison_table(scores['systems'])}\n\nPercent, convention cmkp.")
    else:
        evaluation = SentimentEvaluation(labelled_posts(eval_posts, task.labels), task=task)
        evaluation.add("mulcot_rd", answers["label"], answers["chain"])
        scores = evaluation.report()
        for rows_of_cells in evaluation.tables():
            print(f"\n{markdown_table(rows_of_cells)}")
        print(f"\n{evaluation.caption()}")
    write_json(output_dir / "metrics.json", {"method": "mulcot_rd", **scores, "log": trainer.state.log_history})
    print(f"Written: predictions.jsonl, chains.jsonl, metrics.json in {output_dir}")
