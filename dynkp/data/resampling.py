"""Resampling: fewer of the test set's keyphrases known from training, as MMKP-V2 was made (Dynamic CoT paper, §4.1).

Given   training and test posts, and the share of the test set's keyphrases that training may know.
Gives   which posts stay in training, which of them move to the test set, and which test posts are dropped.
Holds   every training post stays or moves; no post that stays has a keyphrase that only training had; posts are dropped
        until the overlap is at the target and no further, in an order that depends on the seed and the phrases alone.

The paper says: "1. Transferring all training-exclusive keyphrase samples to the test set. 2. Removing test samples
containing keyphrases observed during training", and reports an overlap of 44.92 %. Taken at its word step 2 leaves no
overlap; so posts are dropped phrase by phrase, in an order of our own, until the overlap is small enough. MMKP-V2 itself
cannot be had so.
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
    """What goes where, as rows (from 0) of the sets that were given.

    Attributes:
        train: the training posts that stay.
        test: the test posts that stay.
        moved: the training posts that move to the test set, those dropped from there included.
        moved_kept: those of them that stay there. The new test set is `test` of the old one, then these of training.
        exclusive: the keyphrases that only training had.
        dropped: the keyphrases whose posts were dropped from the test set, in that order.
        overlap_before, overlap_moved, overlap: of the test set's different keyphrases, the share that training has: at
            the start, after posts were moved, at the end. 0 for a test set without keyphrases.
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
    """Move the posts with training-only keyphrases to the test set, then drop test posts until the overlap is small.

    Two keyphrases are the same if they differ in case and blanks only. With K(.) the different keyphrases of a set:

    1. X = K(train) \\ K(test). Training posts with a phrase in X move to the test set, behind its own posts.
    2. The phrases that are both in what is left of training and in the test set are taken in the order of the SHA-256 of
       `f"{seed}\\t{phrase}"`. While the overlap |K(test) ∩ K(train)| / |K(test)| is above the target, every test post
       with the phrase is dropped, unless none has it any more.

    Posts without keyphrases stay where they are.

    Args:
        train, test: rows with `id` and `keyphrases`, read once; only these are held.
        target_overlap: in [0, 1]. 0 keeps only posts without any keyphrase of training.
        seed: of the order of step 2.

    Returns:
        The rows that go where.

    Raises:
        ValueError: if the target is not in [0, 1], or naming the post, if an id comes twice.

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
    moved = [row for row, phrases in enumerate(train_phrases) if not exclusive.isdisjoint(phrases)]
    moved_rows = set(moved)
    stay = [row for row in range(len(train_phrases)) if row not in moved_rows]
    observed = set().union(*(train_phrases[row] for row in stay))

    merged = [*test_phrases, *(train_phrases[row] for row in moved)]
    posts_of: dict[str, list[int]] = {}
    for post, phrases in enumerate(merged):
        for phrase in phrases:
            posts_of.setdefault(phrase, []).append(post)
    left = Counter({phrase: len(posts) for phrase, posts in posts_of.items()})
    kept = [True] * len(merged)
    different, shared = len(posts_of), sum(phrase in observed for phrase in posts_of)
    overlap_moved = _share(shared, different)
    dropped = []

    def place_in_order(phrase: str) -> str:
        return hashlib.sha256(f"{seed}\t{phrase}".encode()).hexdigest()

    for phrase in sorted(observed & posts_of.keys(), key=place_in_order):
        if _share(shared, different) <= target_overlap:
            break
        if not left[phrase]:
            continue
        dropped.append(phrase)
        for post in posts_of[phrase]:
            if kept[post]:
                kept[post] = False
                left.subtract(merged[post])
                gone = [other for other in merged[post] if not left[other]]
                different -= len(gone)
                shared -= sum(other in observed for other in gone)
    return Resampling(
        train=stay,
        test=[row for row in range(len(test_phrases)) if kept[row]],
        moved=moved,
        moved_kept=[row for place, row in enumerate(moved, start=len(test_phrases)) if kept[place]],
        exclusive=exclusive,
        dropped=dropped,
        overlap_before=_share(len(known & set().union(*train_phrases)), len(known)),
        overlap_moved=overlap_moved,
        overlap=_share(shared, different),
    )


def overlap_table(rows: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any], float]]) -> list[list[str]]:
    """Rows of cells as in Table 2 of the Dynamic CoT paper, the first one the heads.

    Args:
        rows: name -> what `describe_posts` says of the training and of the test posts, and the overlap as a share.
    """
    table = [["Datasets", "# Train Posts", "# Test Posts", "# KP / Post", "Train KP ∩ Test KP"]]
    for name, (train, test, overlap) in rows.items():
        posts = train["posts"] + test["posts"]
        per_post = (train["keyphrases"] + test["keyphrases"]) / posts if posts else 0.0
        table.append([name, f"{train['posts']:,}", f"{test['posts']:,}", f"{per_post:.2f}", f"{overlap:.2%}"])
    return table


def _phrase_sets(posts: Iterable[Mapping[str, Any]], name: str, ids: set[str]) -> Sequence[frozenset[str]]:
    """The keyphrases of each post; ids are added to those known."""
    sets = []
    for row, post in enumerate(posts):
        if post["id"] in ids:
            raise ValueError(
                f"post {post['id']!r} (row {row} of the {name} posts) has an id that another post has: the new test set would "
                "hold both. Give all posts of both sets ids that differ."
            )
        ids.add(post["id"])
        sets.append(frozenset(filter(None, map(fold_keyphrase, post.get("keyphrases") or ()))))
    return sets


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
