"""Systems' predictions as a judge is shown them: without their names, in an order drawn for each post.

Given   posts, and files of what systems predicted for them.
Gives   each post's candidates, in the order to be shown.
Holds   predictions that are the same are one candidate, so that they share a rank; the order depends on seed, id and
        predictions alone: neither on the systems' names nor on their order; posts and predictions are matched by id.
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
# A system that repeats itself without end must not crowd out the others.
_MOST_PHRASES, _LONGEST_PHRASE = 50, 200


@dataclass(frozen=True)
class Candidate:
    """A prediction, and the systems that made it.

    Attributes:
        keyphrases: as they are shown.
        systems: by name.
    """

    keyphrases: tuple[str, ...]
    systems: tuple[str, ...]


def draw_candidates(post_id: str, predictions: Mapping[str, Sequence[str]], *, seed: int = 0) -> list[Candidate]:
    """A post's candidates in the order to be shown.

    The order depends on seed, id and predictions alone: not on the systems' names or order.

    Args:
        post_id: the post's id.
        predictions: system -> keyphrases.
        seed: of the order.

    Returns:
        Candidates; predictions that differ in case, blanks and "#" only are one.

    Example:
        >>> [candidate.systems for candidate in draw_candidates("7", {"a": ["NBA"], "b": ["#nba"], "c": []})]
        [('a', 'b'), ('c',)]
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    shown: dict[tuple[str, ...], tuple[str, ...]] = {}
    for system, keyphrases in predictions.items():
        kept = tuple(" ".join(phrase.split())[:_LONGEST_PHRASE] for phrase in keyphrases[:_MOST_PHRASES])
        folded = tuple(map(fold_keyphrase, kept))
        groups.setdefault(folded, []).append(system)
        # Of two spellings the first in the alphabet, whoever predicted it.
        shown[folded] = min(shown.get(folded, kept), kept)
    order = sorted(groups)
    # Not `hash`, which differs from process to process.
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
    """Read what systems predicted for posts.

    Args:
        posts: the posts; rows that are no posts are left out.
        files: system -> JSONL file of predictions, as `dynkp predict` writes it, for all posts of the posts file.
        seed: of the orders.
        top: how many of each system's keyphrases to show; all if None.
        allow_missing: whether a post without prediction counts as predicted empty.

    Returns:
        From a post's id to its candidates, and how many predictions were missing.

    Raises:
        ValueError: if there are not 2 to 26 systems, posts share an id, or a file does not fit the posts: unknown, repeated
            or missing ids, several decodes.
    """
    if not 2 <= len(files) <= len(LABELS):
        raise ValueError(f"predictions of {len(files)} systems: give 2 to {len(LABELS)}, each with a name of its own")
    wanted = [source for source in posts if source.problem is None]
    if repeated := [post_id for post_id, count in Counter(source.id for source in wanted).items() if count > 1]:
        raise ValueError(f"{posts.path}: ids that several posts have: {listed(repeated)}")
    # With a limit the other posts' predictions are there, too.
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
            raise ValueError(f"{file} has {len(decodes)} decodes of each post: keep the rows of one")
        missing += absent
        for row in decodes[0]:
            predicted[row["id"]][system] = row["keyphrases"][:top]
    return {post_id: draw_candidates(post_id, systems, seed=seed) for post_id, systems in predicted.items()}, missing


def name_systems(files: Sequence[str], names: Sequence[str] | None = None) -> dict[str, str]:
    """Systems by name: those given, else the files' names without their ends, or their paths where two are alike.

    Raises:
        ValueError: if names and files are not equally many, or two names are the same.

    Example:
        >>> name_systems(["out/direct.jsonl", "out/dynamic.jsonl"])
        {'direct': 'out/direct.jsonl', 'dynamic': 'out/dynamic.jsonl'}
    """
    stems = [Path(file).stem for file in files]
    chosen = list(names) if names else stems if len(set(stems)) == len(stems) else list(files)
    if len(chosen) != len(files):
        raise ValueError(f"{len(chosen)} names for {len(files)} files of predictions: give one each")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"two systems have the same name: {', '.join(chosen)}")
    return dict(zip(chosen, files, strict=True))
