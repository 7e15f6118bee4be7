"""Validation of posts: find invalid posts before training starts.

The row format and its normalisation are in `dynkp.data.rows`, images in `dynkp.data.images`; `open_image`, `ImageError` and
`normalise_posts` can be imported from here too.

Guarantees: every finding names its post; posts are dropped only if this is asked for, and then they are counted and listed.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from tqdm import tqdm

from dynkp.data.images import ImageError, open_image
from dynkp.data.images import check_images as find_image_errors
from dynkp.data.rows import (
    CONTENT,
    CONVERSATION,
    IDENTITY,
    IMAGE_CODES,
    LOAD_FINDINGS,
    Posts,
    fold_keyphrase,
    normalise_posts,
)
from dynkp.data.sources import load_posts
from dynkp.data.tasks import keyphrase_problem
from dynkp.files.json_lines import json_line, write_json_lines

__all__ = [
    "Finding",
    "ImageError",
    "InvalidPostsError",
    "PostReport",
    "load_valid_posts",
    "normalise_posts",
    "open_image",
    "validate_posts",
]

logger = logging.getLogger(__name__)

_REMEDY = "Correct them, or drop them with on_invalid='skip' (report_file= then lists every one)."
_READ = {*IDENTITY, *CONTENT, *CONVERSATION, LOAD_FINDINGS}


@dataclass(frozen=True)
class Finding:
    """One problem that validation found in a post.

    Attributes:
        id: the post's id.
        index: position of the post, from 0 (in a stream read by several workers: from 0 in each worker).
        code: the problem, one of the codes listed in `docs/data.md`.
        message: the problem in words.
    """

    id: str
    index: int
    code: str
    message: str


@dataclass
class PostReport:
    """The result of `validate_posts`. For a stream it grows while the stream is read, and is reset at the start of each pass.

    Attributes:
        total: number of posts read.
        dropped: number of posts dropped.
        conversations: number of rows in TRL's prompt-completion format; they do not count as posts without text,
            keyphrases or rationale.
        without_image: number of posts without image.
        without_text: number of posts without text.
        without_keyphrases: number of posts without keyphrases.
        without_rationale: number of posts without rationale.
        findings: all findings, in the order of the posts.
    """

    total: int = 0
    dropped: int = 0
    conversations: int = 0
    without_image: int = 0
    without_text: int = 0
    without_keyphrases: int = 0
    without_rationale: int = 0
    findings: list[Finding] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Return the number of findings per code, the most frequent first."""
        return dict(Counter(finding.code for finding in self.findings).most_common())

    def summary(self) -> str:
        """Return the counts in one sentence."""
        without = (
            f"{self.without_image} without image, {self.without_text} without text, {self.without_keyphrases} without "
            f"keyphrases, {self.without_rationale} without rationale"
        )
        found = ", ".join(f"{code} {count}" for code, count in self.counts().items()) or "no findings"
        return f"{self.total} posts ({without}): {found}"

    def write_jsonl(self, path: str | Path) -> None:
        """Write all findings as JSON Lines with `id`, `index`, `code` and `message`.

        Args:
            path: the file; replaced if it exists.
        """
        write_json_lines(path, map(asdict, self.findings))


class InvalidPostsError(ValueError):
    """Posts that cannot be trained on; the message names the first of them.

    Args:
        message: the message.
        report: the whole `PostReport`.

    Attributes:
        report: the whole `PostReport`; None if the error comes from another process.
    """

    # Only one required argument: `DataLoader` rebuilds a worker's exception from its message.
    def __init__(self, message: str, report: PostReport | None = None) -> None:
        super().__init__(message)
        self.report = report

    @classmethod
    def of(cls, report: PostReport, columns: Iterable[str] = (), remedy: str = _REMEDY) -> InvalidPostsError:
        """Build the error from a report.

        Args:
            report: a report with findings.
            columns: names of the posts' columns. If no post has keyphrases, the message lists those that were not read.
            remedy: the last sentence of the message.
        """
        shown = [f"  post {finding.id!r}: {finding.code}: {finding.message}" for finding in report.findings[:10]]
        if len(report.findings) > len(shown):
            shown.append(f"  ... and {len(report.findings) - len(shown)} more")
        needed = any(finding.code == "no_keyphrases" for finding in report.findings)
        if needed and report.without_keyphrases == report.total and (unread := set(columns) - _READ):
            shown.append(f"Keyphrases are read from the column 'keyphrases'; not read: {', '.join(sorted(unread))}.")
        invalid = len({finding.index for finding in report.findings})
        return cls(
            f"{invalid} invalid posts. Read: {report.summary()}\n" + "\n".join(shown) + f"\n{remedy}",
            report,
        )


class _Validator:
    """Checks one post after another, in order."""

    def __init__(self, separator: str, need_keyphrases: bool, unique_ids: bool, use_images: bool) -> None:
        self.separator = separator
        self.use_images = use_images
        self.need_keyphrases = need_keyphrases
        self.unique_ids = unique_ids
        self.report = PostReport()
        self.first_seen: dict[int, int] = {}  # hash of the id -> index; hashes, since there may be millions

    def __call__(self, post: Mapping[str, Any], index: int, broken: Iterable[ImageError]) -> list[Finding]:
        """Count a post, and return its findings; `broken` are the errors of its images."""
        report = self.report
        found = [
            (item["code"], item["message"])
            for item in post.get(LOAD_FINDINGS) or ()
            if self.use_images or item["code"] not in IMAGE_CODES
        ]
        found += [(error.code, str(error)) for error in broken]
        first = self.first_seen.setdefault(hash(post["id"]), index)
        if self.unique_ids and first != index:
            found.append(("repeated_id", f"the id is also that of row {first} (this is row {index})"))
        report.total += 1
        report.without_image += not post["images"]
        if post.get("prompt") is not None:
            report.conversations += 1
            if self.need_keyphrases and not post["completion"]:
                found.append(("no_completion", "the completion is empty, so there is nothing to train on"))
        else:
            found += self._content(post, found)
        findings = [Finding(post["id"], index, code, message) for code, message in found]
        report.findings += findings
        return findings

    def _content(self, post: Mapping[str, Any], found: Sequence[Any]) -> Iterable[tuple[str, str]]:
        text, keyphrases = post.get("text") or "", post.get("keyphrases") or []
        self.report.without_text += not text.strip()
        self.report.without_keyphrases += not keyphrases
        self.report.without_rationale += not (post.get("rationale") or "").strip()
        # A value of the wrong type was read as empty; that is one finding, not two.
        if not text.strip() and not post["images"] and not post.get(LOAD_FINDINGS):
            yield "empty_post", "the post has neither text nor image"
        explained = any(code in ("wrong_type", "bad_conversation") for code, _ in found)
        if not keyphrases and self.need_keyphrases and not explained:
            yield "no_keyphrases", "the post has no keyphrases, and training needs at least one"
        seen: dict[str, str] = {}
        for phrase in keyphrases:
            folded = fold_keyphrase(phrase)
            if not phrase:
                yield "empty_keyphrase", "a keyphrase is empty, or only whitespace and '#'"
            elif folded in seen:
                yield "repeated_keyphrase", f"the keyphrase {phrase!r} repeats {seen[folded]!r}"
            elif problem := keyphrase_problem(phrase, self.separator):
                code = "separator" if self.separator.strip() in phrase else "tag"
                yield f"{code}_in_keyphrase", f"the keyphrase {phrase!r:.120} {problem}"
            seen.setdefault(folded, phrase)


def validate_posts(
    posts: Any,
    *,
    separator: str = "; ",
    on_invalid: str = "error",
    report_file: str | Path | None = None,
    check_images: bool = True,
    image_dir: str | Path | None = None,
    need_keyphrases: bool = True,
    unique_ids: bool = True,
    use_images: bool = True,
    refuses: Callable[[tuple[int, int]], str | None] | None = None,
    remedy: str = _REMEDY,
    progress: bool = True,
) -> tuple[Posts, PostReport]:
    """Validate posts before training, and report every finding with the id of its post.

    A stream is validated while it is read, post by post: there are no findings before, and the report grows during reading
    (in the process that reads: with `DataLoader` workers the report of this process stays empty, the report file does not).

    Args:
        posts: what `load_posts` returns, or any dataset or list of rows that it takes.
        separator: the string between keyphrases in the targets (the task's).
        on_invalid: `"error"`, or `"skip"`: drop invalid posts and log their number.
        report_file: a JSON Lines file for all findings; replaced if it exists.
        check_images: whether to decode the images, in several threads. Image names are always checked.
        use_images: whether images will be used; otherwise a post is not invalid because of its images.
        refuses: returns why the model's processor refuses images of a size (width, height) in pixels, or None if it takes
            them (`dynkp.batches.image_sizes.SizeCheck`). Used with `check_images` only.
        image_dir: as in `load_posts`.
        need_keyphrases: whether a post without keyphrases (or a row with an empty completion) is invalid: True for
            training and scoring, False for prediction.
        unique_ids: whether repeated ids are invalid. False for a mixture (`mix_posts`), which repeats posts.
        remedy: the last sentence of the error's message.
        progress: whether to show a progress bar.

    Returns:
        The valid posts, in their order, and the report.

    Raises:
        InvalidPostsError: a `ValueError` with the counts, the first ten findings and the remedy, if a post is invalid
            and `on_invalid="error"` (a stream raises it at that post); or if there is no valid post.
        ValueError: if `on_invalid` is neither `"error"` nor `"skip"`.

    Example:
        >>> posts, report = validate_posts([{"text": "my dog", "keyphrases": ["beagles"]}], progress=False)
        >>> report.summary()
        '1 posts (1 without image, 0 without text, 0 without keyphrases, 1 without rationale): no findings'
    """
    if on_invalid not in ("error", "skip"):
        raise ValueError(f"on_invalid={on_invalid!r} is not known: use 'error' or 'skip'")
    posts = normalise_posts(posts, image_dir=image_dir)
    validator = _Validator(separator, need_keyphrases, unique_ids, use_images)
    check_images = check_images and use_images
    report = validator.report
    if isinstance(posts, IterableDataset):
        if report_file is not None:
            write_json_lines(report_file, ())
        check = _StreamCheck(validator, on_invalid, report_file, check_images, refuses)
        checked = posts.filter(check, with_indices=True)
        return checked.remove_columns(LOAD_FINDINGS) if use_images else checked, report

    valid = _check_all(posts, validator, check_images, refuses, progress)
    report.dropped = report.total - len(valid)
    if report_file is not None:
        report.write_jsonl(report_file)
    if report.dropped and (on_invalid == "error" or not valid):
        raise InvalidPostsError.of(report, posts.column_names, remedy)
    if report.dropped:
        where = f"; they are listed in {report_file}" if report_file is not None else ""
        logger.warning("%d of %s%s. Dropped.", report.dropped, report.summary(), where)
        posts = posts.select(valid)
    # Findings about images stay for a later validation, by a reader that uses them.
    if LOAD_FINDINGS in posts.column_names and use_images:
        posts = posts.remove_columns(LOAD_FINDINGS)
    return posts, report


def _check_all(posts: Dataset, validator: _Validator, check_images: bool, refuses: Any, progress: bool) -> list[int]:
    """Return the indices of the valid posts."""
    columns = [*IDENTITY, *CONTENT, *CONVERSATION, LOAD_FINDINGS]
    posts = posts.select_columns([name for name in columns if name in posts.column_names])
    valid: list[int] = []
    with (
        ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=len(posts), desc="Checking posts", unit="post", disable=not progress) as bar,
    ):
        index = 0
        for batch in posts.iter(batch_size=256):
            rows = [dict(zip(batch, cells, strict=True)) for cells in zip(*batch.values(), strict=True)]
            # Pillow releases the interpreter lock while it reads and decodes.
            checks = [
                pool.submit(find_image_errors, row["images"], refuses) if check_images and row["images"] else None
                for row in rows
            ]
            for row, pending in zip(rows, checks, strict=True):
                if not validator(row, index, [] if pending is None else pending.result()):
                    valid.append(index)
                index += 1
            bar.update(len(rows))
    return valid


class _StreamCheck:
    """Decides whether a post is valid; the function for a stream's `filter`."""

    def __init__(
        self,
        validator: _Validator,
        on_invalid: str,
        report_file: str | Path | None,
        check_images: bool,
        refuses: Callable[[tuple[int, int]], str | None] | None,
    ) -> None:
        self.validator = validator
        self.on_invalid = on_invalid
        self.report_file = report_file
        self.check_images = check_images
        self.refuses = refuses
        self.written: set[Finding] = set()

    def __call__(self, post: Mapping[str, Any], index: int) -> bool:
        report = self.validator.report
        if index == 0:  # a new pass, with the same ids
            self.validator.first_seen.clear()
            vars(report).update(vars(PostReport()))
        broken = find_image_errors(post["images"], self.refuses) if self.check_images else []
        findings = self.validator(post, index, broken)
        if not findings:
            return True
        if self.report_file is not None and (new := set(findings) - self.written):
            with open(self.report_file, "a", encoding="utf-8") as file:
                file.writelines(json_line(asdict(finding)) for finding in findings if finding in new)
            self.written |= new
        if self.on_invalid == "error":
            raise InvalidPostsError.of(report)
        if not report.dropped:
            logger.warning("dropping invalid posts of the stream, first %r: %s", post["id"], findings[0].message)
        report.dropped += 1
        return False


def load_valid_posts(source: str, *, split: str = "train", image_dir: str | Path | None = None) -> Posts:
    """Load posts whose content is read without training, as for scoring and statistics, and check it as training does.

    Args:
        source: as in `load_posts`.
        split: as in `load_posts`.
        image_dir: the folder that image names are relative to; the images are then checked. Without it they are not.

    Returns:
        All posts of the source. Repeated ids are logged.

    Raises:
        FileNotFoundError: as in `load_posts`.
        InvalidPostsError: as in `validate_posts`, if a post is invalid.
        ValueError: if there are no posts, or none of them has keyphrases.

    Example:
        >>> import json, pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp(), "posts.jsonl")
        >>> _ = file.write_text(json.dumps({"id": "1", "text": "my dog", "keyphrases": ["beagles"]}))
        >>> load_valid_posts(str(file))["keyphrases"][:]
        [['beagles']]
    """
    # Without a folder of images, names alone count, so any folder will do to look them up in.
    beside = Path(source).parent if Path(source).is_file() else None
    posts = load_posts(source, split=split, image_dir=beside if image_dir is None else image_dir)
    columns = posts.column_names or []
    if "keyphrases" not in columns:
        raise ValueError(f"{source}: the posts have no column 'keyphrases'; the columns are {', '.join(columns)}")
    try:
        posts, report = validate_posts(
            posts,
            need_keyphrases=False,
            unique_ids=False,
            use_images=image_dir is not None,
            remedy="Correct them.",
            progress=False,
        )
    except InvalidPostsError as error:
        raise InvalidPostsError(f"{source}: {error}", error.report) from error
    if not report.total:
        raise ValueError(f"{source}: there are no posts in it")
    if report.without_keyphrases == report.total:
        unread = ", ".join(sorted(set(columns) - _READ)) or "none"
        raise ValueError(
            f"{source}: none of the {report.total:,} posts has keyphrases. They are read from the column 'keyphrases'; not "
            f"read: {unread}."
        )
    ids = Counter(posts["id"][:])
    if repeated := [name for name, times in ids.items() if times > 1]:
        logger.warning("%s: %d ids are of several posts, first %r", source, len(repeated), repeated[0])
    return posts
