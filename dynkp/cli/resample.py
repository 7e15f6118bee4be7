"""The command `dynkp resample`: training and test posts in, a split with fewer known keyphrases out."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynkp.cli.arguments import CommandParser, add_old_spelling, check_inputs

DESCRIPTION = """\
Make the test set harder: fewer of its keyphrases are known from training, as in the Dynamic CoT paper's MMKP-V2 (section 4.1).

1. Training posts with a keyphrase that the test set does not have move to the test set.
2. Test posts are dropped, keyphrase by keyphrase in an order that --seed settles, until training knows no more than the
   share --target-overlap of the test set's different keyphrases.

Writes train.jsonl, test.jsonl, report.json and report.md into --output-dir; the reports have the columns of the paper's Table 2
and of `dynkp stats`. Rows keep all their columns and image names; rows without id get one."""

EPILOG = """\
examples:
  dynkp resample --train train.jsonl --test test.jsonl --target-overlap 0.4492 --output-dir mmkp_v2
      the overlap of the paper's MMKP-V2; not its posts, as the paper does not say which were dropped
  dynkp resample --train train_src.txt --test test_src.txt --target-overlap 0 --output-dir unseen
      from CMKP's files; every post left in the test set has new keyphrases only
  dynkp resample --train train.parquet --test test.parquet --target-overlap 0.5 --output-dir half --output-image-dir half/images
      images inside the source become files
"""


def parser() -> argparse.ArgumentParser:
    """Build the parser; docs/cli.md is made of its help."""
    parser = CommandParser("resample", DESCRIPTION, EPILOG)
    parser.add_argument("--train", required=True, metavar="FILE", help="training posts, in any format that docs/data.md names")
    parser.add_argument("--test", required=True, metavar="FILE", help="test posts; no id may be in both")
    parser.add_argument(
        "--target-overlap", required=True, type=_share, metavar="SHARE", help="largest share of known keyphrases, from 0 to 1"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order in which posts are dropped (default: 0)")
    parser.add_argument("--output-dir", metavar="DIR", help="the folder, made if need be; files of these names are replaced")
    add_old_spelling(parser, "--out-dir", "--output-dir", metavar="DIR")
    parser.add_argument("--output-image-dir", metavar="DIR", help="a folder for images that are inside the source (Parquet)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `dynkp resample`.

    Args:
        argv: the arguments after `dynkp resample`; those of the process if None.

    Raises:
        ValueError, OSError: if the posts cannot be read, or none would be left.
    """
    command = parser()
    arguments = command.parse_args(argv)
    if arguments.output_dir is None:  # argparse's own check would not know the old spelling
        command.error("the following arguments are required: --output-dir")
    check_inputs(arguments, "train", "test")
    _resample(arguments)


def _resample(arguments: argparse.Namespace) -> None:
    from dynkp.data.conversion import convert_posts
    from dynkp.data.resampling import overlap_table, resample
    from dynkp.data.statistics import split_statistics, statistics_table
    from dynkp.files.atomic import atomic_files
    from dynkp.files.json_files import write_json
    from dynkp.report.tables import markdown_table

    sources = {"train": arguments.train, "test": arguments.test}
    out = Path(arguments.output_dir)
    names = [out / name for name in ("train.jsonl", "test.jsonl", "report.md", "report.json")]
    if taken := {name.resolve() for name in names} & {Path(source).resolve() for source in sources.values()}:
        raise ValueError(f"--output-dir {out}: {min(taken)} would be replaced, and its posts are read: name another folder")
    new = resample(_posts(arguments.train, "train"), _posts(arguments.test, "test"), arguments.target_overlap, arguments.seed)
    if not new.train:
        raise ValueError(f"no training post would stay: each has a keyphrase that {arguments.test} does not have")
    if not new.test and not new.moved_kept:
        raise ValueError(f"--target-overlap {arguments.target_overlap} leaves no test post: training knows them all")
    given = {split: split_statistics(_posts(source, split)) for split, source in sources.items()}
    old, moved = given["train"], len(new.moved)
    steps = {
        "given": (given["train"], given["test"], new.overlap_before),
        "after moving": (
            {"posts": old["posts"] - moved, "keyphrases": old["keyphrases"]},  # only the sum over both is shown
            {"posts": given["test"]["posts"] + moved, "keyphrases": given["test"]["keyphrases"]},
            new.overlap_moved,
        ),
    }

    with atomic_files(*names) as (train_file, test_file, table_file, report_file):
        options: dict[str, Any] = {"output_format": "jsonl", "output_image_dir": arguments.output_image_dir}
        convert_posts(_rows(sources, {"train": new.train}), train_file, **options)
        convert_posts(_rows(sources, {"test": new.test, "train": new.moved_kept}), test_file, **options)
        phrases = {phrase for post in _posts(str(train_file), "train", "json") for phrase in post["keyphrases"]}
        splits = {
            "train": split_statistics(_posts(str(train_file), "train", "json")),
            "test": split_statistics(_posts(str(test_file), "test", "json"), phrases),
        }
        steps["resampled"] = (splits["train"], splits["test"], new.overlap)
        tables = [markdown_table(rows) for rows in (overlap_table(steps), statistics_table(splits))]
        text = "\n\n".join([*tables, "# KP / Post is over training and test posts together."])
        table_file.write_text(text + "\n", encoding="utf-8")
        write_json(
            report_file,
            {
                **sources,
                "target_overlap": arguments.target_overlap,
                "seed": arguments.seed,
                "overlap_before": new.overlap_before,
                "overlap_after_moving": new.overlap_moved,
                "overlap": new.overlap,
                "exclusive_keyphrases": len(new.exclusive),
                "moved_posts": moved,
                "dropped_posts": given["test"]["posts"] + moved - len(new.test) - len(new.moved_kept),
                "dropped_keyphrases": new.dropped,
                "given": given,
                "resampled": splits,
            },
        )
    print(text)


def _posts(source: str, split: str, format: str = "auto") -> Iterator[Mapping[str, Any]]:
    """Whole posts; one that cannot be read right is an error, as its keyphrases would not count."""
    from dynkp.data.conversion import read_whole_posts

    for post, findings in read_whole_posts(source, split=split, format=format):
        if findings:
            raise ValueError(f"{source}: post {post['id']!r}: {findings[0]['code']}: {findings[0]['message']}")
        if "keyphrases" not in post:
            raise ValueError(f"{source}: post {post['id']!r} has no column 'keyphrases'")
        yield post


def _rows(sources: Mapping[str, str], wanted: Mapping[str, Sequence[int]]) -> Iterator[Mapping[str, Any]]:
    for split, rows in wanted.items():
        chosen = set(rows)
        yield from (post for row, post in enumerate(_posts(sources[split], split)) if row in chosen)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share: give a number from 0 to 1, such as 0.4492")
    return value
