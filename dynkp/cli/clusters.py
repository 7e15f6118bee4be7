"""The command `dynkp clusters`: the dataset figure of the Dynamic CoT paper."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dynkp.cli.arguments import CommandParser, add_batch_size, add_image_dir, add_posts, add_split, check_inputs

DESCRIPTION = """\
Draw the posts of the most frequent keyphrases as clusters of their embeddings (Figure 3 of the Dynamic CoT paper): a PNG for
a paper, an interactive page, or both. The model is any that sentence-transformers loads: for texts, or for texts and
images, such as a CLIP. Needs the extra `plots`."""

EPILOG = """\
examples:
  dynkp clusters --posts train.jsonl --image-dir images --model openai/clip-vit-base-patch32 --png c.png --html c.html
      the five most frequent keyphrases, by text and image
  dynkp clusters --posts test.jsonl --model all-MiniLM-L6-v2 --top 8 --html c.html --json c.json
      by text alone; the points and all figures as JSON
"""


def parser() -> argparse.ArgumentParser:
    """Build the parser; docs/cli.md is made of its help."""
    parser = CommandParser("clusters", DESCRIPTION, EPILOG)
    add_posts(parser)
    add_image_dir(parser)
    add_split(parser, "train")
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="the embedding model's folder, or its Hub id")
    parser.add_argument("--png", metavar="FILE", help="the figure")
    parser.add_argument("--html", metavar="FILE", help="the page; it works offline")
    parser.add_argument("--json", metavar="FILE", help="the points and all figures")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="how many keyphrases (default: 5, as in the paper)")
    parser.add_argument(
        "--posts-per-keyphrase", type=int, default=300, metavar="N", help="show at most so many of each (default: 300)"
    )
    parser.add_argument("--projection", choices=["tsne", "pca"], default="tsne", help="into the plane (default: tsne)")
    parser.add_argument("--title", default="Posts by keyphrase", help="of the figure")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of posts and of t-SNE (default: 0)")
    add_batch_size(parser, 32, "posts embedded at a time (default: 32)")
    parser.add_argument("--device", help="cpu, cuda, mps (default: what there is)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `dynkp clusters`.

    Args:
        argv: the arguments after `dynkp clusters`; those of the process if None.

    Raises:
        ValueError, OSError, ImportError: if posts or model do not allow a figure.
    """
    command = parser()
    arguments = command.parse_args(argv)
    if not (arguments.png or arguments.html or arguments.json):
        command.error("say what to write: --png, --html, --json")
    check_inputs(arguments, "posts", "image_dir")
    _draw(arguments)


def _draw(arguments: argparse.Namespace) -> None:
    from dynkp.data.sources import load_posts
    from dynkp.files.json_files import write_json
    from dynkp.report.cluster_figures import write_html, write_png
    from dynkp.report.clusters import cluster_posts

    clusters = cluster_posts(
        load_posts(arguments.posts, image_dir=arguments.image_dir, split=arguments.split),
        arguments.model,
        top=arguments.top,
        posts_per_keyphrase=arguments.posts_per_keyphrase,
        projection=arguments.projection,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        device=arguments.device,
    )
    if arguments.png:
        write_png(clusters, arguments.png, title=arguments.title)
    if arguments.html:
        write_html(clusters, arguments.html, title=arguments.title)
    if arguments.json:
        write_json(arguments.json, clusters.figures())
    print(clusters.caption())
