"""The command `dynkp judge`: systems' predictions ranked by a large model, or by people."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynkp.cli.arguments import CommandParser, add_image_dir, add_no_progress, add_posts, check_inputs, positive, share
from dynkp.cli.chat_options import (
    add_sampling_options,
    add_server_options,
    ask_and_write,
    check_needed,
    common_settings,
    refuse_key,
    result_line,
)
from dynkp.cli.errors import DONE, log_to_stderr, resumable

# Named here too, so that the help does not load what they need; the tests hold the lists together.
ANSWER_FORMATS = ("auto", "json_schema", "text")
TIES = ("dense", "min", "average")

DESCRIPTION = """\
Rank what several systems predicted for each post, 1 for the best, by correctness, relevance and usefulness (the Dynamic CoT
paper's Table 8): by a large vision-language model behind any server with OpenAI's chat interface, or by people.

The prompt shows the post, its author's keyphrases and the systems' predictions, named by letters, in an order drawn for each
post. Equal predictions share a letter, and no request is made for a post on which all systems agree.

It writes, for --output R.jsonl,

  R.jsonl          each post's ranks, and the order shown
  R.errors.jsonl   the posts without ranks, each with the reason
  R.report.json    mean ranks with intervals, the test of position bias, counts, settings, cost
  R.report.md      the same as tables, which are printed too
  R.journal/       every answer, as soon as it arrives

The same command continues an interrupted or killed run, and no request is sent twice. The API key is read from the
environment (OPENAI_API_KEY).

--human writes a form for annotators, and its key, instead; --read-human reads the annotators' answers."""

EPILOG = """\
examples:
  dynkp judge --posts test.jsonl --image-dir images --predictions direct.jsonl cot.jsonl dynamic.jsonl \\
      --base-url http://127.0.0.1:8000/v1 --model Qwen/Qwen2.5-VL-72B-Instruct --temperature 0 --output ranks.jsonl
      three systems, ranked by a model; again with --ties average: the same answers, other ranks
  dynkp judge --posts test.jsonl --image-dir images --predictions direct.jsonl dynamic.jsonl --human form.html --sample 20
      a form of 20 posts to send to annotators; keep form.key.json
  dynkp judge --read-human answers-ann.json answers-ben.json --key form.key.json --output human.jsonl
      mean ranks, and the annotators' agreement

exit status: 0 every post is ranked, 1 the server failed, 2 the command line or a file is wrong, 3 some posts failed,
4 --max-cost was reached, 130 interrupted
"""


def parser() -> CommandParser:
    """Build the parser; docs/cli.md is made of its help."""
    parser = CommandParser("judge", DESCRIPTION, EPILOG)
    what = parser.add_argument_group("posts, predictions and output")
    add_posts(what, "JSON Lines file of posts (dynkp convert makes one)", required=False)
    add_image_dir(what)
    what.add_argument("--predictions", nargs="+", default=[], metavar="FILE", help="one JSONL file per system")
    what.add_argument("--names", nargs="+", metavar="NAME", help="of the systems (default: the files' names)")
    what.add_argument("--output", metavar="FILE", help="JSON Lines file of ranks")
    what.add_argument("--limit", type=positive, metavar="N", help="only the first N posts of the file")
    what.add_argument("--top", type=positive, metavar="K", help="only each system's first K keyphrases (default: all)")
    what.add_argument("--allow-missing", action="store_true", help="a post without prediction counts as predicted empty")
    what.add_argument("--allow-image-urls", action="store_true", help="allow images that are URLs, which the server fetches")
    add_server_options(parser)

    asking = parser.add_argument_group("requests")
    asking.add_argument(
        "--answer-format",
        choices=ANSWER_FORMATS,
        default="auto",
        help="json_schema holds the server to valid ranks (response_format), text does not; auto (the default) asks a small "
        "question first, to see what the server takes",
    )
    asking.add_argument(
        "--max-replies", type=positive, default=3, metavar="N", help="answers to ask for until one is a ranking (default: 3)"
    )
    add_sampling_options(asking)

    people = parser.add_argument_group("human annotators")
    people.add_argument("--human", metavar="FILE", help="write a form for annotators, FILE.html, and FILE.key.json beside it")
    people.add_argument("--sample", type=positive, metavar="N", help="of --human: draw N posts (default: all)")
    people.add_argument("--read-human", nargs="+", metavar="FILE", help="read what annotators exported, one file each")
    people.add_argument("--key", nargs="+", metavar="FILE", help="of --read-human: the keys of their forms")

    results = parser.add_argument_group("results")
    results.add_argument(
        "--shuffle-seed", type=int, default=0, metavar="N", help="of the orders shown, --sample and resampling (default: 0)"
    )
    results.add_argument(
        "--ties",
        choices=TIES,
        default="dense",
        help="ranks after a tie: dense 1, 1, 2 (the default), min 1, 1, 3, average 1.5, 1.5, 3",
    )
    results.add_argument("--confidence", type=share, default=0.95, metavar="C", help="of the intervals (default: 0.95)")
    results.add_argument("--resamples", type=positive, default=10_000, metavar="N", help="of the intervals (default: 10000)")
    add_no_progress(results)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dynkp judge`.

    Args:
        argv: the arguments after `dynkp judge`; those of the process if None.

    Returns:
        0 if every post is ranked, 3 if posts failed, 4 if the cost was reached.

    Raises:
        ValueError, OSError, ImportError: if the command line or a file is wrong.
        RunFailedError: if the server failed.
        Interrupted: after Ctrl-C.
    """
    arguments = _parsed(parser(), argv)
    log_to_stderr()
    check_inputs(arguments, "posts", "image_dir", "predictions", "read_human", "key", kind="file")
    action = _read_human if arguments.read_human else _human if arguments.human else _ask
    with resumable(f"the same command continues with {arguments.output or arguments.human}"):
        return action(arguments)


def _parsed(parser: CommandParser, argv: Sequence[str] | None) -> argparse.Namespace:
    arguments = parser.parse_args(argv)
    refuse_key(parser, arguments)
    if arguments.human and arguments.read_human:
        parser.error("--human writes a form and --read-human reads answers: give one of them")
    if arguments.read_human:
        what, needed = "--read-human", ["key"]
    elif arguments.human:
        what, needed = "--human", ["posts", "predictions"]
    else:
        what, needed = "a model's judgement", ["posts", "predictions", "base_url", "model", "output"]
    check_needed(parser, arguments, what, needed)
    given = [arguments.posts, *arguments.predictions, *(arguments.read_human or []), *(arguments.key or [])]
    for option in ("output", "human"):
        path = getattr(arguments, option)
        if path and Path(path).resolve() in {Path(file).resolve() for file in given if file}:
            parser.error(f"--{option} {path} is one of the files to read; name another")
    return arguments


def _ask(arguments: argparse.Namespace) -> int:
    from dynkp.judging.candidates import name_systems
    from dynkp.judging.run import JudgeRun, JudgeSettings

    own = ("allow_missing", "top", "shuffle_seed", "answer_format", "max_replies", "ties", "confidence", "resamples")
    settings = JudgeSettings(
        **common_settings(arguments),
        **{name: getattr(arguments, name) for name in own},
        predictions=name_systems(arguments.predictions, arguments.names),
    )
    with JudgeRun(settings) as run:
        return ask_and_write("judge", run, _write)


def _write(run: Any) -> str:
    """Write and print the results; returns a message about posts that failed."""
    from dynkp.judging.ranks import rank_tables
    from dynkp.judging.run import FAILED, INVALID, UNREADABLE, judging_summary

    report = run.write()
    if report["ranked"]:
        print(rank_tables(report) + "\n")
    print(result_line(run, judging_summary(report)))
    failed = report[FAILED] + report[INVALID] + report[UNREADABLE]
    return f"{failed:,} posts have no ranks, see {run.paths.errors}" if failed else ""


def _human(arguments: argparse.Namespace) -> int:
    from dynkp.chat.post_stream import PostStream
    from dynkp.judging.candidates import load_candidates, name_systems
    from dynkp.judging.human_form import key_path, write_form

    posts = PostStream(arguments.posts, arguments.image_dir, limit=arguments.limit)
    systems = name_systems(arguments.predictions, arguments.names)
    candidates, _ = load_candidates(
        posts, systems, seed=arguments.shuffle_seed, top=arguments.top, allow_missing=arguments.allow_missing
    )
    counts = write_form(arguments.human, posts, candidates, sample=arguments.sample, seed=arguments.shuffle_seed)
    alike = counts["drawn"] - counts["shown"]
    print(
        f"{arguments.human}: {counts['shown']:,} posts to rank; on {alike:,} more all systems agree; "
        f"{counts['unjudgeable']:,} posts cannot be judged\n"
        f"{key_path(arguments.human)}: which system is which, not for annotators"
    )
    return DONE


def _read_human(arguments: argparse.Namespace) -> int:
    from dynkp.judging.human_form import read_answers, write_judgements
    from dynkp.judging.ranks import agreement, rank_report, rank_tables

    answers = read_answers(arguments.read_human, arguments.key)
    report = rank_report(
        answers.judgements,
        answers.systems,
        ties=arguments.ties,
        confidence=arguments.confidence,
        resamples=arguments.resamples,
        seed=arguments.shuffle_seed,
    )
    report |= {"alpha": agreement(answers.judgements, ties=arguments.ties)}
    report |= {"annotators": answers.annotators, "unfinished": answers.unfinished}
    print(rank_tables(report) + "\n")
    print(f"{len(answers.annotators)} annotators, {answers.unfinished:,} posts that one of them did not finish are not counted")
    if arguments.output:
        write_judgements(arguments.output, answers.judgements, report, ties=arguments.ties)
    return DONE
