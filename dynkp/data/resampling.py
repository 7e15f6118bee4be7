"""Resampling: lower the overlap of test and training keyphrases, as for MMKP-V2 (Dynamic CoT paper, Section 4.1).

The overlap is the share of the test set's distinct keyphrases that occur in training.

Guarantees:

- Every training post stays in training or moves to the test set.
- No post that stays in training has a keyphrase that only training had.
- Test posts are dropped until the overlap is at most the target, and no further, in an order that depends on the seed and the
  keyphrases alone.

The paper's procedure is: "1. Transferring all training-exclusive keyphrase samples to the test set. 2. Removing test samples
containing keyphrases observed during training", with a reported overlap of 44.92 %. Taken literally, step 2 leaves no
overlap. Therefore posts are dropped keyphrase by keyphrase, in an order defined here, until the overlap is small enough.
MMKP-V2 itself cannot be reproduced this way.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynkp.data.rows import fold_keyphrase


@dataclass(frozen=True)
class Resampling:
    """The result of `resample`: indices (from 0) of posts in the two given sets.

    Attributes:
        train: training posts that stay in training.
        test: test posts that stay in the test set.
        moved: training posts that move to the test set, including those that are then dropped.
        moved_kept: those of `moved` that are not dropped. The new test set is `test` of the old test set, followed by
            `moved_kept` of the old training set.
        exclusive: keyphrases that only training had.
        dropped: keyphrases whose posts were dropped from the test set, in that order.
        overlap_before: the overlap of the given sets, in [0, 1]; 0 for a test set without keyphrases.
        overlap_moved: the overlap after posts were moved.
        overlap: the overlap of the new sets.
    """

    train: list[int]
    test: list[int]
    moved: list[int]
    moved_kept: list[int]
    exclusive: set[str]
    dropped: list[str]
    overlap_before: float
    overlap_moved: float
    overlap: float


def resample(
    train: Iterable[Mapping[str, Any]], test: Iterable[Mapping[str, Any]], target_overlap: float, seed: int = 0
) -> Resampling:
    r"""Move posts with training-only keyphrases to the test set, then drop test posts until the overlap is small.

    Two keyphrases are the same if they differ in case and whitespace only. With K(.) the distinct keyphrases of a set:

    1. X = K(train) \ K(test). Training posts with a keyphrase in X move to the test set, behind its own posts.
    2. The keyphrases that are both in the remaining training set and in the test set are taken in the order of the SHA-256
       of `f"{seed}\t{phrase}"`. While the overlap |K(test) ∩ K(train)| / |K(test)| is above the target, every test post
       with the keyphrase is dropped, unless none has it any more.

    Posts without keyphrases stay in their set.

    Args:
        train: training posts with `id` and `keyphrases`; read once, and only these columns are kept in memory.
        test: test posts, as `train`.
        target_overlap: the greatest overlap, in [0, 1]. 0 keeps only posts without any keyphrase of training.
        seed: seed of the order in step 2.

    Returns:
        Indices of the posts that stay, move and are dropped, and the overlaps.

    Raises:
        ValueError: if the target is not in [0, 1]; naming the post, if an id occurs twice.

    Example:
        >>> train = [{"id": "a", "keyphrases": ["dog"]}, {"id": "b", "keyphrases": ["dog", "nba"]}]
        >>> test = [{"id": "c", "keyphrases": ["Dog"]}, {"id": "d", "keyphrases": ["sun"]}]
        >>> new = resample(train, test, target_overlap=0)
        >>> new.train, new.moved, new.test, new.moved_kept, new.overlap_before, new.overlap
        ([0], [1], [1], [], 0.5, 0.0)
    """
    if not 0 <= target_overlap <= 1:
        raise ValueError(f"target_overlap={target_overlap!r} must be a share in [0, 1]")
    ids: set[str] = set()
    train_phrases = _phrase_sets(train, "training", ids)
    test_phrases = _phrase_sets(test, "test", ids)

    known = set().union(*test_phrases)
    exclusive = set().union(*train_phrases) - known
    moved = [index for index, phrases in enumerate(train_phrases) if not exclusive.isdisjoint(phrases)]
    is_moved = set(moved)
    stay = [index for index in range(len(train_phrases)) if index not in is_moved]
    observed = set().union(*(train_phrases[index] for index in stay))

    merged = [*test_phrases, *(train_phrases[index] for index in moved)]
    posts_of: dict[str, list[int]] = {}
    for post, phrases in enumerate(merged):
        for phrase in phrases:
            posts_of.setdefault(phrase, []).append(post)
    remaining = Counter({phrase: len(posts) for phrase, posts in posts_of.items()})
    kept = [True] * len(merged)
    distinct, shared = len(posts_of), sum(phrase in observed for phrase in posts_of)
    overlap_moved = _share(shared, distinct)
    dropped = []

    def place_in_order(phrase: str) -> str:
        return hashlib.sha256(f"{seed}\t{phrase}".encode()).hexdigest()

    for phrase in sorted(observed & posts_of.keys(), key=place_in_order):
        if _share(shared, distinct) <= target_overlap:
            break
        if not remaining[phrase]:
            continue
        dropped.append(phrase)
        for post in posts_of[phrase]:
            if kept[post]:
                kept[post] = False
                remaining.subtract(merged[post])
                gone = [other for other in merged[post] if not remaining[other]]
                distinct -= len(gone)
                shared -= sum(other in observed for other in gone)
    return Resampling(
        train=stay,
        test=[index for index in range(len(test_phrases)) if kept[index]],
        moved=moved,
        moved_kept=[index for place, index in enumerate(moved, start=len(test_phrases)) if kept[place]],
        exclusive=exclusive,
        dropped=dropped,
        overlap_before=_share(len(known & set().union(*train_phrases)), len(known)),
        overlap_moved=overlap_moved,
        overlap=_share(shared, distinct),
    )


def overlap_table(rows: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any], float]]) -> list[list[str]]:
    """Return the table of datasets of the Dynamic CoT paper (Table 2).

    Args:
        rows: per dataset's name, what `split_statistics` returns for its training posts and for its test posts, and the
            overlap, in [0, 1].

    Returns:
        Rows of cells; the first row has the column heads.
    """
    table = [["Datasets", "# Train Posts", "# Test Posts", "# KP / Post", "Train KP ∩ Test KP"]]
    for name, (train, test, overlap) in rows.items():
        posts = train["posts"] + test["posts"]
        per_post = (train["keyphrases"] + test["keyphrases"]) / posts if posts else 0.0
        table.append([name, f"{train['posts']:,}", f"{test['posts']:,}", f"{per_post:.2f}", f"{overlap:.2%}"])
    return table


def _phrase_sets(posts: Iterable[Mapping[str, Any]], name: str, ids: set[str]) -> Sequence[frozenset[str]]:
    """Return the keyphrases of each post, and add the posts' ids to `ids`."""
    sets = []
    for row, post in enumerate(posts):
        if post["id"] in ids:
            raise ValueError(
                f"post {post['id']!r} (row {row} of the {name} posts) has the id of another post, and the new test set could "
                "have both. Give all posts of both sets distinct ids."
            )
        ids.add(post["id"])
        sets.append(frozenset(filter(None, map(fold_keyphrase, post.get("keyphrases") or ()))))
    return sets


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
