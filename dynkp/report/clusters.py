"""Posts that share a keyphrase, as clusters of their embeddings (Figure 3 of the Dynamic CoT paper).

Given   posts and an embedding model of sentence-transformers: for texts, or for texts and pictures (CLIP and its kin).
Gives   the posts of the most frequent keyphrases as points in the plane, a PNG, and a page to look into them.
Holds   the same posts, model and seed give the same figure; a figure needs no network, neither to be made nor to be looked
        at; what posts say is shown as text, never taken for markup.

Extra `plots` (matplotlib, plotly, scikit-learn, sentence-transformers).
"""

from __future__ import annotations

import html
import os
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynkp.data.images import open_image
from dynkp.data.rows import fold_keyphrase
from dynkp.files.atomic import atomic_files, write_text

PROJECTIONS = ("tsne", "pca")
# Okabe and Ito's, which colour-blind readers tell apart; from the ninth keyphrase on the marks differ too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B7A600")
_MARKS = (("o", "circle"), ("^", "triangle-up"), ("s", "square"))
MOST_KEYPHRASES = len(COLOURS) * len(_MARKS)
_FEWEST_POSTS = 5
_NEEDED = "the dataset figure needs matplotlib, plotly, scikit-learn and sentence-transformers: pip install 'dynkp[plots]'"

_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class PostClusters:
    """Posts of the most frequent keyphrases as points. Lists run over the posts shown.

    Attributes:
        keyphrases: the most frequent ones, most frequent first, in their most frequent spelling.
        frequencies: posts that have each.
        ids, texts, tags: of each post its id, text and all its keyphrases.
        groups: which of `keyphrases` a post is shown under: the most frequent one it has.
        points: (posts, 2), the embeddings in the plane.
        several: how many posts shown have more than one of `keyphrases`.
        without_embedding: posts left out, as they have nothing that the model takes.
        modalities: what of the posts was embedded: "text", "image".
        projection: one of `PROJECTIONS`.
        silhouette: of the embeddings (not of the points), by cosine distance, in [-1, 1]; None for one keyphrase.
        neighbour_share: posts whose nearest other embedding is of the same keyphrase, as a share.
        neighbour_chance: that share if embeddings said nothing.
    """

    keyphrases: list[str]
    frequencies: list[int]
    ids: list[str]
    texts: list[str]
    tags: list[list[str]]
    groups: list[int]
    points: _Array
    several: int
    without_embedding: int
    modalities: list[str]
    projection: str
    silhouette: float | None
    neighbour_share: float
    neighbour_chance: float

    def caption(self) -> str:
        """What must be said beside the figure."""
        how = {"tsne": "t-SNE", "pca": "two principal components"}[self.projection]
        parts = [
            f"{len(self.ids):,} posts of the {len(self.keyphrases)} most frequent keyphrases; embeddings of "
            f"{' and '.join(self.modalities)}, {how}.",
            f"{self.neighbour_share:.1%} of the posts have their nearest neighbour among the posts of the same keyphrase "
            f"({self.neighbour_chance:.1%} by chance).",
        ]
        if self.silhouette is not None:
            parts.append(f"Silhouette (cosine) {self.silhouette:.3f}.")
        if self.several:
            parts.append(f"{self.several:,} posts have several of the keyphrases and are shown under the most frequent.")
        if self.without_embedding:
            parts.append(f"{self.without_embedding:,} posts without {' or '.join(self.modalities)} are left out.")
        return " ".join(parts)

    def figures(self) -> dict[str, Any]:
        """All figures, and the points, as JSON takes them."""
        posts = [
            {"id": post_id, "keyphrase": self.keyphrases[group], "x": float(x), "y": float(y)}
            for post_id, group, (x, y) in zip(self.ids, self.groups, self.points, strict=True)
        ]
        return {
            "keyphrases": dict(zip(self.keyphrases, self.frequencies, strict=True)),
            **{
                name: getattr(self, name)
                for name in ("modalities", "projection", "several", "without_embedding")
                + ("silhouette", "neighbour_share", "neighbour_chance")
            },
            "posts": posts,
        }


def cluster_posts(
    posts: Any,
    model: Any,
    *,
    top: int = 5,
    posts_per_keyphrase: int = 300,
    projection: str = "tsne",
    seed: int = 0,
    batch_size: int = 32,
    device: str | None = None,
) -> PostClusters:
    """Embed the posts of the most frequent keyphrases, and lay them out in the plane.

    The embedding of a post is the mean of its text's and its pictures' unit embeddings, at unit length; where the model
    takes texts only, its text's. With both, the mean over all posts is taken off each kind first: models such as CLIP put
    texts and pictures into two places far apart, and posts without picture would form a cluster for that reason alone.

    Args:
        posts: posts as `load_posts` returns them. Only the pictures of those shown are opened.
        model: folder or name of a model that sentence-transformers loads (a CLIP saved by transformers is one), or
            anything with its `encode` and `modalities`.
        top: how many keyphrases, at most `MOST_KEYPHRASES`.
        posts_per_keyphrase: show at most so many of each, drawn with the seed.
        projection: `"tsne"` or `"pca"`.
        seed: of the draw and of t-SNE.
        batch_size: posts embedded at a time.
        device: as in torch; None picks one.

    Returns:
        The points and what to say of them.

    Raises:
        ImportError: if the extra `plots` is not installed.
        ImageError: naming the post, if a picture cannot be opened.
        ValueError: if arguments are out of range, or fewer than five posts can be shown.

    Example: `cluster_posts(load_posts("test.jsonl", image_dir="images"), "clip-vit-base-patch32").caption()`
    """
    if not 1 <= top <= MOST_KEYPHRASES:
        raise ValueError(f"top={top} must be between 1 and {MOST_KEYPHRASES}, as many as can be told apart")
    if posts_per_keyphrase < 1:
        raise ValueError(f"posts_per_keyphrase={posts_per_keyphrase} must be at least 1")
    if projection not in PROJECTIONS:
        raise ValueError(f"projection={projection!r} is not known: use one of {', '.join(PROJECTIONS)}")
    try:
        from sklearn.metrics import pairwise_distances, silhouette_score
    except ImportError as error:
        raise ImportError(_NEEDED) from error
    keyphrases, frequencies, chosen, several = _most_frequent(posts, top, posts_per_keyphrase, seed)
    drawn = [posts[row] for row in chosen]
    embedded, vectors, modalities = embed_posts(drawn, model, batch_size=batch_size, device=device)
    if len(embedded) < _FEWEST_POSTS:
        raise ValueError(f"only {len(embedded)} posts can be shown, a figure needs {_FEWEST_POSTS}: give more, or raise top")
    shown = [drawn[index] for index in embedded]
    rows = [list(chosen)[index] for index in embedded]
    groups = [chosen[row] for row in rows]
    distances = pairwise_distances(vectors, metric="cosine")
    np.fill_diagonal(distances, 0)  # rounding leaves 1e-8, which the silhouette refuses
    labels = np.array(groups)
    mixed = 1 < len(set(groups)) < len(groups)
    silhouette = float(silhouette_score(distances, labels, metric="precomputed")) if mixed else None
    np.fill_diagonal(distances, np.inf)
    sizes = np.bincount(labels)[labels]
    return PostClusters(
        keyphrases=keyphrases,
        frequencies=frequencies,
        ids=[post["id"] for post in shown],
        texts=[post.get("text") or "" for post in shown],
        tags=[list(post["keyphrases"]) for post in shown],
        groups=groups,
        points=_project(vectors, projection, seed),
        several=len(several & set(rows)),
        without_embedding=len(drawn) - len(shown),
        modalities=modalities,
        projection=projection,
        silhouette=silhouette,
        neighbour_share=float(np.mean(labels[distances.argmin(axis=1)] == labels)),
        neighbour_chance=float(np.mean((sizes - 1) / (len(labels) - 1))),
    )


def _most_frequent(posts: Any, top: int, most: int, seed: int) -> tuple[list[str], list[int], dict[int, int], set[int]]:
    """The keyphrases, how many posts have each, row -> keyphrase of the posts to show, and rows that have several."""
    column = posts["keyphrases"] if hasattr(posts, "column_names") else [post.get("keyphrases") for post in posts]
    spellings: dict[str, Counter[str]] = {}
    rows: dict[str, list[int]] = {}
    for row, phrases in enumerate(column):
        for folded, phrase in {fold_keyphrase(phrase): phrase for phrase in phrases or ()}.items():
            if folded:
                rows.setdefault(folded, []).append(row)
                spellings.setdefault(folded, Counter())[phrase] += 1
    ranked = sorted(rows, key=lambda folded: (-len(rows[folded]), folded))[:top]
    if not ranked:
        raise ValueError("the posts have no keyphrases")
    group: dict[int, int] = {}
    several = set()
    random = np.random.default_rng(seed)
    for number, folded in enumerate(ranked):
        several |= group.keys() & set(rows[folded])
        new = [row for row in rows[folded] if row not in group]
        group |= dict.fromkeys(new, number)
    for number in range(len(ranked)):
        members = [row for row, its in group.items() if its == number]
        for row in random.permutation(members)[most:]:
            del group[int(row)]
    names = [spellings[folded].most_common(1)[0][0] for folded in ranked]
    return names, [len(rows[folded]) for folded in ranked], dict(sorted(group.items())), several


def embed_posts(
    posts: Sequence[Mapping[str, Any]], model: Any, *, batch_size: int = 32, device: str | None = None
) -> tuple[list[int], _Array, list[str]]:
    """Embed posts by what of them the model takes.

    Args:
        posts, model, batch_size, device: as in `cluster_posts`.

    Returns:
        Which of the posts have something that the model takes; their embeddings, (posts, dimensions), at unit length; and
        the kinds of content that were embedded, of `"text"` and `"image"`.
    """
    if isinstance(model, str | os.PathLike):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError(_NEEDED) from error
        model = SentenceTransformer(str(model), device=device)
    taken = getattr(model, "modalities", ["text"])
    texts = [index for index, post in enumerate(posts) if (post.get("text") or "").strip()] if "text" in taken else []
    pictures = [index for index, post in enumerate(posts) if post.get("images")] if "image" in taken else []
    kinds: dict[str, tuple[list[int], _Array]] = {}
    if texts:
        vectors = model.encode([posts[index]["text"] for index in texts], batch_size=batch_size, show_progress_bar=False)
        kinds["text"] = texts, _unit(np.asarray(vectors, np.float64))
    if pictures:
        parts = []
        for start in range(0, len(pictures), batch_size):  # few pictures open at a time
            batch = pictures[start : start + batch_size]
            opened = [open_image(image, post_id=posts[index]["id"]) for index in batch for image in posts[index]["images"]]
            vectors = _unit(np.asarray(model.encode(opened, batch_size=batch_size, show_progress_bar=False), np.float64))
            ends = np.cumsum([len(posts[index]["images"]) for index in batch])[:-1]
            parts += [part.mean(axis=0) for part in np.split(vectors, ends)]
        kinds["image"] = pictures, _unit(np.stack(parts))
    if not kinds:
        raise ValueError(f"no post has what the model takes ({', '.join(taken)})")
    total = np.zeros((len(posts), next(iter(kinds.values()))[1].shape[1]))
    for rows, vectors in kinds.values():
        total[rows] += vectors - vectors.mean(axis=0) if len(kinds) > 1 else vectors
    embedded = sorted({row for rows, _ in kinds.values() for row in rows})
    return embedded, _unit(total[embedded]), list(kinds)


def _unit(vectors: _Array) -> _Array:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(float).tiny)


def _project(vectors: _Array, projection: str, seed: int) -> _Array:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if projection == "pca":
        return np.asarray(PCA(n_components=2, svd_solver="full").fit_transform(vectors))
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    # scikit-learn divides by the first component's deviation, and with the NaN of equal vectors its tree reads wild memory.
    init = "pca" if np.ptp(vectors, axis=0).max() > 1e-6 else "random"
    return np.asarray(TSNE(perplexity=perplexity, init=init, random_state=seed, n_jobs=1).fit_transform(vectors))


# --- figures ---


def _look(group: int) -> tuple[str, str, str]:
    """Colour, mark in matplotlib, mark in plotly."""
    return COLOURS[group % len(COLOURS)], *_MARKS[group // len(COLOURS)]


def write_png(clusters: PostClusters, path: str | Path, *, title: str = "", dpi: int = 200) -> None:
    """Draw the figure for a paper: 6.4 x 4.8 inches.

    Args:
        clusters: what `cluster_posts` returned.
        path: the PNG file; replaced when the new one is complete.
        title: above the figure.
        dpi: dots per inch.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(_NEEDED) from error
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    groups = np.array(clusters.groups)
    handles = []
    for number in range(len(clusters.keyphrases)):
        colour, mark, _ = _look(number)
        points = clusters.points[groups == number]
        handles.append(axes.scatter(points[:, 0], points[:, 1], s=10, c=colour, marker=mark, alpha=0.7, linewidths=0))
    # matplotlib takes $ for mathematics, and leaves names that begin with _ out.
    names = [name.replace("$", r"\$") for name in clusters.keyphrases]
    names = [f"\u200b{name}" if name.startswith("_") else name for name in names]
    figure.legend(handles, names, markerscale=2, frameon=False, loc="outside center right")
    axes.set(xticks=[], yticks=[], title=title.replace("$", r"\$"))
    axes.spines[:].set_color("#cccccc")
    with atomic_files(path) as (partial,):
        figure.savefig(partial, format="png", dpi=dpi)


_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body {{ font-family: sans-serif; margin: 1rem auto; max-width: 75rem; }} p {{ color: #444; }}</style></head>
<body><h1>{title}</h1>
{figure}
<p id="caption">{caption}</p></body></html>
"""


def write_html(clusters: PostClusters, path: str | Path, *, title: str = "Posts by keyphrase") -> None:
    """Write a page in which a point shows its post, and a keyphrase can be clicked away; it needs no network.

    Args:
        clusters: what `cluster_posts` returned.
        path: the HTML file (about 5 MB, most of it plotly); replaced when the new one is complete.
        title: of the page.
    """
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ImportError(_NEEDED) from error
    figure = go.Figure()
    for number, name in enumerate(clusters.keyphrases):
        rows = [row for row, group in enumerate(clusters.groups) if group == number]
        colour, _, mark = _look(number)
        figure.add_scatter(
            x=clusters.points[rows, 0],
            y=clusters.points[rows, 1],
            mode="markers",
            name=f"{html.escape(name)} ({clusters.frequencies[number]:,})",
            marker={"color": colour, "symbol": mark, "size": 7, "opacity": 0.7},
            customdata=[
                [html.escape(clusters.ids[row]), html.escape("; ".join(clusters.tags[row])), _wrapped(clusters.texts[row])]
                for row in rows
            ],
            hovertemplate="<b>%{customdata[1]}</b><br>%{customdata[2]}<br><i>%{customdata[0]}</i><extra></extra>",
        )
    # At the top room for plotly's buttons: over the legend they would take its clicks.
    figure.update_layout(
        template="plotly_white", height=700, margin={"l": 10, "r": 10, "t": 45, "b": 10}, hoverlabel={"align": "left"}
    )
    figure.update_xaxes(showticklabels=False, zeroline=False)
    figure.update_yaxes(showticklabels=False, zeroline=False, scaleanchor="x")
    config = {"displaylogo": False, "responsive": True}
    page = _PAGE.format(
        title=html.escape(title),
        figure=figure.to_html(full_html=False, include_plotlyjs=True, config=config, div_id="clusters"),
        caption=html.escape(clusters.caption()),
    )
    write_text(path, page)


def _wrapped(text: str, width: int = 60, most: int = 300) -> str:
    text = " ".join(text.split())
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return "<br>".join(map(html.escape, textwrap.wrap(text, width)))
