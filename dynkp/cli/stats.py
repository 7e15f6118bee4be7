"""The command `dynkp stats`: the papers' dataset table."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynkp.cli.arguments import CommandParser, add_image_dir, check_inputs

logger = logging.getLogger(__name__)

DESCRIPTION = """\
Describe posts, as the papers' dataset tables do: how many, with how many keyphrases, how many of these are different, how
many of those the training posts have too, how long the texts are, how many posts have an image or a rationale.

Two keyphrases are the same if they differ in case and whitespace only."""

EPILOG = """\
examples:
  dynkp stats --train train.jsonl --test test.jsonl
      a column for each, and how much of the test set's keyphrases training knows
  dynkp stats --test test.jsonl --train train_keyphrases.txt --json stats.json
      training known by its keyphrases alone, one a line
  dynkp stats --test valid.jsonl test.jsonl --markdown table.md
      several sets

The content of the posts is checked as before training. Images are counted by their names; with --image-dir they are opened.
"""


def parser() -> argparse.ArgumentParser:
    """Build the parser; docs/cli.md is made of its help."""
    parser = CommandParser("stats", DESCRIPTION, EPILOG)
    parser.add_argument(
        "--train",
        "--train-keyphrases",
        metavar="FILE",
        help="training posts, in any format that docs/data.md names, or a text file with a keyphrase per line (.txt)",
    )
    parser.add_argument("--test", nargs="+", default=[], metavar="FILE", help="posts to describe")
    add_image_dir(parser)
    parser.add_argument("--json", metavar="FILE", help="all figures: split -> figure, unrounded, shares as fractions")
    parser.add_argument("--markdown", metavar="FILE", help="the table that is printed")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `dynkp stats`.

    Args:
        argv: the arguments after `dynkp stats`; those of the process if None.

    Raises:
        ValueError, OSError: if a file cannot be read.
    """
    command = parser()
    arguments = command.parse_args(argv)
    if not arguments.train and not arguments.test:
        command.error("name posts: --train, --test or both")
    check_inputs(arguments, "train", "test", "image_dir")
    _describe(arguments)


def _describe(arguments: argparse.Namespace) -> None:
    from dynkp.data.posts import load_valid_posts
    from dynkp.data.statistics import (
        lists_keyphrases,
        load_keyphrases,
        repeated_posts,
        split_statistics,
        statistics_table,
    )
    from dynkp.files.atomic import write_text
    from dynkp.files.json_files import write_json
    from dynkp.report.tables import markdown_table

    splits: dict[str, dict[str, Any]] = {}
    train_keyphrases = train_posts = None
    if arguments.train and lists_keyphrases(arguments.train):
        train_keyphrases = load_keyphrases(arguments.train)
        splits["train"] = {"unique_keyphrases": len(train_keyphrases)}
    elif arguments.train:
        train_posts = load_valid_posts(arguments.train, split="train", image_dir=arguments.image_dir)
        train_keyphrases = [phrase for row in train_posts.select_columns(["keyphrases"]) for phrase in row["keyphrases"] or []]
        splits["train"] = split_statistics(train_posts)
    stems = [Path(source).stem for source in arguments.test]
    names = ["test"] if len(stems) == 1 else stems if len({*stems, "train"}) > len(stems) else arguments.test
    for name, source in zip(names, arguments.test, strict=True):
        posts = load_valid_posts(source, split="test", image_dir=arguments.image_dir)
        splits[name] = split_statistics(posts, train_keyphrases)
        if train_posts is not None and (repeated := repeated_posts(posts, train_posts)):
            logger.warning(
                "%s: %d of %d posts have the text and the images of a post of %s, first %r",
                source,
                len(repeated),
                len(posts),
                arguments.train,
                repeated[0],
            )
    table = markdown_table(statistics_table(splits))
    print(table)
    if arguments.json:
        write_json(arguments.json, splits)
    if arguments.markdown:
        write_text(arguments.markdown, table + "\n")
