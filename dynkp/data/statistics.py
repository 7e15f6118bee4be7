"""Statistics of datasets, as in the papers' tables: numbers of posts and keyphrases, overlap with training, text lengths.

Two keyphrases are the same if they differ in case and whitespace only. (The metric compares stems instead; here, stems are
used for one figure, the share of keyphrases present in the text.) Posts are read one at a time.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynkp.data.posts import load_valid_posts
from dynkp.data.rows import fold_keyphrase
from dynkp.mmkp_f1.answers import normalise_phrase
from dynkp.mmkp_f1.scoring import stem_phrase


def split_statistics(posts: Iterable[Mapping[str, Any]], train_keyphrases: Iterable[str] | None = None) -> dict[str, Any]:
    """Return the statistics of the posts of one split.

    Args:
        posts: posts with `keyphrases` and, if they have them, `text`, `images` and `rationale`.
        train_keyphrases: keyphrases of the training posts, for the overlap; None to leave the overlap out.

    Returns:
        A `dict` with
        - `posts`, `keyphrases`: their numbers;
        - `keyphrases_per_post`: the mean;
        - `posts_by_keyphrases`: number of posts per number of keyphrases;
        - `unique_keyphrases`: number of distinct keyphrases;
        - `text_words`, `rationale_words`: mean, median, min and max over the posts that have one, in whitespace-separated
          words; None if no post has one;
        - `present_share`: the share of keyphrases whose stems occur in the stemmed text of their post;
        - `text_share`, `image_share`, `rationale_share`: the shares of posts that have one; `images_per_post`: the mean;
        - with training keyphrases, `unique_in_train` and `unique_in_train_share`: number and share of the distinct keyphrases
          that occur in training; `unseen_keyphrases`: number of the others; `posts_with_unseen`, `posts_all_unseen`: number
          of posts with at least one such keyphrase, and with no other ones.

    Example:
        >>> statistics = split_statistics([{"keyphrases": ["dogs", "nba"], "text": "my dog"}], train_keyphrases=["NBA"])
        >>> statistics["present_share"], statistics["unique_in_train_share"], statistics["posts_with_unseen"]
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
        num_images = len(row.get("images") or [])
        images += num_images
        with_image += num_images > 0
        if seen is not None:
            unseen = [phrase not in seen for phrase in phrases]
            with_unseen += any(unseen)
            all_unseen += bool(unseen) and all(unseen)
    count = by_count.total()
    num_keyphrases = sum(number * times for number, times in by_count.items())
    result: dict[str, Any] = {
        "posts": count,
        "keyphrases": num_keyphrases,
        "keyphrases_per_post": _share(num_keyphrases, count),
        "posts_by_keyphrases": {str(number): by_count[number] for number in sorted(by_count)},
        "unique_keyphrases": len(unique),
        "text_words": _spread(lengths["text"]),
        "rationale_words": _spread(lengths["rationale"]),
        "present_share": _share(present, num_keyphrases),
        "text_share": _share(len(lengths["text"]), count),
        "image_share": _share(with_image, count),
        "images_per_post": _share(images, count),
        "rationale_share": _share(len(lengths["rationale"]), count),
    }
    if seen is not None:
        result |= {
            "unique_in_train": len(unique & seen),
            "unique_in_train_share": _share(len(unique & seen), len(unique)),
            "unseen_keyphrases": len(unique - seen),
            "posts_with_unseen": with_unseen,
            "posts_all_unseen": all_unseen,
        }
    return result


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _spread(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {"mean": statistics.fmean(values), "median": statistics.median(values), "min": min(values), "max": max(values)}


def load_keyphrases(source: str, split: str = "train") -> list[str]:
    """Load the distinct keyphrases of a training set.

    Args:
        source: a text file with one keyphrase per line, or CMKP's `k1;k2` (`.txt`, except CMKP's `*_src.txt`), or posts in
            any format that `load_posts` reads.
        split: the split of a folder or Hub dataset.

    Returns:
        The keyphrases, without "#" around them, in the order of their first occurrences.

    Raises:
        InvalidPostsError: as in `load_valid_posts`.
        ValueError: if there is no keyphrase, or a text file is not UTF-8 or is not a list of keyphrases.
    """
    if lists_keyphrases(source):
        try:
            lines = Path(source).read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{source}: not UTF-8 ({error.reason}): convert the file") from error
        if any("<sep>" in line for line in lines):
            raise ValueError(f"{source}: lines with '<sep>' are CMKP's posts, not keyphrases: name the file X_src.txt")
        # No keyphrase has ";": these are CMKP's lines of one post each (X_trg.txt).
        phrases = [phrase for line in lines for piece in line.split(";") if (phrase := normalise_phrase(piece))]
    else:
        posts = load_valid_posts(source, split=split)
        phrases = [phrase for row in posts.select_columns(["keyphrases"]) for phrase in row["keyphrases"] or []]
    if not phrases:
        raise ValueError(f"{source} has no keyphrases")
    return list(dict.fromkeys(phrases))


def repeated_posts(posts: Iterable[Mapping[str, Any]], train_posts: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the ids of posts that repeat a training post: the same text, apart from whitespace, and the same images.

    Args:
        posts: posts of a test set, with `id`, `text` and `images`.
        train_posts: training posts, with `text` and `images`.

    Example:
        >>> train = [{"id": "1", "text": "my dog", "images": []}]
        >>> repeated_posts([{"id": "9", "text": "my  dog", "images": []}, {"id": "8", "text": "a cat", "images": []}], train)
        ['9']
    """
    known = set(map(_content_hash, train_posts))
    return [post["id"] for post in posts if _content_hash(post) in known]


def _content_hash(post: Mapping[str, Any]) -> int:
    text = " ".join((post.get("text") or "").split())
    images = tuple(
        image["bytes"] if image["bytes"] is not None else Path(image["path"]).name for image in post.get("images") or ()
    )
    return hash((text, images)) if text or images else hash(post["id"])


def lists_keyphrases(source: str) -> bool:
    """Return whether a file is a list of keyphrases and not of posts, judging by its name.

    Args:
        source: name of the file.

    Example:
        >>> lists_keyphrases("keyphrases.txt"), lists_keyphrases("train_src.txt")
        (True, False)
    """
    return source.endswith(".txt") and not source.endswith("_src.txt")


# Key of `split_statistics` (with the key inside it), the name in the table, and the format of the number.
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
    """Return the table of statistics: a row per figure, a column per split.

    Args:
        splits: per split's name, what `split_statistics` returned, or part of it.

    Returns:
        Rows of cells; the first row has the column heads. Figures that no split has are omitted.
    """
    rows = [["", *splits]]
    for keys, name, number_format in _LINES:
        values = [_value(split, keys) for split in splits.values()]
        if any(value is not None for value in values):
            rows.append([name, *("-" if value is None else number_format.format(value) for value in values)])
    return rows


def _value(split: Mapping[str, Any], keys: Sequence[str]) -> Any:
    value: Any = split
    for key in keys:
        value = None if value is None else value.get(key)
    return value
