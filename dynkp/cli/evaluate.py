"""The command `dynkp evaluate`: predictions and posts in, scores, intervals and comparisons out."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dynkp.cli.arguments import CommandParser, add_posts, add_split, check_inputs

DESCRIPTION = """\
Score predicted keyphrases against the posts' own, and compare systems.

Predictions and posts are matched by id. Print one system's scores per subset of the keyphrases (present in the text or
absent; seen in training or unseen), or several systems side by side, with marks where they differ from the first one.
The conventions do not agree with each other; docs/metric.md explains them.

With --task sentiment: score predicted sentiments (accuracy, macro and weighted F1) and, with --chains, response chains
beside their floor, the rationale of another post with the same label (docs/methods/mulcot_rd.md)."""

EPILOG = """\
examples:
  dynkp evaluate --predictions predictions.jsonl --posts test.jsonl --train-keyphrases train.jsonl
      scores on all, present, absent, seen and unseen keyphrases
  dynkp evaluate --predictions direct.jsonl dynamic.jsonl --posts test.jsonl --markdown table.md --latex table.tex
      dynamic against direct; † and ‡ mark differences that chance explains badly
  dynkp evaluate --predictions p.jsonl --posts test.jsonl --convention aimkp --json scores.json --per-post posts.jsonl
      the figures of AimKP's tables, unrounded, and every post's own
  dynkp evaluate --task sentiment --predictions labels.jsonl --chains chains.jsonl --posts test.jsonl
      labels from dynkp predict --task masc --prompt label, chains from --prompt chain

A row of predictions is {"id": "7", "keyphrases": ["nba", "finals"]}; `dynkp predict` writes more, which is reported too.
Rows with a column decode (dynkp predict --decodes 3) are scored decode by decode, and the scores averaged.
"""


def parser() -> argparse.ArgumentParser:
    """Build the parser; docs/cli.md is made of its help."""
    parser = CommandParser("evaluate", DESCRIPTION, EPILOG)
    what = parser.add_argument_group("predictions and posts")
    what.add_argument(
        "--task", choices=["keyphrases", "sentiment"], default="keyphrases", help="what was predicted (default: keyphrases)"
    )
    what.add_argument("--predictions", required=True, nargs="+", metavar="FILE", help="one JSONL file per system")
    what.add_argument(
        "--chains",
        nargs="+",
        metavar="FILE",
        help="sentiment: response chains, the answers to --prompt chain, one JSONL file per system",
    )
    what.add_argument("--names", nargs="+", metavar="NAME", help="of the systems (default: the files' names)")
    add_posts(what, "the posts, in any format that docs/data.md names")
    add_split(what, "test")
    what.add_argument(
        "--train-keyphrases",
        metavar="FILE",
        help="what counts as seen: a text file with a keyphrase per line (.txt), or the training posts",
    )
    what.add_argument(
        "--allow-missing", action="store_true", help="score posts without a prediction as predicted empty, and say how many"
    )
    how = parser.add_argument_group("scores")
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
    how.add_argument(
        "--semantic-model", metavar="NAME", help="also semantic F1, or of response chains the cosine, with this model"
    )
    how.add_argument("--confidence", type=float, default=0.95, metavar="C", help="of the intervals (default: 0.95)")
    how.add_argument(
        "--resamples", type=int, default=10_000, metavar="N", help="of intervals and tests (default: 10000); 0 for neither"
    )
    how.add_argument("--seed", type=int, default=0, help="of intervals, tests and the floor of response chains (default: 0)")
    out = parser.add_argument_group("results")
    out.add_argument("--json", metavar="FILE", help="all figures: fractions, unrounded")
    out.add_argument("--markdown", metavar="FILE", help="the tables that are printed")
    out.add_argument("--latex", metavar="FILE", help="the same for LaTeX (booktabs)")
    out.add_argument("--per-post", metavar="FILE", help="every post's scores, as JSON lines")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `dynkp evaluate`.

    Args:
        argv: the arguments after `dynkp evaluate`; those of the process if None.

    Raises:
        ValueError, OSError, ImportError: if files cannot be read or do not fit together.
    """
    arguments = parser().parse_args(argv)
    _check_options(arguments)
    check_inputs(arguments, "posts", "train_keyphrases")
    check_inputs(arguments, "predictions", "chains", kind="file")
    try:
        evaluation = _sentiment(arguments) if arguments.task == "sentiment" else _keyphrases(arguments)
    except TypeError as error:  # of the metric, which refuses keyphrases that are no strings
        raise ValueError(str(error)) from error
    _write_results(arguments, evaluation)


# Options that say nothing about the other task.
_OF_KEYPHRASES = ("train_keyphrases", "convention", "k", "subsets", "confidence", "resamples")
_OF_SENTIMENT = ("chains",)


def _check_options(arguments: argparse.Namespace) -> None:
    defaults = parser()
    foreign = _OF_KEYPHRASES if arguments.task == "sentiment" else _OF_SENTIMENT
    for name in foreign:
        if getattr(arguments, name) != defaults.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} has no meaning with --task {arguments.task}: leave it out")
    for name in ("names", "chains"):
        given = getattr(arguments, name)
        if given is not None and len(given) != len(arguments.predictions):
            what = f"--{name} has {len(given)} {'names' if name == 'names' else 'files'}"
            raise ValueError(f"{what} and --predictions {len(arguments.predictions)} files: give one each")


def _sentiment(arguments: argparse.Namespace) -> Any:
    from dynkp.data.sentiment_posts import load_sentiment_posts
    from dynkp.prediction.prediction_files import read_predictions
    from dynkp.report.sentiment import SentimentEvaluation, labelled_posts

    with _silent("dynkp.data.rows"):  # it would ask for the images
        posts, _ = load_sentiment_posts(arguments.posts, task="msc", split=arguments.split, use_images=False, progress=False)
    evaluation = SentimentEvaluation(labelled_posts(posts), embedding_model=arguments.semantic_model, seed=arguments.seed)
    names = arguments.names or _names(arguments.predictions)
    for name, file, chains in zip(names, arguments.predictions, arguments.chains or [None] * len(names), strict=True):
        with _naming(file):
            rows = read_predictions(file, "prediction")
            written = None if chains is None else read_predictions(chains, "raw")
            evaluation.add(name, rows, written, allow_missing=arguments.allow_missing)
    return evaluation


def _keyphrases(arguments: argparse.Namespace) -> Any:
    from dynkp.data.statistics import load_keyphrases
    from dynkp.prediction.prediction_files import read_predictions
    from dynkp.report.evaluation import Evaluation, gold_posts

    names = arguments.names or _names(arguments.predictions)
    with _silent("dynkp.data.rows"):  # it would ask for the images
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
        with _naming(file):
            evaluation.add(name, read_predictions(file), allow_missing=arguments.allow_missing)
    return evaluation


def _write_results(arguments: argparse.Namespace, evaluation: Any) -> None:
    from dynkp.files.atomic import write_text
    from dynkp.files.json_files import write_json
    from dynkp.report.tables import latex_table, markdown_table

    tables = evaluation.tables()
    text = "\n\n".join([*map(markdown_table, tables), evaluation.caption()])
    print(text)
    if arguments.json:
        write_json(arguments.json, evaluation.report())
    if arguments.markdown:
        write_text(arguments.markdown, text + "\n")
    if arguments.latex:
        write_text(arguments.latex, "\n\n".join([f"% {evaluation.caption()}", *map(latex_table, tables)]) + "\n")
    if arguments.per_post:
        evaluation.write_posts(arguments.per_post)


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """Errors about a file's rows name the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if file in str(error) else f"{file}: {error}") from error


def _names(files: Sequence[str]) -> list[str]:
    """File names without their ends; where two are alike, the paths."""
    stems = [Path(file).stem for file in files]
    return stems if len(set(stems)) == len(stems) else list(files)


def _posts(source: str, split: str) -> Any:
    from dynkp.data.posts import load_valid_posts

    posts = load_valid_posts(source, split=split)
    return posts.select_columns([name for name in ("id", "text", "keyphrases") if name in posts.column_names])


@contextmanager
def _silent(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
