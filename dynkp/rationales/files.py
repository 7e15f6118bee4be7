"""The files of a run: posts with rationales, posts without, and a report.

Given   posts, and the journal of the teacher's answers.
Gives   `R.jsonl`, `R.errors.jsonl`, `R.report.json`, and optionally `R.preview.html`.
Holds   every post is in exactly one of the first two files, in the posts' order, unless the run ended before it (the post is
        open); files are written atomically; memory grows by 150 bytes per post.

A row of `R.jsonl` is the post's own row with `rationale`, `rationale_model`, `rationale_stage` and `reasoning_content`. A row
of `R.errors.jsonl` has the post's number (`index`) and `id`, the `reason` (`invalid_post`, `request_failed`, or the name of
a filter), an `error` message and the rejected `rationale`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dynkp.chat.journal import AnswerJournal
from dynkp.chat.post_stream import PostStream, SourcePost
from dynkp.chat.settings import RunPaths
from dynkp.files.atomic import atomic_files
from dynkp.files.json_files import read_json, write_json
from dynkp.files.json_lines import json_line
from dynkp.rationales.filters import FILTERS, RationaleFilter
from dynkp.rationales.near_copies import NearCopies
from dynkp.report.preview import PreviewPost, write_preview

logger = logging.getLogger(__name__)

INVALID, FAILED = "invalid_post", "request_failed"
_COLUMNS = ("rationale", "rationale_model", "rationale_stage", "reasoning_content")


def write_rationales(
    posts: PostStream,
    key_of: Callable[[int], bytes | None],
    journal: AnswerJournal,
    paths: RunPaths,
    rationale_filter: RationaleFilter,
    *,
    max_similarity: float = 0.8,
    keep_all: bool = False,
    preview: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a run's files.

    Args:
        posts: The posts.
        key_of: Post's index in `posts` -> key of its last answer in the journal; None if the post is open.
        journal: The answers.
        paths: The files to write.
        rationale_filter: The filters.
        max_similarity: The least Jaccard similarity at which a rationale counts as a near-copy.
        keep_all: Whether posts without a rationale go to the output too, with null, so that the output has all valid posts.
        preview: The number of posts on the HTML page, drawn at random; 0 for no page.
        progress: Whether to show progress bars.

    Returns:
        The report: numbers of posts in all, with a rationale (`written`), open, invalid, failed, and rejected by each filter.
    """
    copies: dict[int, int] = {}
    if "near_copy" in rationale_filter.names:
        copies = _near_copies(len(posts), key_of, journal, max_similarity, progress)
    counts: Counter[str] = Counter()
    sample = _Sample(preview)
    with _Writer(paths) as writer:
        for index, source in enumerate(tqdm(posts, "Writing", len(posts), unit="post", disable=not progress)):
            key = key_of(index)
            if key is None:
                counts["open"] += 1
                continue
            row = journal.read(key)
            reason, message = _reason(row, source, rationale_filter, index, copies)
            counts[reason or "written"] += 1
            if reason is None:
                added = (row["text"], row["model"], row["stage"], row["reasoning"])
                writer.output(source.row | dict(zip(_COLUMNS, added, strict=True)), source.id)
            else:
                writer.error(source.index, source.id, reason, message, row.get("text"))
                if keep_all and reason != INVALID:
                    writer.output(source.row | dict.fromkeys(_COLUMNS), source.id)
            sample.offer(source, row, reason, message)
    report = _report(counts)
    if preview:
        shown = [_preview_post(*one) for one in sample.chosen()]
        write_preview(paths.preview, f"Rationales: {paths.output.name}", rationale_summary(report), shown)
    return report


def _near_copies(
    count: int, key_of: Callable[[int], bytes | None], journal: AnswerJournal, threshold: float, progress: bool
) -> dict[int, int]:
    finder = NearCopies(threshold)
    indices: list[int] = []
    for index in tqdm(range(count), "Comparing", unit="post", disable=not progress):
        key = key_of(index)
        if key is not None and not journal.has_failed(key):
            finder.add(journal.read(key)["text"])
            indices.append(index)

    def text_of(number: int) -> str:
        key = key_of(indices[number])
        assert key is not None
        return journal.read(key)["text"]

    return {indices[copy]: indices[original] for copy, original in finder.find(text_of).items()}


def _reason(
    row: Mapping[str, Any], source: SourcePost, rationale_filter: RationaleFilter, index: int, copies: Mapping[int, int]
) -> tuple[str | None, str]:
    """Why a post has no rationale, None if it has one, and an error message."""
    if row["failed"]:
        return INVALID if row.get("invalid") else FAILED, row["error"]
    task = rationale_filter.reasoning_task
    try:
        reason = rationale_filter(
            row["text"],
            keyphrases=source.post["keyphrases"],
            answer=None if task is None else task.answer(source.post),
            finish_reason=row["finish_reason"],
        )
    except Exception as error:  # a failure of this post alone
        return FAILED, f"the answer cannot be filtered ({type(error).__name__}: {str(error)[:200]})"
    if reason is None and index in copies:
        return "near_copy", _near_copy_message(source.stream.index_in_file(copies[index]))
    return reason, FILTERS.get(reason or "", "")


def _near_copy_message(index: int) -> str:
    return f"{FILTERS['near_copy']}: that of post number {index}"


def _report(counts: Mapping[str, int]) -> dict[str, Any]:
    return {
        "posts": sum(counts.values()),
        "written": counts.get("written", 0),
        "open": counts.get("open", 0),
        INVALID: counts.get(INVALID, 0),
        FAILED: counts.get(FAILED, 0),
        "rejected": {name: counts.get(name, 0) for name in FILTERS},
    }


def rationale_summary(report: Mapping[str, Any]) -> str:
    """Format a report's counts as one line.

    Args:
        report: The report that `write_rationales` or `merge_shards` returned.

    Example:
        >>> counts = {"posts": 3, "written": 2, "open": 0, "invalid_post": 0, "request_failed": 0}
        >>> rationale_summary({**counts, "rejected": {"empty": 1}})
        '3 posts: 2 with a rationale; rejected: 1 empty'
    """
    parts = [f"{report['written']:,} with a rationale"]
    parts += [
        f"{report[name]:,} {text}"
        for name, text in ((FAILED, "failed"), (INVALID, "invalid"), ("open", "not asked yet"))
        if report[name]
    ]
    rejected = ", ".join(f"{count:,} {name}" for name, count in report["rejected"].items() if count)
    return f"{report['posts']:,} posts: {', '.join(parts)}" + (f"; rejected: {rejected}" if rejected else "")


class _Writer:
    """Writes output and errors atomically, both or neither."""

    def __init__(self, paths: RunPaths):
        self.paths = paths

    def __enter__(self) -> _Writer:
        with contextlib.ExitStack() as stack:
            partials = stack.enter_context(atomic_files(self.paths.errors, self.paths.output))
            self._errors, self._output = (
                stack.enter_context(path.open("w", encoding="utf-8", errors="replace")) for path in partials
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def output(self, row: Mapping[str, Any], post_id: str) -> None:
        self._output.write(json_line({**row, "id": post_id}))

    def error(self, index: int, post_id: str, reason: str, message: str, rationale: str | None) -> None:
        row = {"index": index, "id": post_id, "reason": reason, "error": message, "rationale": rationale}
        self._errors.write(json_line(row))


class _Sample:
    """A random sample of posts offered one by one (reservoir sampling); the same for the same posts."""

    def __init__(self, size: int):
        self.size = size
        self._random = random.Random(0)
        self._seen = 0
        self._posts: list[tuple[SourcePost, Mapping[str, Any], str | None, str]] = []

    def offer(self, source: SourcePost, row: Mapping[str, Any], reason: str | None, message: str) -> None:
        self._seen += 1
        if len(self._posts) < self.size:
            self._posts.append((source, row, reason, message))
        elif self.size and (place := self._random.randrange(self._seen)) < self.size:
            self._posts[place] = (source, row, reason, message)

    def chosen(self) -> list[tuple[SourcePost, Mapping[str, Any], str | None, str]]:
        return sorted(self._posts, key=lambda one: one[0].index)


def _preview_post(source: SourcePost, row: Mapping[str, Any], reason: str | None, message: str) -> PreviewPost:
    post = {} if source.problem else source.post
    note = f"{row.get('model')}, stage {row.get('stage')}" if reason is None else f"{reason}: {message}"
    return PreviewPost(
        source.id,
        post.get("text") or "",
        [*post.get("keyphrases", ()), *filter(None, (post.get("aspect"), post.get("label")))],
        post.get("images") or [],
        row.get("text"),
        note,
        reason is not None,
    )


# --- several machines ---


def merge_shards(
    output: str | os.PathLike[str],
    *,
    max_similarity: float = 0.8,
    near_copies: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Merge the outputs of `--shard 1/n` to `--shard n/n`, in the posts' order.

    Near-copies are searched again, because each machine compared its own rationales only. Neither posts nor images are read,
    only each shard's `.jsonl`, `.errors.jsonl` and `.report.json`.

    Args:
        output: The merged output; the shards' files are beside it, named `r.1-of-n.jsonl` and so on.
        max_similarity: The least Jaccard similarity of near-copies, as in `write_rationales`.
        near_copies: Whether to search for near-copies.
        progress: Whether to show progress bars.

    Returns:
        The report.

    Raises:
        FileNotFoundError: If there is no shard, or one is missing.
        ValueError: If a shard is not finished, was made with different settings, or lost rows.
    """
    paths = RunPaths(output)
    shards = _shards(paths)
    reports = [read_json(shard.report) for shard in shards]
    for shard, report in zip(shards, reports, strict=True):
        if report["open"]:
            raise ValueError(f"{shard.output} is not finished: {report['open']} posts are open. Run its --shard again")
        if report["settings"] != reports[0]["settings"]:
            raise ValueError(f"{shard.output} was made with different settings than {shards[0].output}: see their reports")
    keep_all = reports[0]["keep_all"]
    copies: dict[int, int] = {}
    if near_copies:
        copies = _copies_across(shards, max_similarity, keep_all, progress)
    counts: Counter[str] = Counter()
    with _Writer(paths) as writer:
        for index, row, error in _interleaved(shards, keep_all):
            if error is not None:
                counts[error["reason"]] += 1
                writer.error(*(error[name] for name in ("index", "id", "reason", "error", "rationale")))
            elif row is not None and index in copies:
                counts["near_copy"] += 1
                writer.error(index, row["id"], "near_copy", _near_copy_message(copies[index]), row["rationale"])
                row = {**row, **dict.fromkeys(_COLUMNS)} if keep_all else None
            else:
                counts["written"] += 1
            if row is not None:
                writer.output(row, row["id"])
        if counts.total() != (expected := sum(report["posts"] for report in reports)):
            raise ValueError(
                f"the shards of {paths.output} have {counts.total()} posts in their places, and their reports {expected}: they "
                "were made from different posts, or a file was changed. Run each --shard again"
            )
    report = _report(counts)
    for name in ("cost", "requests"):
        values = [one.get(name) for one in reports]
        report[name] = None if None in values else sum(values)
    write_json(paths.report, {**report, "keep_all": keep_all, "settings": reports[0]["settings"]})
    return report


def _shards(paths: RunPaths) -> list[RunPaths]:
    stem = paths.output.name.removesuffix(".jsonl")
    named = re.compile(rf"{re.escape(stem)}\.(\d+)-of-(\d+)\.report\.json")
    beside = paths.output.parent.iterdir() if paths.output.parent.is_dir() else iter(())
    found = {(int(match[1]), int(match[2])) for file in beside if (match := named.fullmatch(file.name))}
    counts = {count for _, count in found}
    if not found:
        raise FileNotFoundError(f"beside {paths.output} there is no finished shard, such as {stem}.1-of-2.jsonl")
    if len(counts) > 1:
        raise ValueError(f"beside {paths.output} are shards of {sorted(counts)}: keep those of one division")
    count = counts.pop()
    if missing := [number for number in range(1, count + 1) if (number, count) not in found]:
        raise FileNotFoundError(f"of {count} shards of {paths.output}, {missing} are missing")
    return [paths.of_shard(number, count) for number in range(1, count + 1)]


def _rows(path: Path, files: contextlib.ExitStack) -> Iterator[dict[str, Any]]:
    return map(json.loads, files.enter_context(path.open("rb")))


def _interleaved(
    shards: Sequence[RunPaths], keep_all: bool
) -> Iterator[tuple[int, dict[str, Any] | None, dict[str, Any] | None]]:
    """Each post's number, its row in the output and its row among the errors, in the posts' order."""
    with contextlib.ExitStack() as files:
        outputs = [_rows(shard.output, files) for shard in shards]
        errors = [_rows(shard.errors, files) for shard in shards]
        next_errors = [next(one, None) for one in errors]
        index = 0
        while True:
            shard = index % len(shards)
            error = next_errors[shard]
            if error is not None and error["index"] == index:
                next_errors[shard] = next(errors[shard], None)
                row = None
                if keep_all and error["reason"] != INVALID and (row := next(outputs[shard], None)) is None:
                    return
                yield index, row, error
            elif (row := next(outputs[shard], None)) is not None:
                yield index, row, None
            else:
                return
            index += 1


def _copies_across(shards: Sequence[RunPaths], threshold: float, keep_all: bool, progress: bool) -> dict[int, int]:
    finder = NearCopies(threshold)
    indices: list[int] = []
    offsets: list[tuple[int, int]] = []  # of each rationale's row: its shard, and its first byte
    ends = [0] * len(shards)
    with contextlib.ExitStack() as files:
        readers = [files.enter_context(shard.output.open("rb")) for shard in shards]
        for index, row, error in tqdm(_interleaved(shards, keep_all), "Comparing", unit="post", disable=not progress):
            shard = index % len(shards)
            if row is None:
                continue
            start = ends[shard]
            readers[shard].seek(start)
            ends[shard] = start + len(readers[shard].readline())
            if error is None:
                finder.add(row["rationale"])
                indices.append(index)
                offsets.append((shard, start))

        def text_of(number: int) -> str:
            shard, start = offsets[number]
            readers[shard].seek(start)
            return json.loads(readers[shard].readline())["rationale"]

        return {indices[copy]: indices[original] for copy, original in finder.find(text_of).items()}
