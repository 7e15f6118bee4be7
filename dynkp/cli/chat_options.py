"""Options of the commands that ask a chat server (`dynkp rationales`, `dynkp judge`)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dynkp.cli.arguments import OneLineErrors, above_zero, from_zero, json_object, positive, share
from dynkp.cli.errors import DONE, Interrupted, RunFailedError

# Exit statuses besides those of dynkp.cli.errors.
SOME_FAILED, COST_REACHED = 3, 4
# Options that go into `dynkp.chat.settings.RunSettings` under their own names.
COMMON = (
    *("posts", "output", "model", "base_url", "image_dir", "max_side", "allow_image_urls", "max_tokens", "temperature"),
    *("top_p", "seed", "extra_body", "limit", "concurrency", "timeout", "max_attempts", "retry_pause", "retry_failed"),
    *("prices", "max_cost"),
)


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add the group `server`: address, model, pace, retries and cost."""
    server = parser.add_argument_group("server")
    server.add_argument("--base-url", default="", metavar="URL", help="the server's address up to /v1")
    server.add_argument("--model", metavar="NAME", help="the model's name at the server")
    server.add_argument(
        "--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="environment variable with the key (OPENAI_API_KEY)"
    )
    server.add_argument("--concurrency", type=positive, default=32, metavar="N", help="most requests at once (default: 32)")
    server.add_argument(
        "--timeout", type=above_zero, default=120.0, metavar="SECONDS", help="longest wait for an answer (default: 120)"
    )
    server.add_argument(
        "--max-attempts",
        type=positive,
        default=12,
        metavar="N",
        help="attempts per request before its post fails (12, which take 150 s: longer than a server's restart)",
    )
    server.add_argument(
        "--retry-pause", type=above_zero, default=0.5, metavar="SECONDS", help="before the second attempt, then doubled (0.5)"
    )
    server.add_argument("--retry-failed", action="store_true", help="ask again about posts that failed in an earlier run")
    server.add_argument("--prices", metavar="FILE", help="JSON or YAML: model -> input and output, per million tokens")
    server.add_argument("--max-cost", type=above_zero, metavar="COST", help="stop before all answers cost more than this")


def add_sampling_options(group: Any) -> None:
    """Add to a group the options that shape a request besides the prompt."""
    group.add_argument(
        "--max-side", type=positive, default=1024, metavar="PIXELS", help="larger images are shrunk to this (default: 1024)"
    )
    group.add_argument("--max-tokens", type=positive, default=1024, metavar="N", help="longest answer (default: 1024)")
    group.add_argument("--temperature", type=from_zero, metavar="T", help="of sampling (default: the server's)")
    group.add_argument("--top-p", type=share, metavar="P", help="of sampling (default: the server's)")
    group.add_argument("--seed", type=int, help="of sampling, for servers that take one")
    group.add_argument(
        "--extra-body", type=json_object, default={}, metavar="JSON", help="more fields of requests, such as '{\"top_k\": 20}'"
    )


def common_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Collect the arguments of `RunSettings` that the options give."""
    return {
        **{name: getattr(arguments, name) for name in COMMON},
        "key_variable": arguments.api_key_env,
        "progress": not arguments.no_progress,
    }


def check_needed(parser: OneLineErrors, arguments: argparse.Namespace, what: str, names: Sequence[str]) -> None:
    """Refuse a command line that lacks options, or whose output is a folder.

    Args:
        parser: of the command.
        arguments: the parsed command line.
        what: what needs the options, as the beginning of the error.
        names: the options' names in `arguments`.

    Raises:
        SystemExit: if one is missing, or the output is a folder.
    """
    if missing := [f"--{name.replace('_', '-')}" for name in names if not getattr(arguments, name)]:
        parser.error(f"{what} needs {', '.join(missing)}")
    if arguments.output and Path(arguments.output).is_dir():
        parser.error(f"--output {arguments.output} is a folder; name a file")


def ask_and_write(command: str, run: Any, write: Callable[[Any], str]) -> int:
    """Ask the server about all posts, write the files, and print how the run ended.

    Args:
        command: the command's name, such as `"judge"`.
        run: a run of `dynkp.chat.post_run` that can `ask`.
        write: writes the run's files and prints its results; returns a message about posts that failed, empty if none did.

    Returns:
        0 if no post failed, 3 if posts failed, 4 if the cost was reached.

    Raises:
        RunFailedError: if the server failed.
        Interrupted: after Ctrl-C.
    """
    outcome = run.ask()
    if outcome.stopped == "interrupted":
        raise Interrupted(f"{outcome.open:,} posts are open; the same command continues")
    failed = write(run)
    if outcome.stopped == "server":
        raise RunFailedError(f"{outcome.reason}. The same command continues.")
    if outcome.stopped == "max_cost":
        print(f"dynkp {command}: --max-cost reached, {outcome.reason}; {outcome.open:,} posts are open", file=sys.stderr)
        return COST_REACHED
    if failed:
        print(f"dynkp {command}: {failed}", file=sys.stderr)
        return SOME_FAILED
    return DONE


def result_line(run: Any, summary: str) -> str:
    """Build the line that a run ends with.

    Args:
        run: a run of `dynkp.chat.post_run`.
        summary: what it found.

    Returns:
        The output, the summary, the number of requests and the cost.
    """
    cost = "" if run.outcome.cost is None else f"; cost {run.outcome.cost:.2f}"
    return f"{run.paths.output}: {summary}; {run.outcome.requests:,} requests{cost}"


def refuse_key(parser: OneLineErrors, arguments: argparse.Namespace) -> None:
    """Refuse an argument that holds the API key: every user of the machine could see it, and the report would contain it.

    Raises:
        SystemExit: if one does.
    """
    key = os.environ.get(arguments.api_key_env, "").strip()
    if len(key) >= 8 and any(key in str(value) for value in vars(arguments).values()):
        parser.error(f"an argument holds the API key; put it into the environment alone ({arguments.api_key_env})")
