"""The papers' dataset table: how many posts and keyphrases, how many of them known from training, how long the texts.

Given   posts of one split or more, and training keyphrases for the overlap.
Gives   a dictionary per split, and the table of them.
Holds   keyphrases are the same if they differ in case and blanks only (not by their stems: that is the metric's way, and
        is used for one figure, the share present in the text); posts are read one at a time.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynkp.data.rows import fold_keyphrase
from dynkp.data.sources import load_posts
from dynkp.mmkp_f1.scoring import stem_phrase


def describe_posts(posts: Iterable[Mapping[str, Any]], train_keyphrases: Iterable[str] | None = None) -> dict[str, Any]:
    """Describe the posts of one split.

    Args:
        posts: rows with `keyphrases`, and of `text`, `images`, `rationale` what there is.
        train_keyphrases: those of the training posts, for the overlap; None where there are none, or the posts are them.

    Returns:
        `posts`, `keyphrases`, `keyphrases_per_post` (mean), `posts_by_keyphrases` (number of keyphrases -> posts),
        `unique_keyphrases`; `text_words` and `rationale_words` (mean, median, min, max over the posts that have one, in
        blank-separated words; None where no post has); `present_share` (of the keyphrases, those whose stems stand in
        their post's stemmed text); `image_share`, `images_per_post`, `rationale_share`, `text_share` (of the posts). With
        training keyphrases also `unique_in_train` and `unique_in_train_share` (of the different keyphrases),
        `unseen_keyphrases` (the others), `posts_with_unseen`, `posts_all_unseen`.

    Example:
        >>> table = describe_posts([{"keyphrases": ["dogs", "nba"], "text": "my dog"}], train_keyphrases=["NBA"])
        >>> table["present_share"], table["unique_in_train_share"], table["posts_with_unseen"]
        (0.5, 0.5, 1)
    """
    seen = None if train_keyphrases is None else {fold_keyphrase(phrase) for phrase in train_keyphrases}
    by_count: Counter[int] = Counter()
    unique: set[str] = set()
    lengths: dict[str, list[int]] = {"text": [], "rationale": []}
    present = images = with_image = with_unseen = all_unseen = 0
    for row in posts:
        phrases = [fold_keyphrase(phrase) for phrase in row.get("keyphrases") or []]
        by_count[len(phrases)] += 1
        unique.update(phrases)
        for column, words in lengths.items():
            if count := len((row.get(column) or "").split()):
                words.append(count)
        text = f" {stem_phrase(row.get('text') or '')} "
        present += sum(f" {stem_phrase(phrase)} " in text for phrase in phrases)
        pictures = len(row.get("images") or [])
        images += pictures
        with_image += pictures > 0
        if seen is not None:
            unseen = [phrase not in seen for phrase in phrases]
            with_unseen += any(unseen)
            all_unseen += bool(unseen) and all(unseen)
    count = by_count.total()
    phrases_in_all = sum(number * times for number, times in by_count.items())
    table: dict[str, Any] = {
        "posts": count,
        "keyphrases": phrases_in_all,
        "keyphrases_per_post": _share(phrases_in_all, count),
        "posts_by_keyphrases": {str(number): by_count[number] for number in sorted(by_count)},
        "unique_keyphrases": len(unique),
        "text_words": _spread(lengths["text"]),
        "rationale_words": _spread(lengths["rationale"]),
        "present_share": _share(present, phrases_in_all),
        "text_share": _share(len(lengths["text"]), count),
        "image_share": _share(with_image, count),
        "images_per_post": _share(images, count),
        "rationale_share": _share(len(lengths["rationale"]), count),
    }
    if seen is not None:
        table |= {
            "unique_in_train": len(unique & seen),
            "unique_in_train_share": _share(len(unique & seen), len(unique)),
            "unseen_keyphrases": len(unique - seen),
            "posts_with_unseen": with_unseen,
            "posts_all_unseen": all_unseen,
        }
    return table


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _spread(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {"mean": statistics.fmean(values), "median": statistics.median(values), "min": min(values), "max": max(values)}


def load_keyphrases(source: str, split: str = "train") -> list[str]:
    """The different keyphrases of a training set.

    Args:
        source: a text file with one keyphrase per line (`.txt`, other than CMKP's `*_src.txt`), or posts in any form that
            `load_posts` reads.
        split: of a folder or Hub dataset.

    Raises:
        ValueError: if there is none.
    """
    if lists_keyphrases(source):
        try:
            lines = Path(source).read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{source}: not UTF-8 ({error.reason}): convert the file") from error
        phrases = [line.strip() for line in lines if line.strip()]
    else:
        posts = load_posts(source, split=split)
        phrases = [phrase for row in posts.select_columns(["keyphrases"]) for phrase in row["keyphrases"] or []]
    if not phrases:
        raise ValueError(f"{source}: there is no keyphrase in it")
    return list(dict.fromkeys(phrases))


def lists_keyphrases(source: str) -> bool:
    """Whether a file is a list of keyphrases rather than posts, by its name."""
    return source.endswith(".txt") and not source.endswith("_src.txt")


# Key of `describe_posts`, or key and key within -> how the table calls it, and whether it is a share.
_LINES: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("posts",), "posts", "{:,}"),
    (("keyphrases",), "keyphrases", "{:,}"),
    (("keyphrases_per_post",), "keyphrases per post", "{:.4f}"),
    (("unique_keyphrases",), "different keyphrases", "{:,}"),
    (("unique_in_train",), "... of them in training", "{:,}"),
    (("unique_in_train_share",), "... share in training", "{:.2%}"),
    (("unseen_keyphrases",), "... not in training", "{:,}"),
    (("posts_with_unseen",), "posts with a keyphrase not in training", "{:,}"),
    (("posts_all_unseen",), "posts with none in training", "{:,}"),
    (("present_share",), "keyphrases present in the text", "{:.2%}"),
    (("text_words", "mean"), "words per text, mean", "{:.2f}"),
    (("text_words", "median"), "... median", "{:g}"),
    (("text_words", "min"), "... shortest", "{:,}"),
    (("text_words", "max"), "... longest", "{:,}"),
    (("text_share",), "posts with text", "{:.2%}"),
    (("image_share",), "posts with image", "{:.2%}"),
    (("images_per_post",), "images per post", "{:.4f}"),
    (("rationale_share",), "posts with rationale", "{:.2%}"),
    (("rationale_words", "mean"), "words per rationale, mean", "{:.2f}"),
)


def statistics_table(splits: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Rows of cells, the first one the heads: a row per figure, a column per split; figures no split has are left out.

    Args:
        splits: name -> what `describe_posts` returned, or part of it.
    """
    rows = [["", *splits]]
    for keys, name, form in _LINES:
        values = [_value(split, keys) for split in splits.values()]
        if any(value is not None for value in values):
            rows.append([name, *("-" if value is None else form.format(value) for value in values)])
    return rows


def _value(split: Mapping[str, Any], keys: Sequence[str]) -> Any:
    value: Any = split
    for key in keys:
        value = None if value is None else value.get(key)
    return value
