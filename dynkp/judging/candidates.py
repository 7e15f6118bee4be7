"""Candidates: systems' predictions as a judge sees them, without the systems' names, in an order drawn for each post.

Given   posts, and files of systems' predictions for them.
Gives   each post's candidates, in the order in which they are shown.
Holds   equal predictions are one candidate, so that they share a rank; the order depends only on seed, id and predictions,
        neither on the systems' names nor on their order; posts and predictions are matched by id.
"""

from __future__ import annotations

import hashlib
import os
import random
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynkp.chat.post_stream import PostStream
from dynkp.data.rows import fold_keyphrase
from dynkp.prediction.prediction_files import listed, match_predictions, read_predictions

LABELS = string.ascii_uppercase
# Limits for systems whose output degenerates: their predictions must not fill the prompt.
_MOST_PHRASES, _LONGEST_PHRASE = 50, 200


@dataclass(frozen=True)
class Candidate:
    """A prediction, and the systems that made it.

    Attributes:
        keyphrases: The predicted keyphrases, as they are shown.
        systems: The names of the systems.
    """

    keyphrases: tuple[str, ...]
    systems: tuple[str, ...]


def draw_candidates(post_id: str, predictions: Mapping[str, Sequence[str]], *, seed: int = 0) -> list[Candidate]:
    """Group a post's predictions into candidates, and draw the order in which they are shown.

    The order depends only on seed, id and predictions, not on the systems' names or order.

    Args:
        post_id: The post's id.
        predictions: System -> predicted keyphrases, best first.
        seed: The seed of the order.

    Returns:
        The candidates; predictions that differ only in case, whitespace and "#" are one candidate.

    Example:
        >>> [candidate.systems for candidate in draw_candidates("7", {"a": ["NBA"], "b": ["#nba"], "c": []})]
        [('c',), ('a', 'b')]
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    shown: dict[tuple[str, ...], tuple[str, ...]] = {}
    for system, keyphrases in predictions.items():
        kept = tuple(" ".join(phrase.split())[:_LONGEST_PHRASE] for phrase in keyphrases[:_MOST_PHRASES])
        folded = tuple(map(fold_keyphrase, kept))
        groups.setdefault(folded, []).append(system)
        # Of several spellings the first in alphabetical order, whichever system predicted it.
        shown[folded] = min(shown.get(folded, kept), kept)
    order = sorted(groups)
    # A digest, because `hash` differs from process to process.
    random.Random(hashlib.blake2b(f"{seed}\t{post_id}".encode("utf-8", "surrogatepass")).digest()).shuffle(order)
    return [Candidate(shown[folded], tuple(groups[folded])) for folded in order]


def load_candidates(
    posts: PostStream,
    files: Mapping[str, str | os.PathLike[str]],
    *,
    seed: int = 0,
    top: int | None = None,
    allow_missing: bool = False,
) -> tuple[dict[str, list[Candidate]], int]:
    """Read systems' predictions, and draw the candidates of every post.

    Args:
        posts: The posts; rows that could not be parsed are ignored.
        files: System -> JSON Lines file of predictions, as `dynkp predict` writes it, for all posts of the posts file.
        seed: The seed of the orders.
        top: The number of each system's keyphrases that are shown; None for all.
        allow_missing: Whether a post without a prediction counts as one with an empty prediction.

    Returns:
        Post id -> candidates, and the number of missing predictions.

    Raises:
        ValueError: If there are not 2 to 26 systems; if posts share an id; or if a file does not match the posts (unknown,
            repeated or missing ids, several decodes).
    """
    if not 2 <= len(files) <= len(LABELS):
        raise ValueError(f"predictions of {len(files)} systems: give 2 to {len(LABELS)}, each with its own name")
    wanted = [source for source in posts if source.problem is None]
    if repeated := [post_id for post_id, count in Counter(source.id for source in wanted).items() if count > 1]:
        raise ValueError(f"{posts.path}: several posts have the same id: {listed(repeated)}")
    # With a limit, the files also contain predictions of the posts beyond it.
    ids = {source.id for source in wanted}
    others = {source.id for source in PostStream(posts.path)} - ids if posts.limit is not None else set()
    predicted: dict[str, dict[str, Sequence[str]]] = {source.id: {} for source in wanted}
    missing = 0
    for system, file in files.items():
        rows = [row for row in read_predictions(file) if row["id"] not in others]
        try:
            decodes, absent = match_predictions(rows, wanted, allow_missing=allow_missing)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        if len(decodes) > 1:
            raise ValueError(f"{file} has {len(decodes)} decodes of each post: keep the rows of one decode")
        missing += absent
        for row in decodes[0]:
            predicted[row["id"]][system] = row["keyphrases"][:top]
    return {post_id: draw_candidates(post_id, systems, seed=seed) for post_id, systems in predicted.items()}, missing


def name_systems(files: Sequence[str], names: Sequence[str] | None = None) -> dict[str, str]:
    """Name the systems: as given, else by the files' names without suffix, or by their paths if two names are equal.

    Args:
        files: The systems' files of predictions.
        names: The systems' names, in the same order; None to derive them.

    Returns:
        Name -> file.

    Raises:
        ValueError: If the numbers of names and files differ, or two names are equal.

    Example:
        >>> name_systems(["out/direct.jsonl", "out/dynamic.jsonl"])
        {'direct': 'out/direct.jsonl', 'dynamic': 'out/dynamic.jsonl'}
    """
    stems = [Path(file).stem for file in files]
    chosen = list(names) if names else stems if len(set(stems)) == len(stems) else list(files)
    if len(chosen) != len(files):
        raise ValueError(f"{len(chosen)} names for {len(files)} files of predictions: give one name per file")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"two systems have the same name: {', '.join(chosen)}")
    return dict(zip(chosen, files, strict=True))
