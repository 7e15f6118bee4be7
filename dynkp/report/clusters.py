"""Posts of the most frequent keyphrases as clusters of their embeddings (Figure 3 of the Dynamic CoT paper).

Given   posts and an embedding model of sentence-transformers: for texts, or for texts and images (such as CLIP).
Gives   the posts of the most frequent keyphrases as points in the plane, which `dynkp.report.cluster_figures` draws.
Holds   the same posts, model and seed give the same points.

Needs the extra `plots` (scikit-learn, sentence-transformers).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynkp.data.images import open_image
from dynkp.data.rows import fold_keyphrase

PROJECTIONS = ("tsne", "pca")
MOST_KEYPHRASES = 24  # as many as the figures have distinguishable marks
_FEWEST_POSTS = 5
MISSING_PACKAGE = (
    "the dataset figure needs matplotlib, plotly, scikit-learn and sentence-transformers: pip install 'dynkp[plots]'"
)

_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class PostClusters:
    """Posts of the most frequent keyphrases as points; lists have one entry per post shown.

    Attributes:
        keyphrases: The most frequent keyphrases, most frequent first, each in its most frequent spelling.
        frequencies: The number of posts that have each of them.
        ids: The posts' ids.
        texts: Their texts.
        tags: All keyphrases of each.
        groups: The index in `keyphrases` of the keyphrase a post is shown under: the most frequent one it has.
        points: The embeddings in the plane, (posts, 2).
        several: The number of posts shown that have more than one of `keyphrases`.
        without_embedding: The number of posts left out because they have no content that the model embeds.
        modalities: The content that was embedded: "text", "image".
        projection: One of `PROJECTIONS`.
        silhouette: The silhouette of the embeddings (not of the points) by cosine distance, in [-1, 1]; None for a single
            keyphrase.
        neighbour_share: The share of posts whose nearest other embedding belongs to the same keyphrase, in [0, 1].
        neighbour_chance: The same share expected for random embeddings.
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
        """Return what must be stated beside the figure."""
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
        """Return all figures, and the points, as JSON values."""
        posts = [
            {"id": post_id, "keyphrase": self.keyphrases[group], "x": float(x), "y": float(y)}
            for post_id, group, (x, y) in zip(self.ids, self.groups, self.points, strict=True)
        ]
        return {
            "keyphrases": dict(zip(self.keyphrases, self.frequencies, strict=True)),
            "modalities": self.modalities,
            "projection": self.projection,
            "several": self.several,
            "without_embedding": self.without_embedding,
            "silhouette": self.silhouette,
            "neighbour_share": self.neighbour_share,
            "neighbour_chance": self.neighbour_chance,
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
    """Embed the posts of the most frequent keyphrases, and project the embeddings onto the plane.

    The embedding of a post is the mean of the unit embeddings of its text and its images, at unit length; if the model embeds
    texts only, that of its text. With both, the mean over all posts is first subtracted from each kind: models such as CLIP
    embed texts and images in two distant regions, and posts without images would form a cluster for that reason alone.

    Args:
        posts: Posts as `load_posts` returns them. Only the images of the posts shown are opened.
        model: Folder or name of a model that sentence-transformers loads (such as a CLIP saved by transformers), or an object
            with its `encode` and `modalities`.
        top: The number of keyphrases, at most `MOST_KEYPHRASES`.
        posts_per_keyphrase: The largest number of posts shown per keyphrase, drawn with the seed.
        projection: `"tsne"` or `"pca"`.
        seed: The seed of the draw and of t-SNE.
        batch_size: The number of posts embedded at a time.
        device: A torch device; None chooses one.

    Returns:
        The points and their statistics.

    Raises:
        ImportError: If the extra `plots` is not installed.
        ImageError: If an image cannot be opened; the error names the post.
        ValueError: If an argument is out of range, or fewer than five posts can be shown.

    Example:
        ```python
        posts = load_posts("test.jsonl", image_dir="images")
        print(cluster_posts(posts, "openai/clip-vit-base-patch32").caption())
        ```
    """
    if not 1 <= top <= MOST_KEYPHRASES:
        raise ValueError(f"top={top} must be between 1 and {MOST_KEYPHRASES}, the number of distinguishable marks")
    if posts_per_keyphrase < 1:
        raise ValueError(f"posts_per_keyphrase={posts_per_keyphrase} must be at least 1")
    if projection not in PROJECTIONS:
        raise ValueError(f"projection={projection!r} is not known: use one of {', '.join(PROJECTIONS)}")
    try:
        from sklearn.metrics import pairwise_distances, silhouette_score
    except ImportError as error:
        raise ImportError(MISSING_PACKAGE) from error
    keyphrases, frequencies, chosen, several = _most_frequent(posts, top, posts_per_keyphrase, seed)
    drawn = [posts[index] for index in chosen]
    embedded, vectors, modalities = embed_posts(drawn, model, batch_size=batch_size, device=device)
    if len(embedded) < _FEWEST_POSTS:
        raise ValueError(
            f"only {len(embedded)} posts can be shown, a figure needs {_FEWEST_POSTS}: give more posts, or raise top"
        )
    shown = [drawn[place] for place in embedded]
    indices = [list(chosen)[place] for place in embedded]
    groups = [chosen[index] for index in indices]
    distances = pairwise_distances(vectors, metric="cosine")
    np.fill_diagonal(distances, 0)  # rounding leaves 1e-8, which silhouette_score rejects
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
        several=len(several & set(indices)),
        without_embedding=len(drawn) - len(shown),
        modalities=modalities,
        projection=projection,
        silhouette=silhouette,
        neighbour_share=float(np.mean(labels[distances.argmin(axis=1)] == labels)),
        neighbour_chance=float(np.mean((sizes - 1) / (len(labels) - 1))),
    )


def _most_frequent(posts: Any, top: int, most: int, seed: int) -> tuple[list[str], list[int], dict[int, int], set[int]]:
    """Choose the posts to show.

    Returns:
        The keyphrases, the number of posts that have each, post index -> keyphrase index of the posts to show, and the
        indices of posts that have several of the keyphrases.
    """
    column = posts["keyphrases"] if hasattr(posts, "column_names") else [post.get("keyphrases") for post in posts]
    spellings: dict[str, Counter[str]] = {}
    indices: dict[str, list[int]] = {}
    for index, phrases in enumerate(column):
        for folded, phrase in {fold_keyphrase(phrase): phrase for phrase in phrases or ()}.items():
            if folded:
                indices.setdefault(folded, []).append(index)
                spellings.setdefault(folded, Counter())[phrase] += 1
    ranked = sorted(indices, key=lambda folded: (-len(indices[folded]), folded))[:top]
    if not ranked:
        raise ValueError("the posts have no keyphrases")
    group: dict[int, int] = {}
    several = set()
    random = np.random.default_rng(seed)
    for number, folded in enumerate(ranked):
        several |= group.keys() & set(indices[folded])
        new = [index for index in indices[folded] if index not in group]
        group |= dict.fromkeys(new, number)
    for number in range(len(ranked)):
        members = [index for index, its in group.items() if its == number]
        for index in random.permutation(members)[most:]:
            del group[int(index)]
    names = [spellings[folded].most_common(1)[0][0] for folded in ranked]
    return names, [len(indices[folded]) for folded in ranked], dict(sorted(group.items())), several


def embed_posts(
    posts: Sequence[Mapping[str, Any]], model: Any, *, batch_size: int = 32, device: str | None = None
) -> tuple[list[int], _Array, list[str]]:
    """Embed the content of posts that the model accepts.

    Args:
        posts: The posts, as in `cluster_posts`.
        model: The model, as in `cluster_posts`.
        batch_size: The number of posts embedded at a time.
        device: A torch device; None chooses one.

    Returns:
        The indices of the posts that have content the model embeds; their embeddings, (indices, dimensions), at unit length;
        and the kinds of content that were embedded, of `"text"` and `"image"`.

    Raises:
        ImportError: If sentence-transformers is not installed.
        ImageError: If an image cannot be opened; the error names the post.
        ValueError: If no post has content that the model embeds.
    """
    if isinstance(model, str | os.PathLike):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError(MISSING_PACKAGE) from error
        model = SentenceTransformer(str(model), device=device)
    accepted = getattr(model, "modalities", ["text"])
    texts = [index for index, post in enumerate(posts) if (post.get("text") or "").strip()] if "text" in accepted else []
    with_images = [index for index, post in enumerate(posts) if post.get("images")] if "image" in accepted else []
    kinds: dict[str, tuple[list[int], _Array]] = {}
    if texts:
        vectors = model.encode([posts[index]["text"] for index in texts], batch_size=batch_size, show_progress_bar=False)
        kinds["text"] = texts, _unit(np.asarray(vectors, np.float64))
    if with_images:
        parts = []
        for start in range(0, len(with_images), batch_size):  # to keep few images open at a time
            batch = with_images[start : start + batch_size]
            opened = [open_image(image, post_id=posts[index]["id"]) for index in batch for image in posts[index]["images"]]
            vectors = _unit(np.asarray(model.encode(opened, batch_size=batch_size, show_progress_bar=False), np.float64))
            ends = np.cumsum([len(posts[index]["images"]) for index in batch])[:-1]
            parts += [part.mean(axis=0) for part in np.split(vectors, ends)]
        kinds["image"] = with_images, _unit(np.stack(parts))
    if not kinds:
        raise ValueError(f"no post has content that the model embeds ({', '.join(accepted)})")
    total = np.zeros((len(posts), next(iter(kinds.values()))[1].shape[1]))
    for indices, vectors in kinds.values():
        total[indices] += vectors - vectors.mean(axis=0) if len(kinds) > 1 else vectors
    embedded = sorted({index for indices, _ in kinds.values() for index in indices})
    return embedded, _unit(total[embedded]), list(kinds)


def _unit(vectors: _Array) -> _Array:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(float).tiny)


def _project(vectors: _Array, projection: str, seed: int) -> _Array:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if projection == "pca":
        return np.asarray(PCA(n_components=2, svd_solver="full").fit_transform(vectors))
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    # scikit-learn divides by the first component's deviation; for equal vectors that gives NaN, and invalid memory is read.
    init = "pca" if np.ptp(vectors, axis=0).max() > 1e-6 else "random"
    return np.asarray(TSNE(perplexity=perplexity, init=init, random_state=seed, n_jobs=1).fit_transform(vectors))
