"""The command `dynkp convert`: posts from one file format to another."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from typing import Any

from dynkp.cli.arguments import (
    CommandParser,
    add_image_dir,
    add_no_progress,
    add_on_invalid,
    add_posts,
    add_split,
    check_inputs,
)

DESCRIPTION = """\
Write posts in another format, which the output's name tells unless --to does:

  X.jsonl      one JSON row per post; images by name
  X.parquet    with the images inside, as the Hub's viewer shows them; --to parquet with another name: a folder of shards
  X.json       AimKP's and LLaVA's rows: conversations of one question and its answer (--to llava X.jsonl: one row per line)
  X_src.txt    CMKP's raw files, with X_ocr_final.txt and X_attribute_cleaned.txt

The output is written atomically. Columns that the format cannot hold are counted and printed; a post that it cannot hold at all
is an error that names the post."""

EPILOG = """\
examples:
  dynkp convert --posts test_src.txt --output test.jsonl
      CMKP's files as JSON Lines
  dynkp convert --posts train.jsonl --image-dir images --to parquet --output posts/data/train
      shards with images; upload the folder posts, and the Hub shows its split train
  dynkp convert --posts test.parquet --output test.jsonl --output-image-dir images
      and back
  dynkp convert --posts train.jsonl --output train.json --join ocr attributes
      for LLaVA's trainer, with the words in the image and its attributes behind the text
  dynkp convert --task masc --posts twitter2015/train.tsv --output train.jsonl
      TomBERT's file as rows of text, aspect and label
  dynkp convert --task msc --posts MVSA_Single --output mvsa.jsonl --on-invalid skip --report-file left_out.jsonl
      MVSA, without the posts whose text and image have opposite labels
"""


def parser() -> argparse.ArgumentParser:
    """Build the parser; docs/cli.md is made of its help."""
    parser = CommandParser("convert", DESCRIPTION, EPILOG)
    what = parser.add_argument_group("posts and output")
    add_posts(what)
    what.add_argument(
        "--task",
        choices=["keyphrases", "msc", "masc"],
        default="keyphrases",
        help="what the posts are for: with msc and masc, posts with a sentiment (default: keyphrases)",
    )
    add_split(what, "train")
    what.add_argument("--output", required=True, metavar="FILE", help="replaced if it exists; a folder must not exist")
    what.add_argument("--to", choices=["auto", "jsonl", "parquet", "llava", "cmkp"], default="auto", help="the output's format")
    add_on_invalid(what, "posts that cannot be written or have a broken image")
    what.add_argument("--report-file", metavar="FILE", help="lists the posts that --on-invalid skip left out, as JSON lines")
    images = parser.add_argument_group("images")
    add_image_dir(images)
    images.add_argument(
        "--images",
        choices=["auto", "embed", "names", "drop"],
        default="auto",
        help="embed: into the Parquet file, with their names (the default there). names: what is a file is only named (the "
        "default elsewhere). drop: none",
    )
    images.add_argument(
        "--output-image-dir", metavar="DIR", help="write embedded images here, and copy files here; not for Parquet"
    )
    images.add_argument("--shard-size", type=_megabytes, default=500, metavar="MB", help="of a folder's shards (default: 500)")
    columns = parser.add_argument_group("columns")
    columns.add_argument(
        "--join", nargs="+", default=[], metavar="COLUMN", help="add these to the text, say ocr attributes; they stay columns"
    )
    columns.add_argument(
        "--join-format",
        metavar="TEXT",
        help="how, with {text}, {column} and {value} (default: the text, a line break, the column's name, a colon, its value)",
    )
    columns.add_argument("--drop", nargs="+", default=[], metavar="COLUMN", help="do not write these")
    add_no_progress(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `dynkp convert`.

    Args:
        argv: the arguments after `dynkp convert`; those of the process if None.

    Raises:
        ValueError, OSError: if the posts cannot be read or written.
    """
    arguments = parser().parse_args(argv)
    check_inputs(arguments, "posts", "image_dir")
    from dynkp.data.conversion import JOIN_FORMAT, convert_posts
    from dynkp.data.posts import PostReport

    logging.basicConfig(format="%(message)s")
    options: dict[str, Any] = {name: getattr(arguments, name) for name in ("split", "image_dir", "images", "join", "drop")}
    report = convert_posts(
        arguments.posts if arguments.task == "keyphrases" else _sentiment_rows(arguments, options),
        arguments.output,
        output_format=arguments.to,
        output_image_dir=arguments.output_image_dir,
        join_format=JOIN_FORMAT if arguments.join_format is None else arguments.join_format,
        on_invalid=arguments.on_invalid,
        shard_bytes=arguments.shard_size * 1_000_000,
        progress=not arguments.no_progress,
        **options,
    )
    if arguments.report_file:
        PostReport(findings=report.skipped).write_jsonl(arguments.report_file)
    print(f"{arguments.output}: {report.summary()}")


def _sentiment_rows(arguments: argparse.Namespace, options: dict[str, Any]) -> list[Any]:
    """The posts' rows; `options` get the source's own folder of images if none is named."""
    from dynkp.data.sentiment_posts import image_folder, read_sentiment_rows

    if os.path.realpath(arguments.posts) == os.path.realpath(arguments.output):
        raise ValueError(f"{arguments.output} would replace the posts that are read: name another output")
    options["image_dir"] = options["image_dir"] or image_folder(arguments.posts)
    rows = read_sentiment_rows(arguments.posts, task=arguments.task, split=arguments.split)
    return [row if row.get("id") is not None else {**row, "id": fallback_id} for fallback_id, row in rows]


def _megabytes(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small: give megabytes, at least 1")
    return value
