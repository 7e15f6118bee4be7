"""The command `dynkp predict`: posts and a model in, predictions out."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from dynkp.cli.arguments import (
    CommandParser,
    above_zero,
    add_batch_size,
    add_dtype_and_device,
    add_image_dir,
    add_no_progress,
    add_old_spelling,
    add_on_invalid,
    add_posts,
    add_split,
    check_inputs,
    json_object,
    positive,
    share,
)
from dynkp.cli.errors import RunFailedError, hide_library_bars, log_to_stderr, resumable
from dynkp.cli.processes import this_process

logger = logging.getLogger(__name__)

ENGINES = ("transformers", "vllm")

DESCRIPTION = """\
Predict the keyphrases of posts with a trained model, and write one JSON row per post:

  {"id", "keyphrases", "raw", "reasoned", "output_tokens", "prompt_tokens", "output_words", "mode", "modality"}

A model of MulCoT-RD (tasks msc, masc and keyphrases; docs/methods/mulcot_rd.md) answers --prompt label or --prompt chain:

  {"id", "prediction", "raw", "output_tokens", "prompt_tokens", "output_words", "prompt", "modality"}

A model that this package trained is asked as it was trained: its folder's dynkp_task.json has its prompt, separator and
modality. A request that contradicts it is an error, with one exception: a model trained on text and images may be shown one
of them (--modality), to see what each is worth. A model without the file is asked with --task, by default dynamic_cot.

Rows are appended batch by batch, and the same command continues an interrupted or killed run. FILE.meta.json records the
settings; to continue with other settings is an error. Decoding is greedy by default."""

EPILOG = """\
examples:
  dynkp predict --model out --posts test.jsonl --image-dir images --output predictions.jsonl
      a model that dynkp train saved; an adapter's folder (LoRA) will do as well
  accelerate launch -m dynkp predict --model out --posts test.jsonl --output predictions.jsonl
      the same on all GPUs: each process predicts a part of the posts
  dynkp predict --model out --num-beams 5 --do-sample --temperature 0.5 \\
      --decodes 3 --posts test.jsonl --image-dir images --output predictions.jsonl
      AimKP's decoding: beams with sampling, three times; dynkp evaluate averages the scores
  dynkp predict --model out --mode direct --modality text --posts test.jsonl --output text_only.jsonl
      without reasoning and without images
  dynkp predict --model out --prompt chain --posts test.tsv --image-dir images --output chains.jsonl
      of MulCoT-RD: the response chain; --prompt label, the default, asks for the prediction alone
then:
  dynkp evaluate --predictions predictions.jsonl --posts test.jsonl
"""


def parser() -> CommandParser:
    """Build the parser; docs/cli.md is made of its help."""
    parser = CommandParser("predict", DESCRIPTION, EPILOG)
    what = parser.add_argument_group("model, posts and output")
    what.add_argument(
        "--model", required=True, metavar="DIR_OR_ID", help="a saved model, a saved adapter (its base is found), or a Hub id"
    )
    what.add_argument("--adapter", metavar="DIR_OR_ID", help="a PEFT adapter on --model, or a released .pt file of one")
    what.add_argument("--merge-adapter", action="store_true", help="add the adapter to the weights first; faster")
    add_posts(what, "posts in any format that docs/data.md names; keyphrases are not needed")
    add_image_dir(what)
    add_split(what, "test")
    add_on_invalid(what, "posts that cannot be predicted, such as those with a broken image")
    what.add_argument("--output", required=True, metavar="FILE", help="the predictions, as JSON lines")

    how = parser.add_argument_group("prompt")
    how.add_argument(
        "--mode",
        choices=["auto", "think", "direct"],
        default="auto",
        help="auto: the model decides whether to reason. think: <think> is written for it behind the prompt. direct: no output "
        "begins with <think>, since the tokens it could begin with are forbidden until something else is written",
    )
    how.add_argument(
        "--modality",
        choices=["both", "text", "image"],
        help="what of a post to show (default: what the model was trained on, or both for a model saved without its task)",
    )
    how.add_argument(
        "--task",
        help="the task the model was trained with (default: the one saved with it, or dynamic_cot): dynamic_cot or aimkp for "
        "keyphrases; of MulCoT-RD msc (sentiment of posts), masc (towards an aspect) or keyphrases",
    )
    how.add_argument(
        "--prompt",
        choices=["label", "chain"],
        default="label",
        help="of MulCoT-RD's tasks: the prediction alone, or the response chain, which has reasons",
    )
    how.add_argument("--separator", help="between keyphrases in the answer (default: the task's, '; ' or ', ')")
    how.add_argument(
        "--ignore-saved-task",
        action="store_true",
        help="follow --task, --separator and --modality even where they contradict what the model was trained with",
    )

    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--max-new-tokens", type=positive, default=512, metavar="N", help="longest output (default: 512)")
    decoding.add_argument("--num-beams", type=positive, default=1, metavar="N", help="beams; 1, the default, is none")
    decoding.add_argument("--do-sample", action="store_true", help="sample, from the whole distribution unless --top-p")
    decoding.add_argument("--temperature", type=above_zero, metavar="T", help="of sampling (default: 1)")
    decoding.add_argument("--top-p", type=share, metavar="P", help="sample from the likeliest tokens of this probability only")
    decoding.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    decoding.add_argument(
        "--decodes",
        type=positive,
        default=1,
        metavar="N",
        help="decode every post N times, with seeds --seed to --seed+N-1: N rows per post, with a column decode",
    )

    where = parser.add_argument_group("engine")
    add_batch_size(where, None, "posts per batch and process (default: 8; vllm: 256)")
    add_dtype_and_device(where)
    where.add_argument(
        "--engine",
        choices=ENGINES,
        default="transformers",
        help="vllm (an extra) is much faster on a GPU; start it as one process, without beams",
    )
    add_old_spelling(where, "--backend", "--engine", choices=ENGINES)
    where.add_argument(
        "--vllm-options",
        type=json_object,
        default={},
        metavar="JSON",
        help="more arguments of vllm.LLM, such as '{\"tensor_parallel_size\": 4}'",
    )
    add_no_progress(where)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `dynkp predict`.

    Args:
        argv: the arguments after `dynkp predict`; those of the process if None.

    Raises:
        ValueError, OSError, ImportError: if files or settings do not allow the run.
        RunFailedError: if memory runs out.
        Interrupted: after Ctrl-C.
    """
    command = parser()
    arguments = command.parse_args(argv)
    _check_options(command, arguments)
    import torch

    log_to_stderr()
    if arguments.no_progress:
        hide_library_bars()
    process = this_process(arguments.device)
    try:
        with resumable(f"the same command continues with {arguments.output}"):
            _predict(command, arguments, process)
    except torch.OutOfMemoryError as error:
        raise RunFailedError(f"{error}. The same command with a smaller --batch-size continues.") from error
    finally:
        process.destroy_process_group()


def _check_options(command: CommandParser, arguments: argparse.Namespace) -> None:
    """Refuse options that do not fit together, whatever the model."""
    for name in ("temperature", "top_p"):
        if getattr(arguments, name) is not None and not arguments.do_sample:
            command.error(f"--{name.replace('_', '-')} is for sampling: add --do-sample")
    if arguments.decodes > 1 and not arguments.do_sample:
        command.error(f"--decodes {arguments.decodes}: without --do-sample every decode is the same")
    if arguments.engine == "vllm" and arguments.num_beams > 1:
        command.error("--num-beams: vLLM does not sample with beams; take --engine transformers")
    if arguments.vllm_options and arguments.engine != "vllm":
        command.error("--vllm-options needs --engine vllm")
    if Path(arguments.output).is_dir():
        command.error(f"--output {arguments.output} is a folder; name a file")


def _predict(command: CommandParser, arguments: argparse.Namespace, process: Any) -> None:
    from transformers import ProcessorMixin

    from dynkp.models.checkpoints import check_available, find_checkpoint
    from dynkp.models.released_adapters import SUFFIXES
    from dynkp.prediction.empty_outputs import advice_on_empty_outputs
    from dynkp.prediction.loading import run_settings
    from dynkp.prediction.posts import load_posts_to_predict
    from dynkp.prediction.run import PredictionRun
    from dynkp.prediction.summary import summarize_predictions

    if arguments.engine == "vllm" and process.num_processes > 1:
        raise ValueError(
            f"--engine vllm in {process.num_processes} processes: start it as one process; --vllm-options "
            f"'{{\"tensor_parallel_size\": {process.num_processes}}}' uses as many GPUs"
        )
    check_available(arguments.model, "--model")
    if arguments.adapter is not None and not arguments.adapter.endswith(SUFFIXES):  # not a released file
        check_available(arguments.adapter, "--adapter")
    check_inputs(arguments, "posts", "image_dir")
    checkpoint = find_checkpoint(arguments.model, arguments.adapter)
    question, saved = _question(command, arguments, checkpoint)
    processor = _processor(checkpoint)
    takes_images = processor is None or isinstance(processor, ProcessorMixin)
    posts = load_posts_to_predict(
        arguments.posts,
        question.task,
        image_dir=arguments.image_dir,
        split=arguments.split,
        on_invalid=arguments.on_invalid,
        use_images=takes_images and question.modality != "text",
        processor=processor,
        progress=not arguments.no_progress,
        is_first_process=process.is_main_process,
        num_processes=process.num_processes,
    )
    settings = _engine_settings(arguments)
    run = PredictionRun(
        posts,
        arguments.output,
        run_settings(checkpoint, question, settings),
        batch_size=arguments.batch_size or (256 if arguments.engine == "vllm" else 8),
        modality=question.modality,
        decodes=arguments.decodes,
        seed=arguments.seed if arguments.do_sample else None,
    )
    with closing(run):
        process.wait_for_everyone()  # all have looked at the settings before they are written
        if process.is_main_process:
            run.start(_info(arguments, process))
        process.wait_for_everyone()
        batches = run.pending()
        process.wait_for_everyone()  # all have seen what is pending before a row is added
        if batches:
            engine = _load_engine(checkpoint, question, settings, device=process.device, num_images=run.num_images)
            run.predict(
                engine,
                batches,
                rank=process.process_index,
                num_ranks=process.num_processes,
                progress=not arguments.no_progress,
            )
        process.wait_for_everyone()
        rows = run.finish() if process.is_main_process else []
    if process.is_main_process:
        done = "" if batches else ", all done before"
        print(f"{arguments.output}: {len(rows):,} predictions{done}; {summarize_predictions(rows)}")
        if cut_off := sum(row["output_tokens"] >= arguments.max_new_tokens for row in rows):
            logger.warning("%d outputs were cut off at --max-new-tokens %d", cut_off, arguments.max_new_tokens)
        longest = None if saved is None else saved.max_length
        if longest and (too_long := sum(row["prompt_tokens"] > longest for row in rows)):
            logger.warning(
                "%d prompts have more than the %d tokens (max_length) that the model was trained with; their predictions may "
                "be worse.",
                too_long,
                longest,
            )
        keyphrases = [row for row in rows if "keyphrases" in row]
        if advice := advice_on_empty_outputs(keyphrases, arguments.max_new_tokens, arguments.output):
            logger.warning("%s", advice)


def _question(command: CommandParser, arguments: argparse.Namespace, checkpoint: Any) -> tuple[Any, Any]:
    """What the model is asked (as it was trained, unless less or something else is asked for), and its saved task."""
    from dynkp.data.reasoning_tasks import ReasoningTask
    from dynkp.models.saved_task import check_mode, find_saved_task, modality_to_use, task_to_use
    from dynkp.prediction.loading import Question

    saved = None if arguments.ignore_saved_task else find_saved_task(checkpoint)
    task = task_to_use(saved, checkpoint, arguments.task, arguments.separator)
    if isinstance(task, ReasoningTask) and (arguments.mode != "auto" or arguments.separator is not None):
        command.error(f"--mode and --separator are not for --task {task.name}; --prompt says whether to reason")
    if arguments.prompt != "label" and not isinstance(task, ReasoningTask):
        command.error(f"--prompt is not for --task {task.name}; --mode says whether to reason")
    check_mode(saved, checkpoint, arguments.mode)
    return Question(task, arguments.mode, arguments.prompt, modality_to_use(saved, checkpoint, arguments.modality)), saved


def _processor(checkpoint: Any) -> Any:
    """The model's processor; None if there is none, which is an error only where an answer is generated."""
    from dynkp.models.checkpoints import load_processor

    try:
        return load_processor(checkpoint)
    except (OSError, ValueError):
        return None


def _engine_settings(arguments: argparse.Namespace) -> Any:
    from dataclasses import fields

    from dynkp.prediction.loading import EngineSettings

    return EngineSettings(**{field.name: getattr(arguments, field.name) for field in fields(EngineSettings)})


def _load_engine(*args: Any, **options: Any) -> Any:
    from dynkp.prediction.loading import load_engine

    return load_engine(*args, **options)


def _info(arguments: argparse.Namespace, process: Any) -> dict[str, Any]:
    """What is recorded with a run and not compared when the run is continued."""
    import torch
    import transformers

    import dynkp

    return {
        "model": arguments.model,
        "adapter": arguments.adapter,
        "posts": arguments.posts,
        "device": str(process.device),
        "processes": process.num_processes,
        "versions": {"dynkp": dynkp.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
    }
