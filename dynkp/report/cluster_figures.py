"""The dataset figure (Figure 3 of the Dynamic CoT paper): clusters of posts, drawn as a PNG and as an interactive page.

Given   the clusters that `dynkp.report.clusters` computes.
Gives   a PNG for a paper, or a page on which a point shows its post.
Holds   neither drawing nor viewing a figure needs a network; text of posts is shown as text, never interpreted as markup.

Needs the extra `plots` (matplotlib, plotly).
"""

from __future__ import annotations

import html
import json
import textwrap
from pathlib import Path

import numpy as np
from markupsafe import Markup

from dynkp.files.atomic import atomic_files
from dynkp.report.clusters import MISSING_PACKAGE, PostClusters
from dynkp.report.pages import write_page

# Okabe and Ito's palette, which readers with colour blindness can distinguish; after the eighth keyphrase the marks change.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B7A600")
_MARKS = (("o", "circle"), ("^", "triangle-up"), ("s", "square"))


def _look(group: int) -> tuple[str, str, str]:
    """The colour, the mark in matplotlib, and the mark in plotly."""
    return COLOURS[group % len(COLOURS)], *_MARKS[group // len(COLOURS)]


def write_png(clusters: PostClusters, path: str | Path, *, title: str = "", dpi: int = 200) -> None:
    """Draw the figure for a paper: 6.4 x 4.8 inches.

    Args:
        clusters: The clusters that `cluster_posts` returned.
        path: The PNG file; replaced when the new one is complete.
        title: The title above the figure.
        dpi: The resolution, in dots per inch.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(MISSING_PACKAGE) from error
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    groups = np.array(clusters.groups)
    handles = []
    for number in range(len(clusters.keyphrases)):
        colour, mark, _ = _look(number)
        points = clusters.points[groups == number]
        handles.append(axes.scatter(points[:, 0], points[:, 1], s=10, c=colour, marker=mark, alpha=0.7, linewidths=0))
    # matplotlib interprets $ as mathematics, and omits names that begin with _.
    names = [name.replace("$", r"\$") for name in clusters.keyphrases]
    names = [f"\u200b{name}" if name.startswith("_") else name for name in names]
    figure.legend(handles, names, markerscale=2, frameon=False, loc="outside center right")
    axes.set(xticks=[], yticks=[], title=title.replace("$", r"\$"))
    axes.spines[:].set_color("#cccccc")
    with atomic_files(path) as (partial,):
        figure.savefig(partial, format="png", dpi=dpi)


def write_html(clusters: PostClusters, path: str | Path, *, title: str = "Posts by keyphrase") -> None:
    """Write an interactive page: pointing at a point shows its post, and a click on a keyphrase hides its posts.

    Args:
        clusters: The clusters that `cluster_posts` returned.
        path: The HTML file (about 5 MB, most of it plotly.js); replaced when the new one is complete.
        title: The page's title and heading.

    Raises:
        ImportError: If plotly is not installed.
    """
    try:
        import plotly.graph_objects as go
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError(MISSING_PACKAGE) from error
    figure = go.Figure()
    for number, name in enumerate(clusters.keyphrases):
        indices = [index for index, group in enumerate(clusters.groups) if group == number]
        colour, _, mark = _look(number)
        figure.add_scatter(
            x=clusters.points[indices, 0],
            y=clusters.points[indices, 1],
            mode="markers",
            name=f"{html.escape(name)} ({clusters.frequencies[number]:,})",
            marker={"color": colour, "symbol": mark, "size": 7, "opacity": 0.7},
            customdata=[
                [
                    html.escape(clusters.ids[index]),
                    html.escape("; ".join(clusters.tags[index])),
                    _wrapped(clusters.texts[index]),
                ]
                for index in indices
            ],
            hovertemplate="<b>%{customdata[1]}</b><br>%{customdata[2]}<br><i>%{customdata[0]}</i><extra></extra>",
        )
    # The top margin is for plotly's buttons, which would cover the legend.
    figure.update_layout(
        template="plotly_white", height=700, margin={"l": 10, "r": 10, "t": 45, "b": 10}, hoverlabel={"align": "left"}
    )
    figure.update_xaxes(showticklabels=False, zeroline=False)
    figure.update_yaxes(showticklabels=False, zeroline=False, scaleanchor="x")
    config = {"displaylogo": False, "responsive": True}
    with atomic_files(path) as (partial,):
        write_page(
            partial,
            "clusters.html",
            title=title,
            caption=clusters.caption(),
            plotly_js=Markup(get_plotlyjs()),
            figure={**json.loads(figure.to_json()), "config": config},
        )


def _wrapped(text: str, width: int = 60, most: int = 300) -> str:
    text = " ".join(text.split())
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return "<br>".join(map(html.escape, textwrap.wrap(text, width)))
