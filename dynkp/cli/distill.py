"""The command `dynkp distill`: what MulCoT-RD's student learns from, written by its assistant."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynkp.cli.arguments import (
    CommandParser,
    above_zero,
    add_batch_size,
    add_dtype_and_device,
    add_image_dir,
    add_no_progress,
    add_on_invalid,
    add_posts,
    add_split,
    at_least,
    check_inputs,
    positive,
)
from dynkp.cli.errors import hide_library_bars, log_to_stderr, resumable

logger = logging.getLogger(__name__)

DESCRIPTION = """\
Prepare a student's training with a trained assistant (MulCoT-RD; docs/methods/mulcot_rd.md).

cache    writes the assistant's soft labels, so that the student trains without it in memory
augment  adds the response chains that the assistant wrote to the training posts, where their prediction is right"""

EPILOG = """\
examples:
  dynkp distill cache --model runs/assistant --student Qwen/Qwen2.5-VL-3B-Instruct \\
      --posts train.jsonl --image-dir images --output soft_labels
      the task is the assistant's; then dynkp train --method mulcot_rd --soft_labels soft_labels
  dynkp predict --model runs/assistant --prompt chain --do-sample --temperature 0.7 \\
      --posts train.jsonl --image-dir images --output chains.jsonl
  dynkp distill augment --posts train.jsonl --image-dir images --chains chains.jsonl --output augmented.jsonl
      the posts of train.jsonl, and one more for each response chain that ends in its post's label
"""

_CACHE = """\
Write the assistant's likeliest tokens at every token of the posts' answers, with their log-probabilities at temperature T.

Files are written as they fill up, and the same command continues an interrupted or killed run; to continue with other settings
is an error. accelerate launch -m dynkp distill cache ... divides the posts among all GPUs.

At the end it prints how much probability the likeliest k tokens leave out, and, with --student, how much of the divergence
between the two models k tokens keep. Of several processes, the first prints it of what is written by then; the same command
again prints it of everything."""

_AUGMENT = """\
Add the assistant's response chains to the training posts: each becomes a post with the response chain as its rationale and the
id ID#assistant, if its prediction is right. The teacher's posts stay as they are."""


def parser() -> argparse.ArgumentParser:
    """Build the parser; docs/cli.md is made of its help."""
    parser = CommandParser("distill", DESCRIPTION, EPILOG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="cache|augment")
    cache = commands.add_parser("cache", description=_CACHE, help="write soft labels")
    _add_posts(cache, "the assistant's")
    cache.add_argument(
        "--model", required=True, metavar="DIR_OR_ID", help="the assistant: a saved model, or an adapter (its base is found)"
    )
    cache.add_argument("--output", required=True, metavar="DIR", help="the folder of soft labels")
    cache.add_argument("--top-k", type=positive, default=64, metavar="K", help="tokens kept at each place (default: 64)")
    cache.add_argument(
        "--temperature", type=above_zero, default=2.0, metavar="T", help="T of the student's training (default: 2.0)"
    )
    cache.add_argument(
        "--student", metavar="DIR_OR_ID", help="cut the vocabulary to the ids it shares with the assistant, and compare the two"
    )
    cache.add_argument(
        "--compare",
        type=at_least(0),
        default=16,
        metavar="N",
        help="with --student: posts on which what the truncation does to the divergence is measured; 0: none (default: 16)",
    )
    add_batch_size(cache)
    add_dtype_and_device(cache)
    add_no_progress(cache)

    augment = commands.add_parser("augment", description=_AUGMENT, help="add the assistant's response chains")
    _add_posts(augment, "that of the predictions in --chains")
    augment.add_argument(
        "--chains", required=True, metavar="FILE", help="the assistant's answers to these posts: dynkp predict --prompt chain"
    )
    augment.add_argument("--output", required=True, metavar="FILE", help="the posts to train the student on, as JSON lines")
    return parser


def _add_posts(parser: argparse.ArgumentParser, whose: str) -> None:
    add_posts(parser, "training posts with labels, and rationales where they have some")
    add_image_dir(parser)
    add_split(parser, "train")
    parser.add_argument("--task", help=f"masc, msc or keyphrases (default: {whose}, if it is recorded, or masc)")
    parser.add_argument("--ignore-saved-task", action="store_true", help="follow --task even where it contradicts that")
    add_on_invalid(parser, "posts that cannot be used")


def main(argv: Sequence[str] | None = None) -> None:
    """Run `dynkp distill`.

    Args:
        argv: the arguments after `dynkp distill`; those of the process if None.

    Raises:
        ValueError, OSError, ImportError: if files or settings do not allow the run.
        Interrupted: after Ctrl-C.
    """
    arguments = parser().parse_args(argv)
    log_to_stderr()
    if arguments.command == "augment" or arguments.no_progress:
        hide_library_bars()
    check_inputs(arguments, "posts", "image_dir")
    check_inputs(arguments, "chains", kind="file")
    with resumable(f"the same command continues with {arguments.output}"):
        (_cache if arguments.command == "cache" else _augment)(arguments)


def _cache(arguments: argparse.Namespace) -> None:
    from dynkp.batches.two_task_collator import TwoTaskCollator
    from dynkp.data.reasoning_tasks import ReasoningTask, resolve_reasoning_task
    from dynkp.distillation.assistant import Assistant, check_vocabularies
    from dynkp.distillation.soft_labels import (
        SoftLabelWriter,
        assistant_fingerprint,
        task_fingerprint,
        truncated_probability,
        truncation_effect,
        write_soft_labels,
    )
    from dynkp.files.json_files import write_json
    from dynkp.models.checkpoints import check_available, find_checkpoint, load_processor
    from dynkp.models.saved_task import find_saved_task, task_to_use

    # Ranks share nothing but the folder, in which each has files of its own.
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if arguments.task is not None:
        resolve_reasoning_task(arguments.task)
    check_available(arguments.model, "--model")
    if arguments.student is not None:
        check_available(arguments.student, "--student")
    device = _device(arguments.device)
    checkpoint = find_checkpoint(arguments.model)
    saved = None if arguments.ignore_saved_task else find_saved_task(checkpoint)
    task = task_to_use(saved, checkpoint, arguments.task, default="masc")
    if not isinstance(task, ReasoningTask):
        raise ValueError(f"{arguments.model!r} was trained with task {task.name!r}; an assistant has one of MulCoT-RD's tasks")
    posts = _posts(arguments, task)
    processor = load_processor(checkpoint)
    assistant = Assistant.load(arguments.model, dtype=arguments.dtype, device=device)
    assert assistant.tokenizer is not None
    vocabulary = assistant.vocabulary
    if arguments.student is not None:
        student_processor = load_processor(find_checkpoint(arguments.student))
        check_vocabularies(getattr(student_processor, "tokenizer", student_processor), assistant.tokenizer)
        student = Assistant.load(arguments.student, dtype=arguments.dtype, device="cpu")
        vocabulary = min(vocabulary, student.vocabulary)
    top_k = min(arguments.top_k, vocabulary)
    settings = {
        "assistant": assistant_fingerprint(arguments.model),
        "dtype": str(assistant.model.dtype),
        "task": task_fingerprint(task),
        "temperature": arguments.temperature,
        "top_k": top_k,
        "vocabulary": vocabulary,
    }
    writer = SoftLabelWriter(arguments.output, settings, assistant.tokenizer, rank)
    collator = TwoTaskCollator(processor, task)
    try:
        written = write_soft_labels(
            writer,
            assistant,
            collator,
            posts.select(range(rank, len(posts), ranks)),
            top_k=top_k,
            temperature=arguments.temperature,
            vocabulary=vocabulary,
            batch_size=arguments.batch_size,
            progress=not arguments.no_progress and rank == 0,
        )
    finally:
        writer.close()
    size = sum(file.stat().st_size for file in Path(arguments.output).glob("labels-*.safetensors"))
    print(f"{arguments.output}: {written:,} answers written, {len(writer.locations):,} in all, {size / 1e6:,.1f} MB")
    if rank:
        return
    shares = truncated_probability(arguments.output)
    report: dict[str, Any] = {"left_out": shares}
    print(f"probability left out by the likeliest k tokens: {_listed(shares, '.2%')}")
    if arguments.student is not None and arguments.compare:
        student.model.to(device)
        some = posts.select(range(min(arguments.compare, len(posts))))
        effect = truncation_effect(student, assistant, collator, some, top_k=top_k, temperature=arguments.temperature)
        report["divergence_kept"] = effect
        print(f"divergence from {arguments.student} that k tokens keep: {_listed(effect, '.1%')}")
    write_json(Path(arguments.output, "truncation.json"), report)


def _augment(arguments: argparse.Namespace) -> None:
    from datasets import concatenate_datasets

    from dynkp.data.sources import write_posts_jsonl
    from dynkp.prediction.prediction_files import read_predictions

    task = _task_of_chains(arguments)
    posts = _posts(arguments, task, check_images=False)
    chains = {str(row["id"]): row["raw"] for row in read_predictions(arguments.chains, "raw")}
    if unknown := sorted(chains.keys() - set(posts["id"])):
        raise ValueError(f"{arguments.chains} has chains of posts that {arguments.posts} has not: {', '.join(unknown[:5])}")
    right = [index for index, row in enumerate(posts.remove_columns("images")) if task.is_right(row, chains.get(row["id"], ""))]
    added = posts.select(right).map(
        lambda row: {"rationale": chains[row["id"]], "id": f"{row['id']}#assistant"}, load_from_cache_file=False
    )
    write_posts_jsonl(concatenate_datasets([posts, added]), arguments.output, image_dir=arguments.image_dir)
    print(
        f"{arguments.output}: {len(posts):,} posts and {len(right):,} more with a chain of the assistant's, which wrote "
        f"{len(chains):,} chains, {len(right) / max(1, len(chains)):.1%} of them right"
    )


def _task_of_chains(arguments: argparse.Namespace) -> Any:
    """The task that `dynkp predict` recorded beside the response chains, unless another is asked for."""
    from dynkp.data.reasoning_tasks import resolve_reasoning_task
    from dynkp.files.json_files import read_json

    record = Path(f"{arguments.chains}.meta.json")
    recorded = None
    if record.is_file() and not arguments.ignore_saved_task:
        recorded = read_json(record).get("settings", {}).get("task", {}).get("name")
    if recorded and arguments.task not in (None, recorded):
        raise ValueError(
            f"{arguments.chains} was predicted with task {recorded!r}, not {arguments.task!r}: leave --task out, or add "
            "--ignore-saved-task"
        )
    return resolve_reasoning_task(arguments.task or recorded or "masc")


def _posts(arguments: argparse.Namespace, task: Any, check_images: bool = True) -> Any:
    from dynkp.data.sentiment_posts import load_sentiment_posts
    from dynkp.trainer.preparation import keep_answerable

    posts, _ = load_sentiment_posts(
        arguments.posts,
        task=task,
        image_dir=arguments.image_dir,
        split=arguments.split,
        on_invalid=arguments.on_invalid,
        check_images=check_images,
        progress=False,
    )
    return keep_answerable(posts, "train", task, arguments.on_invalid)


def _device(name: str) -> Any:
    import torch

    if name != "auto":
        return torch.device(name)
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return torch.device("cpu")
    return torch.device(found.type, int(os.environ.get("LOCAL_RANK", 0)))


def _listed(values: dict[int, float], form: str) -> str:
    return ", ".join(f"{k}: {value:{form}}" for k, value in values.items())
