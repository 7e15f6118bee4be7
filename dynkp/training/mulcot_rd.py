"""What a training run does otherwise for MulCoT-RD: posts with labels, and an evaluation of labels and response chains."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from datasets import Dataset

from dynkp import MulCoTRDConfig, PostTrainer, generate_reasoning, load_posts, write_predictions
from dynkp.batches.reasoning_renderer import PromptKind
from dynkp.data.reasoning_tasks import KeyphraseReasoningTask, ReasoningTask, resolve_reasoning_task
from dynkp.data.sentiment_posts import load_sentiment_posts
from dynkp.files.json_files import write_json
from dynkp.models.checkpoints import check_available, find_checkpoint
from dynkp.models.saved_task import Modality, find_saved_task
from dynkp.prediction.empty_outputs import advice_on_empty_outputs
from dynkp.report.scores import score_predictions
from dynkp.report.sentiment import SentimentEvaluation, labelled_posts
from dynkp.training.closing import aligned, closing_table, wrapped

if TYPE_CHECKING:
    from dynkp.training.options import TrainingOptions

logger = logging.getLogger(__name__)


def load(source: Any, args: MulCoTRDConfig, image_dir: str | None, split: str = "train") -> Dataset:
    """Load the posts of the options' task.

    Args:
        source: file, folder or Hub id.
        args: `task`, `on_invalid`, `disable_tqdm`.
        image_dir: folder that image names are relative to.
        split: of a folder or Hub dataset.

    Returns:
        The posts; images are checked later, by the trainer.
    """
    if isinstance(resolve_reasoning_task(args.task), KeyphraseReasoningTask):
        return load_posts(source, image_dir=image_dir, split=split)
    posts, _ = load_sentiment_posts(
        source,
        task=args.task,
        image_dir=image_dir,
        split=split,
        on_invalid=args.on_invalid,
        use_images=False,
        progress=not args.disable_tqdm,
    )
    return posts


def check_assistant(args: MulCoTRDConfig) -> None:
    """Refuse an assistant that does not exist, or was trained with another task than the student is to learn.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if the tasks differ.
    """
    if args.assistant is None:
        return
    check_available(args.assistant, "--assistant")
    saved = find_saved_task(find_checkpoint(args.assistant))
    if saved is not None and saved.task.name != args.task:
        raise ValueError(
            f"`assistant` {args.assistant!r} was trained with task {saved.task.name!r}, and `task` is {args.task!r}: take an "
            "assistant of the student's task."
        )


def texts(posts: Dataset, args: MulCoTRDConfig) -> list[str]:
    """Collect the texts that a tokenizer built for these posts must know: their prompts and targets."""
    task = resolve_reasoning_task(args.task)
    known = []
    for row in posts.remove_columns("images"):
        prompts = (ask(row)[0]["content"][-1]["text"] for ask in (task.label_prompt, task.chain_prompt))
        known.append("\n".join([*prompts, task.label_target(row), task.chain_target(row) or ""]))
    return known


def evaluate(trainer: PostTrainer, eval_posts: Dataset, options: TrainingOptions) -> None:
    """Answer both prompts on all processes, from the run's modality; score, print and write on the first.

    Leaves `predictions.jsonl` (of the label prompt, by which systems are compared), `chains.jsonl` (of the prompt that asks
    for a response chain) and `metrics.json` in `output_dir`.

    Args:
        trainer: the trainer, when its training is over.
        eval_posts: posts with labels, or with keyphrases for task `keyphrases`.
        options: the run's options.
    """
    state, task = trainer.accelerator, trainer.task
    assert isinstance(task, ReasoningTask)
    order = {post_id: index for index, post_id in enumerate(eval_posts["id"])}
    answers: dict[str, list[Any]] = {}
    limits: dict[PromptKind, int] = {kind: options.prediction.max_new_tokens or default for kind, default in _LONGEST.items()}
    for kind, limit in limits.items():
        rows: list[Any] = list(
            generate_reasoning(
                state.unwrap_model(trainer.model),
                trainer.processing_class,
                eval_posts.select(range(state.process_index, len(eval_posts), state.num_processes)),
                task=task,
                prompt=kind,
                batch_size=options.prediction.predict_batch_size,
                max_new_tokens=limit,
                modality=cast(Modality, options.data.modality),
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
    advice = None
    if isinstance(task, KeyphraseReasoningTask):
        train_keyphrases = {phrase for phrases in trainer.train_dataset["keyphrases"] for phrase in phrases}
        convention = trainer.args.eval_convention
        scores = {
            "systems": {"mulcot_rd": score_predictions(answers["label"], eval_posts, train_keyphrases, convention=convention)}
        }
        print(f"\n{closing_table(scores['systems'])}")
        advice = advice_on_empty_outputs(answers["label"], limits["label"], str(output_dir / "predictions.jsonl"))
    else:
        evaluation = SentimentEvaluation(labelled_posts(eval_posts, task.labels), task=task)
        evaluation.add("mulcot_rd", answers["label"], answers["chain"])
        scores = evaluation.report()
        for rows_of_cells in evaluation.tables():
            print(f"\n{aligned(rows_of_cells)}")
        print(f"\n{wrapped(evaluation.caption())}")
    write_json(output_dir / "metrics.json", {"method": "mulcot_rd", **scores, "log": trainer.state.log_history})
    print(f"\n{wrapped(f'Written: predictions.jsonl, chains.jsonl, metrics.json and the model in {output_dir}')}")
    if advice:
        logger.warning("%s", wrapped(advice))


# Prompt -> longest output in tokens, where none is given.
_LONGEST: dict[PromptKind, int] = {"label": 32, "chain": 512}
