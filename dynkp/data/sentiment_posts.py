"""Loading and validation of posts with a sentiment: Twitter-2015/2017 (a row per aspect) and MVSA (a row per post).

Sources are TomBERT's TSV files, MVSA's folders, JSON files with response chains, or any source of `load_posts` with the
columns `label` and, for the sentiment towards an aspect, `aspect`. Posts have `id`, `images`, `text`, `aspect`, `label`,
`rationale` and the source's other columns.

Guarantees: a line that cannot be parsed is an error with file and line; a row that cannot be used is a finding with the post's
id, and is dropped only if this is asked for, and then counted and listed.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from dynkp.data.posts import PostReport, validate_posts
from dynkp.data.reasoning_tasks import SENTIMENTS, ReasoningTask, resolve_reasoning_task
from dynkp.data.rows import LOAD_FINDINGS, normalise_rows
from dynkp.data.sources import file_stem, read_lines, read_rows

logger = logging.getLogger(__name__)

SENTIMENT_FORMATS = ("auto", "tombert", "mvsa", "rows")
# TomBERT's labels.
_POLARITIES = {"0": "negative", "1": "neutral", "2": "positive"}
# The placeholder of the aspect in TomBERT's texts.
_PLACE = "$T$"
_MVSA_LABELS = "labelResultAll.txt"
# Findings that matter only if labels are needed.
_OF_LABELS = ("no_majority", "contradictory_labels", "unknown_vote")


def read_sentiment_posts(
    source: Any,
    *,
    task: ReasoningTask | str = "masc",
    image_dir: str | Path | None = None,
    split: str = "train",
    format: str = "auto",
    need_labels: bool = True,
) -> Dataset:
    """Load posts with a sentiment, without validating them; `load_sentiment_posts` does both.

    Args:
        source: one of

            - a TomBERT file (`.tsv`: index, label 0/1/2, image, text with `$T$` for the aspect, aspect);
            - an MVSA folder, with `labelResultAll.txt` and the texts and images in `data/`, or that file itself;
            - any source of `load_posts` with the columns `text`, `label`, `aspect` (task "masc"), `image` or `image_path`,
              and `rationale` or `cot`; MASC files are read row by row, one per aspect.
        task: "masc" for the sentiment towards an aspect, "msc" for the sentiment of whole posts, or a task of your own.
        image_dir: the folder that image names are relative to; by default MVSA's own `data` folder. Without it posts have no
            image.
        split: the split of a folder saved by `datasets` or of a Hub dataset.
        format: one of `SENTIMENT_FORMATS`, if it cannot be recognised from the source.
        need_labels: whether a post without label is invalid: True for training and scoring, False for prediction.

    Returns:
        All posts, in the source's order, with the column `load_findings` that `validate_posts` reads. MVSA's label follows
        Xu and Mao (2017): the majority of the annotators for text and for image separately; of the two, the one that is not
        neutral. Posts without majority or with opposite labels are invalid (`no_majority`, `contradictory_labels`).

    Raises:
        FileNotFoundError: as in `load_posts`.
        ValueError: as in `load_posts`.
    """
    rows = read_sentiment_rows(source, task=task, split=split, format=format, need_labels=need_labels)
    image_dir = image_dir if image_dir is not None else image_folder(source, format)
    stem = file_stem(source) if isinstance(source, str | Path) else "post"
    return normalise_rows(rows, {"image_dir": image_dir, "stem": stem, "local": True})


def read_sentiment_rows(
    source: Any,
    *,
    task: ReasoningTask | str = "masc",
    split: str = "train",
    format: str = "auto",
    need_labels: bool = True,
) -> Iterator[tuple[str, Any]]:
    """Read rows with a sentiment one at a time, with image names as they are written.

    Args:
        source: as in `read_sentiment_posts`.
        task: as in `read_sentiment_posts`.
        split: as in `read_sentiment_posts`.
        format: as in `read_sentiment_posts`.
        need_labels: as in `read_sentiment_posts`.

    Returns:
        An iterator over pairs of the id that a row gets if it has none, and the row, whose column `load_findings` lists its
        problems.

    Raises:
        FileNotFoundError: as in `load_posts`.
        ValueError: as in `load_posts`.
    """
    if format not in SENTIMENT_FORMATS:
        raise ValueError(f"format={format!r} is not known: use one of {', '.join(SENTIMENT_FORMATS)}")
    task = resolve_reasoning_task(task)
    path = os.fspath(source) if isinstance(source, str | Path) else None
    format = _recognise(path) if format == "auto" else format
    if format == "rows":
        is_json = path is not None and Path(path).suffix.lower() in (".json", ".jsonl", ".ndjson")
        rows: Iterable[tuple[str, Mapping[str, Any]]] = read_rows(source, split=split, format="json" if is_json else "auto")
    elif path is None or not os.path.exists(path):
        raise FileNotFoundError(f"there is no file or folder {source!r}")
    else:
        rows = _read_tombert(path, file_stem(path)) if format == "tombert" else _read_mvsa(path)
    return ((fallback_id, _prepared(row, task, need_labels)) for fallback_id, row in rows)


def image_folder(source: Any, format: str = "auto") -> Path | None:
    """Return the image folder of a source whose layout includes one (MVSA), else None.

    Args:
        source: as in `read_sentiment_posts`.
        format: as in `read_sentiment_posts`.
    """
    path = os.fspath(source) if isinstance(source, str | Path) else None
    is_mvsa = path is not None and (format == "mvsa" or (format == "auto" and _recognise(path) == "mvsa"))
    return _mvsa_folder(str(path)) if is_mvsa else None


def load_sentiment_posts(
    source: Any,
    *,
    task: ReasoningTask | str = "masc",
    on_invalid: str = "error",
    report_file: str | Path | None = None,
    check_images: bool = True,
    use_images: bool = True,
    progress: bool = True,
    **options: Any,
) -> tuple[Dataset, PostReport]:
    """Load and validate posts with a sentiment.

    Args:
        source: as in `read_sentiment_posts`.
        task: as in `read_sentiment_posts`.
        on_invalid: as in `validate_posts`.
        report_file: as in `validate_posts`.
        check_images: as in `validate_posts`.
        use_images: as in `validate_posts`.
        progress: as in `validate_posts`.
        **options: as in `read_sentiment_posts`.

    Returns:
        The valid posts, in the source's order, and the report.

    Raises:
        FileNotFoundError: as in `load_posts`.
        ValueError: as in `load_posts`.
        InvalidPostsError: as in `validate_posts`.

    Example:
        >>> rows = [{"id": "1", "text": "Go Cubs", "aspect": "Cubs", "label": "positive"}]
        >>> posts, report = load_sentiment_posts(rows, progress=False)
        >>> posts[0]["label"], report.total
        ('positive', 1)
    """
    posts, report = validate_posts(
        read_sentiment_posts(source, task=task, **options),
        need_keyphrases=False,
        on_invalid=on_invalid,
        report_file=report_file,
        check_images=check_images,
        use_images=use_images,
        progress=progress,
    )
    posts = posts.remove_columns([name for name in ("keyphrases",) if not any(posts[name])])
    _announce_rationales(posts, resolve_reasoning_task(task))
    return posts, report


def _recognise(path: str | None) -> str:
    if path is None:
        return "rows"
    if path.endswith(_MVSA_LABELS) or os.path.isfile(os.path.join(path, _MVSA_LABELS)):
        return "mvsa"
    return "tombert" if path.lower().endswith(".tsv") else "rows"


def _prepared(row: Any, task: ReasoningTask, need_labels: bool) -> Any:
    """Return the row with a post's column names, and with findings about its label and aspect."""
    if not isinstance(row, Mapping):
        return row  # refused, with its number, when rows are normalised
    row = dict(row)
    for other, name in (("cot", "rationale"), ("image_path", "image")):
        if other in row and row.get(name) is None:
            row[name] = row.pop(other)
    findings = [item for item in row.get(LOAD_FINDINGS) or [] if need_labels or item["code"] not in _OF_LABELS]

    def report(code: str, message: str) -> None:
        findings.append({"code": code, "message": message})

    label = row.get("label")
    if isinstance(label, str):
        label = row["label"] = label.strip().lower()
    # A label that could not be determined has its finding already.
    if task.labels and label not in task.labels and not (label is None and (findings or not need_labels)):
        code = "no_label" if label in (None, "") else "unknown_label"
        report(code, f"the label is {label!r:.80}, and must be one of {', '.join(task.labels)}")
        row["label"] = None
    aspect = row.get("aspect")
    if task.takes_aspect and not (isinstance(aspect, str) and aspect.strip()):
        report("no_aspect", f"the aspect is {aspect!r:.80}, and task {task.name!r} needs one: a word or phrase of the text")
    row["aspect"] = aspect if isinstance(aspect, str) else None
    row.setdefault("label", None)
    row[LOAD_FINDINGS] = findings
    return row


def _announce_rationales(posts: Dataset, task: ReasoningTask) -> None:
    """Log how many rationales there are, and how many of them predict another label than the post's."""
    pairs = zip(posts["rationale"], posts["label"], strict=True)
    parsed = [(task.parse(rationale).prediction, label) for rationale, label in pairs if rationale and label]
    differing = sum(prediction != label for prediction, label in parsed)
    if differing:
        logger.info(
            "%d of %d rationales predict another label than their post's, or none; the targets made from them end with the "
            "post's label.",
            differing,
            len(parsed),
        )


# --- TomBERT ---


def _read_tombert(path: str, stem: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, (where, line) in enumerate(read_lines(path)):
        fields = line.split("\t")
        if (number == 0 and fields[0] == "index") or not line.strip():
            continue
        if len(fields) != 5:
            columns = "index, label, image, text, aspect"
            raise ValueError(f"{where}: must have 5 columns ({columns}), got {len(fields)}: {line[:80]!r}")
        index, label, image, text, aspect = fields
        findings = []
        if _PLACE not in text:
            message = f"the text has no {_PLACE}, the placeholder of the aspect {aspect!r:.80}: {text[:80]!r}"
            findings.append({"code": "no_place_of_aspect", "message": message})
        row: dict[str, Any] = {
            "id": f"{stem}-{index}",
            "text": text.replace(_PLACE, aspect),
            "aspect": aspect,
            "label": _POLARITIES.get(label.strip(), label),
            "image": image.strip() or None,
            "image_id": Path(image.strip()).stem,
            LOAD_FINDINGS: findings,
        }
        yield row["id"], row


# --- MVSA ---


def _mvsa_folder(path: str) -> Path:
    """Return the folder of texts and images."""
    folder = Path(path) if os.path.isdir(path) else Path(path).parent
    return folder / "data" if (folder / "data").is_dir() else folder


def _read_mvsa(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    labels = os.path.join(path, _MVSA_LABELS) if os.path.isdir(path) else path
    folder = _mvsa_folder(path)
    undecodable = 0
    for number, (where, line) in enumerate(read_lines(labels)):
        if not line.strip():
            continue
        post_id, *annotations = line.split()
        if number == 0 and post_id.lower() == "id":
            continue
        pairs = [tuple(annotation.lower().split(",")) for annotation in annotations]
        if not pairs or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"{where}: must be an id and 'text,image' labels, one pair per annotator, got {line[:80]!r}")
        label, findings = _mvsa_label(pairs)
        text = ""
        try:
            text, is_utf8 = _decoded(Path(folder, f"{post_id}.txt").read_bytes())
            undecodable += not is_utf8
        except FileNotFoundError:
            findings.append({"code": "no_text_file", "message": f"there is no file '{post_id}.txt' in {folder}"})
        row = {
            "id": post_id,
            "text": text.strip(),
            "label": label,
            "image": f"{post_id}.jpg",
            "annotations": [",".join(pair) for pair in pairs],
            LOAD_FINDINGS: findings,
        }
        yield post_id, row
    if undecodable:
        logger.warning("%s: %d texts are not UTF-8; they were read as Windows-1252.", folder, undecodable)


def _mvsa_label(pairs: list[tuple[str, ...]]) -> tuple[str | None, list[dict[str, str]]]:
    """Return the post's label from its annotators' (text, image) pairs, or None and the findings."""
    if unknown := sorted({vote for pair in pairs for vote in pair} - set(SENTIMENTS)):
        return None, [{"code": "unknown_vote", "message": f"an annotator's label is none of the three: {', '.join(unknown)}"}]
    modalities = []
    for name, votes in zip(("text", "image"), zip(*pairs, strict=True), strict=True):
        label, count = Counter(votes).most_common(1)[0]
        if 2 * count <= len(votes):
            return None, [{"code": "no_majority", "message": f"the annotators do not agree on the {name}: {', '.join(votes)}"}]
        modalities.append(label)
    telling = {label for label in modalities if label != "neutral"}
    if len(telling) > 1:
        message = f"the text is {modalities[0]}, the image {modalities[1]}"
        return None, [{"code": "contradictory_labels", "message": message}]
    return next(iter(telling), "neutral"), []


def _decoded(data: bytes) -> tuple[str, bool]:
    try:
        return data.decode("utf-8-sig"), True
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace"), False
