"""The command `dynkp predict`: posts and a model in, predictions out."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynkp.cli.arguments import above_zero, json_object, positive, share

logger = logging.getLogger(__name__)

DESCRIPTION = """\
Predict the keyphrases of posts with a trained model, and write one JSON row per post:

  {"id", "keyphrases", "raw", "reasoned", "output_tokens", "prompt_tokens", "output_words", "mode", "modality"}

With --task msc, masc or keyphrases (docs/methods/mulcot_rd.md), answer the label prompt or the chain prompt instead:

  {"id", "prediction", "raw", "output_tokens", "prompt_tokens", "output_words", "prompt", "modality"}

Rows are appended as soon as they are done. Stop the command, or have it killed, and start it again: it goes on where it
was. FILE.meta.json keeps the settings; going on with others is an error. Decoding is greedy unless you say otherwise."""

EPILOG = """\
examples:
  dynkp predict --model out --posts test.jsonl --image-dir images --output predictions.jsonl
      a model that examples/train.py saved; an adapter's folder (LoRA) will do as well
  accelerate launch -m dynkp predict --model out --posts test.jsonl --output predictions.jsonl
      the same on all GPUs: each process takes its share
  dynkp predict --model llava-hf/llava-1.5-7b-hf --adapter aimkp --task aimkp --num-beams 5 --do-sample \\
      --temperature 0.5 --decodes 3 --posts test.jsonl --image-dir images --output predictions.jsonl
      AimKP's decoding: beams with sampling, three times; dynkp evaluate averages the scores
  dynkp predict --model out --mode direct --modality text --posts test.jsonl --output text_only.jsonl
      without reasoning and without pictures
  dynkp predict --model out --task masc --prompt chain --posts test.tsv --image-dir images --output chains.jsonl
      sentiment towards an aspect, with reasons; --prompt label, the default, for the prediction alone
then:
  dynkp evaluate --predictions predictions.jsonl --posts test.jsonl
"""


def parser() -> argparse.ArgumentParser:
    """The command line; docs/cli.md is made of its help."""
    parser = argparse.ArgumentParser(
        prog="dynkp predict", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what")
    what.add_argument(
        "--model", required=True, metavar="DIR_OR_ID", help="a saved model, a saved adapter (its base is found), or a Hub id"
    )
    what.add_argument("--adapter", metavar="DIR_OR_ID", help="a PEFT adapter on --model, or a released .pt file of one")
    what.add_argument("--merge-adapter", action="store_true", help="add the adapter to the weights first; faster")
    what.add_argument(
        "--posts", required=True, metavar="FILE", help="posts in any form that docs/data.md names; keyphrases are not needed"
    )
    what.add_argument("--image-dir", metavar="DIR", help="the folder that image names are relative to")
    what.add_argument("--split", default="test", help="of a folder or Hub dataset (default: test)")
    what.add_argument(
        "--on-invalid",
        choices=["error", "skip"],
        default="error",
        help="posts that cannot be predicted, such as those with a broken picture: stop (the default), or leave them out",
    )
    what.add_argument("--output", required=True, metavar="FILE", help="the predictions, as JSON lines")

    how = parser.add_argument_group("how")
    how.add_argument(
        "--mode",
        choices=["auto", "think", "direct"],
        default="auto",
        help="auto: the model decides whether to reason. think: <think> is written for it behind the prompt. direct: no output "
        "begins with <think>, since the tokens it could begin with are forbidden until something else is written",
    )
    how.add_argument(
        "--modality", choices=["both", "text", "image"], default="both", help="what of a post to show (default: both)"
    )
    how.add_argument(
        "--task",
        default="dynamic_cot",
        help="as in training: dynamic_cot (the default) or aimkp for keyphrases; of MulCoT-RD msc (sentiment of posts), masc "
        "(towards an aspect) or keyphrases",
    )
    how.add_argument(
        "--prompt",
        choices=["label", "chain"],
        default="label",
        help="of MulCoT-RD's tasks: the prediction alone, or with reasons",
    )
    how.add_argument("--separator", help="between keyphrases in the answer (default: the task's, '; ' or ', ')")

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
        help="decode every post N times, with seeds --seed to --seed+N-1: N rows per post, told apart by a column decode",
    )

    where = parser.add_argument_group("where")
    where.add_argument("--batch-size", type=positive, metavar="N", help="posts at a time and process (default: 8; vllm: 256)")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    where.add_argument("--dtype", choices=dtypes, default="auto", help="of the weights (default: as saved)")
    where.add_argument(
        "--device", type=_device, default="auto", help="auto (the default: a GPU if there is one), cpu, cuda, cuda:1, mps, xpu"
    )
    where.add_argument(
        "--backend",
        choices=["transformers", "vllm"],
        default="transformers",
        help="vllm (an extra) is much faster on a GPU; start it as one process, without beams",
    )
    where.add_argument(
        "--vllm-options",
        type=json_object,
        default={},
        metavar="JSON",
        help="more arguments of vllm.LLM, such as '{\"tensor_parallel_size\": 4}'",
    )
    where.add_argument("--no-progress", action="store_true", help="no progress bar")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dynkp predict`.

    Args:
        argv: the arguments after `dynkp predict`; those of the process if None.

    Returns:
        0, 1 where files or settings do not allow the run, 130 where it was interrupted.
    """
    arguments = _parsed(parser(), argv)
    import torch

    state = _process_group(arguments.device)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("dynkp").setLevel(logging.INFO if state.is_main_process else logging.ERROR)
    who = "dynkp predict" if state.is_main_process else f"dynkp predict, process {state.process_index + 1}"
    try:
        _predict(arguments, state)
    except KeyboardInterrupt:
        print(f"\n{who}: interrupted; the same command goes on with {arguments.output}", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        print(f"{who}: error: {error}\nThe same command with a smaller --batch-size goes on.", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"{who}: error: {error}", file=sys.stderr)
        return 1
    finally:
        if state.num_processes > 1:
            state.destroy_process_group()
    return 0


def _predict(arguments: argparse.Namespace, state: Any) -> None:
    from dynkp.models.checkpoints import find_checkpoint
    from dynkp.prediction.run import PredictionRun

    if arguments.backend == "vllm" and state.num_processes > 1:
        raise ValueError(
            f"--backend vllm in {state.num_processes} processes: start it as one process; --vllm-options "
            f"'{{\"tensor_parallel_size\": {state.num_processes}}}' uses as many GPUs"
        )
    checkpoint = find_checkpoint(arguments.model, arguments.adapter)
    posts = _load_posts(arguments, state)
    run = PredictionRun(
        posts,
        arguments.output,
        _settings(arguments, checkpoint),
        batch_size=arguments.batch_size or (256 if arguments.backend == "vllm" else 8),
        modality=arguments.modality,
        decodes=arguments.decodes,
        seed=arguments.seed if arguments.do_sample else None,
    )
    with closing(run):
        state.wait_for_everyone()  # all have looked at the settings before they are written
        if state.is_main_process:
            run.start(_info(arguments, state))
        state.wait_for_everyone()
        batches = run.pending()
        state.wait_for_everyone()  # all have seen what is pending before a row is added
        if batches:
            generator = _generator(arguments, checkpoint, state.device, run.num_images)
            run.predict(
                generator,
                batches,
                rank=state.process_index,
                num_ranks=state.num_processes,
                progress=not arguments.no_progress,
            )
        state.wait_for_everyone()
        rows = run.finish() if state.is_main_process else []
    if state.is_main_process:
        count = max(1, len(rows))
        words = sum(row["output_words"] for row in rows) / count
        if _reasons(arguments):
            figures = f"{words:.1f} words each, {sum(row['prediction'] is None for row in rows) / count:.1%} unread"
        else:
            empty = sum(not row["keyphrases"] for row in rows) / count
            reasoned = sum(row["reasoned"] for row in rows) / count
            figures = f"{reasoned:.1%} reasoned, {words:.1f} words each, {empty:.1%} without keyphrase"
        print(f"{arguments.output}: {len(rows):,} predictions{'' if batches else ', all done before'}; {figures}")
        if cut_off := sum(row["output_tokens"] >= arguments.max_new_tokens for row in rows):
            logger.warning("%d outputs were cut off at --max-new-tokens %d", cut_off, arguments.max_new_tokens)


@dataclass(frozen=True)
class _Alone:
    """What `accelerate.PartialState` says of several processes, for one."""

    device: Any
    process_index = 0
    num_processes = 1
    is_main_process = True

    def wait_for_everyone(self) -> None:
        pass


def _process_group(device: str) -> Any:
    """This process among those that accelerate or torchrun started, if any."""
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        if device not in ("auto", "cpu") and found.type != device.partition(":")[0]:
            raise SystemExit(f"dynkp predict: error: --device {device}: torch finds none here; take auto or cpu")
        return _Alone(found if device == "auto" else torch.device(device))
    from datetime import timedelta

    from accelerate import PartialState

    # A process that is done waits for the others, for as long as it takes.
    return PartialState(cpu=device == "cpu", timeout=timedelta(days=7))


def _load_posts(arguments: argparse.Namespace, state: Any) -> Any:
    """The posts that can be predicted. The first process looks at them, and tells the others."""
    from dynkp.data.posts import validate_posts
    from dynkp.data.sentiment_posts import read_sentiment_posts
    from dynkp.data.sources import load_posts

    where = {"image_dir": arguments.image_dir, "split": arguments.split}
    if _reasons(arguments) and _task(arguments).labels:
        posts: Any = read_sentiment_posts(arguments.posts, task=arguments.task, need_labels=False, **where)
    else:
        posts = load_posts(arguments.posts, **where)
    if not len(posts):
        raise ValueError(f"{arguments.posts}: there are no posts to predict")
    # Whatever is wrong with the keyphrases, a prediction does not depend on them.
    posts = posts.remove_columns([name for name in ("keyphrases", "rationale", "label") if name in posts.column_names])
    answer: list[Any] = [None]
    if state.is_main_process:
        try:
            numbered = posts.add_column("_row", list(range(len(posts))))
            valid, _ = validate_posts(
                numbered,
                on_invalid=arguments.on_invalid,
                need_keyphrases=False,
                check_images=arguments.modality != "text",
                separator="; " if _reasons(arguments) else _task(arguments).separator,
                progress=not arguments.no_progress,
            )
            answer = [valid["_row"][:]]
        except ValueError as error:
            answer = [str(error)]
    if state.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(answer)
    if isinstance(answer[0], str):
        raise ValueError(answer[0])
    content = ("id", "text", "images", "aspect" if _reasons(arguments) else "prompt")
    needed = [name for name in content if name in posts.column_names]
    return posts.select(answer[0]).select_columns(needed)


def _task(arguments: argparse.Namespace) -> Any:
    import dataclasses

    from dynkp.data.reasoning_tasks import REASONING_TASKS
    from dynkp.data.tasks import resolve_task

    if arguments.task in REASONING_TASKS:
        return REASONING_TASKS[arguments.task]
    task = resolve_task(arguments.task)
    return task if arguments.separator is None else dataclasses.replace(task, separator=arguments.separator)


def _reasons(arguments: argparse.Namespace) -> bool:
    """Whether the task is one of MulCoT-RD's."""
    from dynkp.data.reasoning_tasks import REASONING_TASKS

    return arguments.task in REASONING_TASKS


def _asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the prompts say besides the post."""
    task = _task(arguments)
    if not _reasons(arguments):
        return {"name": task.name, "instruction": task.instruction, "separator": task.separator}
    wanted = {"fields": dict(task.analyses)} if arguments.prompt == "chain" else {}
    return {"name": task.name, "prompt": arguments.prompt, "question": task.question, **wanted}


def _settings(arguments: argparse.Namespace, checkpoint: Any) -> dict[str, Any]:
    """What a row depends on. Not the batch size: a run that ran out of memory may go on with a smaller one."""
    from dynkp.models.fingerprints import weights_fingerprint

    return {
        "model": weights_fingerprint(checkpoint.model),
        "adapter": checkpoint.adapter and weights_fingerprint(checkpoint.adapter),
        "merge_adapter": arguments.merge_adapter,
        "task": _asked(arguments),
        "mode": arguments.mode,
        "max_new_tokens": arguments.max_new_tokens,
        "num_beams": arguments.num_beams,
        "do_sample": arguments.do_sample,
        "temperature": (arguments.temperature or 1.0) if arguments.do_sample else None,
        "top_p": (arguments.top_p or 1.0) if arguments.do_sample else None,
        "dtype": arguments.dtype,
        "backend": arguments.backend,
        "vllm_options": arguments.vllm_options,
    }


def _info(arguments: argparse.Namespace, state: Any) -> dict[str, Any]:
    import torch
    import transformers

    import dynkp

    return {
        "model": arguments.model,
        "adapter": arguments.adapter,
        "posts": arguments.posts,
        "device": str(state.device),
        "processes": state.num_processes,
        "versions": {"dynkp": dynkp.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
    }


def _generator(arguments: argparse.Namespace, checkpoint: Any, device: Any, num_images: int) -> Any:
    from dynkp.models.checkpoints import load_model, load_processor
    from dynkp.prediction.generation_tasks import GenerationTask, KeyphraseGenerationTask, ReasoningGenerationTask
    from dynkp.prediction.transformers_engine import TransformersEngine

    processor = load_processor(checkpoint)
    task, modality = _task(arguments), arguments.modality
    if _reasons(arguments):
        generation_task: GenerationTask = ReasoningGenerationTask(processor, task, prompt=arguments.prompt, modality=modality)
    else:
        generation_task = KeyphraseGenerationTask(processor, task, mode=arguments.mode, modality=modality)
    sampling: dict[str, Any] = {}
    if arguments.do_sample:
        sampling = {"temperature": arguments.temperature or 1.0, "top_p": arguments.top_p or 1.0}
    if arguments.backend == "vllm":
        return _vllm_engine(arguments, checkpoint, generation_task, num_images, sampling)
    model = load_model(checkpoint, dtype=arguments.dtype, device=device, merge_adapter=arguments.merge_adapter)
    if sampling:
        sampling |= {"do_sample": True, "top_k": 0}
    return TransformersEngine(
        model,
        generation_task,
        max_new_tokens=arguments.max_new_tokens,
        num_beams=arguments.num_beams,
        **sampling,
    )


def _vllm_engine(
    arguments: argparse.Namespace, checkpoint: Any, generation_task: Any, num_images: int, sampling: Mapping[str, Any]
) -> Any:
    import tempfile

    from dynkp.models.checkpoints import Checkpoint, load_model
    from dynkp.prediction.vllm_engine import VllmEngine

    folder = None
    if arguments.merge_adapter:
        folder = tempfile.TemporaryDirectory(prefix="dynkp-merged-")
        load_model(checkpoint, dtype=arguments.dtype, merge_adapter=True).save_pretrained(folder.name)
        generation_task.renderer.processor.save_pretrained(folder.name)
        checkpoint = Checkpoint(folder.name)
    return VllmEngine(
        checkpoint,
        generation_task,
        max_new_tokens=arguments.max_new_tokens,
        num_images=num_images,
        dtype=arguments.dtype,
        temperature=sampling.get("temperature", 0.0),
        top_p=sampling.get("top_p", 1.0),
        llm_options=arguments.vllm_options,
        merged_model=folder,
    )


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    arguments = parser.parse_args(argv)
    for name in ("temperature", "top_p"):
        if getattr(arguments, name) is not None and not arguments.do_sample:
            parser.error(f"--{name.replace('_', '-')} is for sampling: add --do-sample")
    if arguments.decodes > 1 and not arguments.do_sample:
        parser.error(f"--decodes {arguments.decodes}: without --do-sample every decode is the same")
    if _reasons(arguments) and (arguments.mode != "auto" or arguments.separator is not None):
        parser.error(f"--mode and --separator are not for --task {arguments.task}; --prompt says whether to reason")
    if arguments.prompt != "label" and not _reasons(arguments):
        parser.error(f"--prompt is not for --task {arguments.task}; --mode says whether to reason")
    if arguments.backend == "vllm" and arguments.num_beams > 1:
        parser.error("--num-beams: vLLM does not sample with beams; take --backend transformers")
    if arguments.vllm_options and arguments.backend != "vllm":
        parser.error("--vllm-options needs --backend vllm")
    if Path(arguments.output).is_dir():
        parser.error(f"--output {arguments.output} is a folder; name a file")
    return arguments


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|(cuda|mps|xpu)(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text} is none of auto, cpu, cuda, cuda:1, mps, xpu")
    return text
