"""The command `dynkp rationales`: posts in, posts with a teacher's rationales out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from dynkp.cli.arguments import CommandParser, add_image_dir, add_no_progress, add_posts, check_inputs, positive, share
from dynkp.cli.chat_options import (
    SOME_FAILED,
    add_sampling_options,
    add_server_options,
    ask_and_write,
    check_needed,
    common_settings,
    refuse_key,
    result_line,
)
from dynkp.cli.errors import DONE, log_to_stderr, resumable

ACTIONS = ("ask", "export", "import", "write", "merge")
# Tasks and filters are named here too, so that the help does not load what they need; the tests hold the lists together.
TASKS = ("dynamic_cot", "msc", "masc", "keyphrases")
FILTERS = (
    "empty",
    "refusal",
    "cut_off",
    "too_short",
    "too_long",
    "field_names",
    "wrong_prediction",
    "no_gold_phrase",
    "near_copy",
)
DEFAULT_FILTERS = tuple(name for name in FILTERS if name != "no_gold_phrase")

DESCRIPTION = """\
Ask a large vision-language model why people would tag posts as they did, through any server with OpenAI's chat interface
(vLLM, SGLang, transformers serve, hosted ones).

It writes, for --output R.jsonl,

  R.jsonl          the posts with their rationales, in the posts' order
  R.errors.jsonl   the posts without one, each with the reason
  R.report.json    counts, settings, cost
  R.journal/       every answer, as soon as it arrives

The same command continues an interrupted or killed run, and no request is sent twice. The API key is read from the
environment (OPENAI_API_KEY); a server without authentication needs none.

actions:
  ask      (the default) ask about all posts that are not answered yet, then write the files
  export   write the requests that come next as files of OpenAI's batch interface
  import   take the results of such files
  write    write the files from the answers so far, for example with other filters
  merge    join the outputs of all shards (--shard)"""

EPILOG = """\
examples:
  dynkp rationales --posts train.jsonl --image-dir images --output r.jsonl --base-url http://127.0.0.1:8000/v1 \\
      --model Qwen/Qwen2.5-VL-72B-Instruct --limit 20 --preview 20
      the first 20 posts, and a page to look at them: r.preview.html
  dynkp rationales --posts train.jsonl --image-dir images --output r.jsonl --base-url https://api.openai.com/v1 \\
      --model gpt-4o --prices prices.json --max-cost 50
      a hosted model, at most 50 dollars; prices.json is {"gpt-4o": {"input": ..., "output": ...}} per million tokens
  dynkp rationales --posts masc.jsonl --image-dir images --output r.jsonl --base-url http://127.0.0.1:8000/v1 \\
      --model teacher --task masc
      MulCoT-RD's response chains; where the prediction is wrong, a second request gives the label and asks to explain it
  dynkp rationales --posts train.jsonl --image-dir images --output r.jsonl --base-url http://127.0.0.1:8000/v1 \\
      --model teacher --shard 2/4
      the second of four machines; when all are done: dynkp rationales merge --output r.jsonl
  dynkp rationales export --posts train.jsonl --image-dir images --output r.jsonl --model teacher --batch-dir batch
      for vllm run-batch or a hosted batch service; then dynkp rationales import with --results and the same options

exit status: 0 every post has an answer, 1 the server failed, 2 the command line or a file is wrong, 3 some posts failed,
4 --max-cost was reached, 130 interrupted
"""


def parser() -> CommandParser:
    """Build the parser; docs/cli.md is made of its help."""
    parser = CommandParser("rationales", DESCRIPTION, EPILOG)
    parser.add_argument("action", nargs="?", choices=ACTIONS, default="ask", help="see above (default: ask)")
    what = parser.add_argument_group("posts and output")
    add_posts(what, "JSON Lines file of posts (dynkp convert makes one)", required=False)
    add_image_dir(what)
    what.add_argument("--output", required=True, metavar="FILE", help="JSON Lines file of posts with rationales")
    what.add_argument("--limit", type=positive, metavar="N", help="only the first N posts of the file")
    what.add_argument("--shard", type=_shard, default=(1, 1), metavar="I/N", help="every N-th post from the I-th on")
    what.add_argument("--allow-image-urls", action="store_true", help="allow images that are URLs, which the server fetches")

    add_server_options(parser)

    prompt = parser.add_argument_group("prompt")
    prompt.add_argument(
        "--task",
        choices=TASKS,
        default="dynamic_cot",
        help="dynamic_cot: why these keyphrases (the default). msc, masc, keyphrases: MulCoT-RD's response chains",
    )
    prompt.add_argument("--template", metavar="FILE", help="YAML with prompts of your own (docs/teacher.md)")
    add_sampling_options(prompt)

    after = parser.add_argument_group("filters and output")
    after.add_argument(
        "--filters",
        nargs="*",
        choices=FILTERS,
        default=list(DEFAULT_FILTERS),
        metavar="NAME",
        help=f"what rationales are rejected for, of: {', '.join(FILTERS)} (default: all but no_gold_phrase); none for none",
    )
    after.add_argument("--min-words", type=int, default=10, metavar="N", help="fewer are too_short (default: 10)")
    after.add_argument("--max-words", type=int, default=600, metavar="N", help="more are too_long (default: 600)")
    after.add_argument(
        "--max-similarity",
        type=share,
        default=0.8,
        metavar="S",
        help="two rationales that share this much of their runs of three words are near_copy (default: 0.8)",
    )
    after.add_argument("--keep-all", action="store_true", help="write posts without rationale to the output too, with null")
    after.add_argument("--preview", type=positive, default=0, metavar="N", help="an HTML page of N posts: R.preview.html")
    after.add_argument("--batch-dir", metavar="DIR", help="export: the folder for the files")
    after.add_argument("--results", nargs="+", default=[], metavar="FILE", help="import: files of results")
    add_no_progress(after)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dynkp rationales`.

    Args:
        argv: the arguments after `dynkp rationales`; those of the process if None.

    Returns:
        0 if every post has an answer, 3 if posts failed, 4 if the cost was reached.

    Raises:
        ValueError, OSError, ImportError: if the command line or a file is wrong.
        RunFailedError: if the server failed.
        Interrupted: after Ctrl-C.
    """
    arguments = _parsed(parser(), argv)
    log_to_stderr()
    check_inputs(arguments, "posts", "image_dir", kind="file")
    with resumable(f"the same command continues with {arguments.output}"):
        return _ACTIONS[arguments.action](arguments)


def _run(arguments: argparse.Namespace) -> Any:
    from dynkp.rationales.run import RationaleRun, RationaleSettings

    own = ("task", "template", "shard", "min_words", "max_words", "max_similarity", "keep_all", "preview")
    return RationaleRun(
        RationaleSettings(
            **common_settings(arguments),
            **{name: getattr(arguments, name) for name in own},
            filters=tuple(arguments.filters),
        )
    )


def _ask(arguments: argparse.Namespace) -> int:
    with _run(arguments) as run:
        return ask_and_write("rationales", run, _write)


def _write(run: Any) -> str:
    """Write and print the results; returns a message about posts that failed."""
    from dynkp.rationales.files import rationale_summary

    report = run.write()
    print(result_line(run, rationale_summary(report)))
    if run.settings.preview:
        print(f"{run.paths.preview}: {run.settings.preview} posts to look at")
    parts = []
    if failed := report["request_failed"]:
        parts.append(f"{failed:,} posts failed (--retry-failed asks them again)")
    if invalid := report["invalid_post"]:
        parts.append(f"{invalid:,} posts are invalid (correct them, and the same command asks about them)")
    return f"{', '.join(parts)}, see {run.paths.errors}" if parts else ""


def _write_only(arguments: argparse.Namespace) -> int:
    with _run(arguments) as run:
        outcome = run.replay()
        _write(run)
    return SOME_FAILED if outcome.failed or outcome.open else DONE


def _export(arguments: argparse.Namespace) -> int:
    with _run(arguments) as run:
        count, files = run.export(arguments.batch_dir)
    print(f"{count:,} requests in {len(files)} files in {arguments.batch_dir}")
    return DONE


def _import(arguments: argparse.Namespace) -> int:
    with _run(arguments) as run:
        found = run.import_results(arguments.results)
        print(f"{found.answers:,} answers, {found.failures:,} failures, {found.known:,} known before")
        outcome = run.replay()
        _write(run)
    if outcome.open:
        print(f"dynkp rationales: {outcome.open:,} posts need more requests: export again, or ask", file=sys.stderr)
    return SOME_FAILED if outcome.failed or outcome.open else DONE


def _merge(arguments: argparse.Namespace) -> int:
    from dynkp.rationales.files import merge_shards, rationale_summary

    report = merge_shards(
        arguments.output,
        max_similarity=arguments.max_similarity,
        near_copies="near_copy" in arguments.filters,
        progress=not arguments.no_progress,
    )
    print(f"{arguments.output}: {rationale_summary(report)}")
    return SOME_FAILED if report["request_failed"] or report["invalid_post"] else DONE


_ACTIONS = {"ask": _ask, "export": _export, "import": _import, "write": _write_only, "merge": _merge}


def _parsed(parser: CommandParser, argv: Sequence[str] | None) -> argparse.Namespace:
    arguments = parser.parse_args(argv)
    refuse_key(parser, arguments)
    needed = {
        "ask": ("posts", "model", "base_url"),
        "export": ("posts", "model", "batch_dir"),
        "import": ("posts", "model", "results"),
        "write": ("posts", "model"),
        "merge": (),
    }[arguments.action]
    check_needed(parser, arguments, arguments.action, needed)
    if arguments.posts and os.path.abspath(arguments.posts) == os.path.abspath(arguments.output):
        parser.error("--output is the posts file itself; name another")
    return arguments


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text} is not of the form I/N, with I from 1 to N")
    return int(number), int(count)
