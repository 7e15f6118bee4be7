"""The command `dynkp evaluate`: predictions and posts in, scores, intervals and comparisons out."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Score predicted keyphrases against the posts' own, and compare systems.

Predictions and posts are matched by id. Print one system's scores per subset of the keyphrases (present in the text or
absent; seen in training or unseen), or several systems side by side, with marks where they differ from the first one.
The conventions do not agree with each other; docs/metric.md explains them."""

EPILOG = """\
examples:
  dynkp evaluate --predictions predictions.jsonl --posts test.jsonl --train-keyphrases train.jsonl
      scores on all, present, absent, seen and unseen keyphrases
  dynkp evaluate --predictions direct.jsonl dynamic.jsonl --posts test.jsonl --markdown table.md --latex table.tex
      dynamic against direct; † and ‡ mark differences that chance explains badly
  dynkp evaluate --predictions p.jsonl --posts test.jsonl --convention aimkp --json scores.json --per-post posts.jsonl
      the figures of AimKP's tables, unrounded, and every post's own

A row of predictions is {"id": "7", "keyphrases": ["nba", "finals"]}; `dynkp predict` writes more, which is reported too.
Rows with a column decode (dynkp predict --decodes 3) are scored decode by decode, and the scores averaged.
"""


def parser() -> argparse.ArgumentParser:
    """The command line; docs/cli.md is made of its help."""
    parser = argparse.ArgumentParser(
        prog="dynkp evaluate", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what")
    what.add_argument("--predictions", required=True, nargs="+", metavar="FILE", help="one JSONL file per system")
    what.add_argument("--names", nargs="+", metavar="NAME", help="of the systems (default: the files' names)")
    what.add_argument("--posts", required=True, metavar="FILE", help="the posts, in any form that docs/data.md names")
    what.add_argument("--split", default="test", help="of a folder or Hub dataset (default: test)")
    what.add_argument(
        "--train-keyphrases",
        metavar="FILE",
        help="what counts as seen: a text file with a keyphrase per line (.txt), or the training posts",
    )
    what.add_argument(
        "--allow-missing", action="store_true", help="score posts without a prediction as predicted empty, and say how many"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--convention",
        choices=["cmkp", "aimkp", "padded", "unpadded"],
        default="cmkp",
        help="cmkp (the default): the script of Wang et al. (2020); aimkp: that of AimKP; padded, unpadded: the keyphrase "
        "field's macro F1, short lists counted as if filled up with misses, or not",
    )
    how.add_argument("--k", type=int, nargs="+", default=[1, 3, 5], metavar="K", help="cut-offs (default: 1 3 5)")
    how.add_argument(
        "--subsets",
        nargs="+",
        metavar="SUBSET",
        help="all, present, absent, seen, unseen, and crossings such as 'present&unseen' (default: all that can be computed)",
    )
    how.add_argument("--semantic-model", metavar="NAME", help="also semantic F1, with this sentence-transformers model")
    how.add_argument("--confidence", type=float, default=0.95, metavar="C", help="of the intervals (default: 0.95)")
    how.add_argument(
        "--resamples", type=int, default=10_000, metavar="N", help="of intervals and tests (default: 10000); 0 for neither"
    )
    how.add_argument("--seed", type=int, default=0, help="of both (default: 0)")
    out = parser.add_argument_group("results")
    out.add_argument("--json", metavar="FILE", help="all figures: fractions, unrounded")
    out.add_argument("--markdown", metavar="FILE", help="the tables that are printed")
    out.add_argument("--latex", metavar="FILE", help="the same for LaTeX (booktabs)")
    out.add_argument("--per-post", metavar="FILE", help="every post's scores, as JSON lines")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dynkp evaluate`.

    Args:
        argv: the arguments after `dynkp evaluate`; those of the process if None.

    Returns:
        0, or 1 where files cannot be read or do not fit together.
    """
    arguments = parser().parse_args(argv)
    try:
        _evaluate(arguments)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"dynkp evaluate: error: {error}", file=sys.stderr)
        return 1
    return 0


def _evaluate(arguments: argparse.Namespace) -> None:
    from dynkp.data.statistics import load_keyphrases
    from dynkp.report.evaluation import Evaluation, gold_posts, latex_table, markdown_table, read_predictions
    from dynkp.report.scores import write_json

    names = arguments.names or _names(arguments.predictions)
    if len(names) != len(arguments.predictions):
        raise ValueError(f"--names has {len(names)} names and --predictions {len(arguments.predictions)} files: give one each")
    with _silent("dynkp.data.rows"):  # which would ask for the pictures
        gold = gold_posts(_posts(arguments.posts, arguments.split))
        train_keyphrases = None if arguments.train_keyphrases is None else load_keyphrases(arguments.train_keyphrases)
    evaluation = Evaluation(
        gold,
        train_keyphrases=train_keyphrases,
        convention=arguments.convention,
        ks=arguments.k,
        subsets=arguments.subsets,
        confidence=arguments.confidence,
        resamples=arguments.resamples,
        seed=arguments.seed,
        semantic_model=arguments.semantic_model,
    )
    for name, file in zip(names, arguments.predictions, strict=True):
        try:
            evaluation.add(name, read_predictions(file), allow_missing=arguments.allow_missing)
        except ValueError as error:
            raise ValueError(str(error) if file in str(error) else f"{file}: {error}") from error
    tables = evaluation.tables()
    text = "\n\n".join([*map(markdown_table, tables), evaluation.caption()])
    print(text)
    if arguments.json:
        write_json(arguments.json, evaluation.report())
    if arguments.markdown:
        _write(arguments.markdown, text)
    if arguments.latex:
        _write(arguments.latex, "\n\n".join([f"% {evaluation.caption()}", *map(latex_table, tables)]))
    if arguments.per_post:
        evaluation.write_posts(arguments.per_post)


def _names(files: Sequence[str]) -> list[str]:
    """File names without their ends; where two are alike, the paths."""
    stems = [Path(file).stem for file in files]
    return stems if len(set(stems)) == len(stems) else list(files)


def _posts(source: str, split: str) -> Any:
    from dynkp.data.sources import load_posts

    posts = load_posts(source, split=split)
    wanted = [name for name in ("id", "text", "keyphrases") if name in posts.column_names]
    if "keyphrases" not in wanted:
        raise ValueError(f"{source}: the posts have no column 'keyphrases' to score against")
    return posts.select_columns(wanted)


@contextmanager
def _silent(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text + "\n", encoding="utf-8")
