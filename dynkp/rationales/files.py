"""What a run leaves: posts with rationales, posts without, and a report.

Given   posts, and what was answered about each.
Gives   `R.jsonl`, `R.errors.jsonl`, `R.report.json`, and, if wanted, `R.preview.html`.
Holds   every post is in exactly one of the first two, in the posts' order, unless it was not come to; each file appears, or
        is replaced, only when it is complete; memory does not grow with the posts but for 150 bytes each.

A row of `R.jsonl` is the post's own row with `rationale`, `rationale_model`, `rationale_stage` and `reasoning_content`. A row
of `R.errors.jsonl` has the post's number (`index`) and `id`, the `reason` (`invalid_post`, `request_failed`, or the name of
a filter), an `error` in words and the rejected `rationale`.
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
    judge: RationaleFilter,
    *,
    max_similarity: float = 0.8,
    keep_all: bool = False,
    preview: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a run's files.

    Args:
        posts: the posts.
        key_of: from a post's place among them to the key of its last answer; None if it was not come to.
        journal: the answers.
        paths: where to.
        judge: the filters.
        max_similarity: above this Jaccard similarity a rationale is a near-copy.
        keep_all: whether posts without a rationale go to the output, too, with null, so that it can be trained on as it is.
        preview: how many posts to show on the HTML page; 0 for none.
        progress: whether to show progress bars.

    Returns:
        The report: counts of posts by what became of them.
    """
    copies: dict[int, int] = {}
    if "near_copy" in judge.names:
        copies = _near_copies(len(posts), key_of, journal, max_similarity, progress)
    counts: Counter[str] = Counter()
    sample = _Sample(preview)
    with _Writer(paths) as writer:
        for place, source in enumerate(tqdm(posts, "Writing", len(posts), unit="post", disable=not progress)):
            key = key_of(place)
            if key is None:
                counts["open"] += 1
                continue
            row = journal.read(key)
            reason, message = _reason(row, source, judge, place, copies)
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
        write_preview(paths.preview, f"Rationales: {paths.output.name}", summarise(report), shown)
    return report


def _near_copies(
    count: int, key_of: Callable[[int], bytes | None], journal: AnswerJournal, threshold: float, progress: bool
) -> dict[int, int]:
    finder = NearCopies(threshold)
    places: list[int] = []
    for place in tqdm(range(count), "Comparing", unit="post", disable=not progress):
        key = key_of(place)
        if key is not None and not journal.has_failed(key):
            finder.add(journal.read(key)["text"])
            places.append(place)

    def text_of(number: int) -> str:
        key = key_of(places[number])
        assert key is not None
        return journal.read(key)["text"]

    return {places[copy]: places[original] for copy, original in finder.find(text_of).items()}


def _reason(
    row: Mapping[str, Any], source: SourcePost, judge: RationaleFilter, place: int, copies: Mapping[int, int]
) -> tuple[str | None, str]:
    if row["failed"]:
        return INVALID if row.get("invalid") else FAILED, row["error"]
    task = judge.reasoning_task
    reason = judge(
        row["text"],
        keyphrases=source.post["keyphrases"],
        answer=None if task is None else task.answer(source.post),
        finish_reason=row["finish_reason"],
    )
    if reason is None and place in copies:
        return "near_copy", _copy_of(source.stream.index_in_file(copies[place]))
    return reason, FILTERS.get(reason or "", "")


def _copy_of(index: int) -> str:
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


def summarise(report: Mapping[str, Any]) -> str:
    """A report in a sentence.

    Example:
        >>> summarise({"posts": 3, "written": 2, "open": 0, "invalid_post": 0, "request_failed": 0, "rejected": {"empty": 1}})
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
    """Output and errors, which appear when both are complete."""

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
    """Some posts of many, each equally likely, the same ones each time."""

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
    """Put the outputs of `--shard 1/n` to `--shard n/n` together, in the posts' order.

    Near-copies are looked for anew: each machine saw its own rationales only. Neither posts nor pictures are needed, only
    each shard's `.jsonl`, `.errors.jsonl` and `.report.json`.

    Args:
        output: the whole run's output; the shards' files lie beside it, as `r.1-of-n.jsonl` and so on.
        max_similarity: as in `write_rationales`.
        near_copies: whether to look for them.
        progress: whether to show progress bars.

    Returns:
        The report.

    Raises:
        FileNotFoundError: if there is no shard, or one is missing.
        ValueError: if a shard is not finished, or was made with other settings.
    """
    paths = RunPaths(output)
    shards = _shards(paths)
    reports = [read_json(shard.report) for shard in shards]
    for shard, report in zip(shards, reports, strict=True):
        if report["open"]:
            raise ValueError(f"{shard.output} is not finished: {report['open']} posts are open. Run its --shard again")
        if report["settings"] != reports[0]["settings"]:
            raise ValueError(f"{shard.output} was made with other settings than {shards[0].output}: see their reports")
    keep_all = reports[0]["keep_all"]
    copies: dict[int, int] = {}
    if near_copies:
        copies = _copies_across(shards, max_similarity, keep_all, progress)
    counts: Counter[str] = Counter()
    with _Writer(paths) as writer:
        for place, row, error in _interleaved(shards, keep_all):
            if error is not None:
                counts[error["reason"]] += 1
                writer.error(*(error[name] for name in ("index", "id", "reason", "error", "rationale")))
            elif row is not None and place in copies:
                counts["near_copy"] += 1
                writer.error(place, row["id"], "near_copy", _copy_of(copies[place]), row["rationale"])
                row = {**row, **dict.fromkeys(_COLUMNS)} if keep_all else None
            else:
                counts["written"] += 1
            if row is not None:
                writer.output(row, row["id"])
        if counts.total() != (expected := sum(report["posts"] for report in reports)):
            raise ValueError(
                f"the shards of {paths.output} have {counts.total()} posts in their places, and their reports {expected}: they "
                "are not of the same posts, or a file was changed. Run each --shard again"
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
        place = 0
        while True:
            shard = place % len(shards)
            error = next_errors[shard]
            if error is not None and error["index"] == place:
                next_errors[shard] = next(errors[shard], None)
                row = None
                if keep_all and error["reason"] != INVALID and (row := next(outputs[shard], None)) is None:
                    return
                yield place, row, error
            elif (row := next(outputs[shard], None)) is not None:
                yield place, row, None
            else:
                return
            place += 1


def _copies_across(shards: Sequence[RunPaths], threshold: float, keep_all: bool, progress: bool) -> dict[int, int]:
    finder = NearCopies(threshold)
    places: list[int] = []
    offsets: list[tuple[int, int]] = []  # where each rationale's row lies
    ends = [0] * len(shards)
    with contextlib.ExitStack() as files:
        readers = [files.enter_context(shard.output.open("rb")) for shard in shards]
        for place, row, error in tqdm(_interleaved(shards, keep_all), "Comparing", unit="post", disable=not progress):
            shard = place % len(shards)
            if row is None:
                continue
            start = ends[shard]
            readers[shard].seek(start)
            ends[shard] = start + len(readers[shard].readline())
            if error is None:
                finder.add(row["rationale"])
                places.append(place)
                offsets.append((shard, start))

        def text_of(number: int) -> str:
            shard, start = offsets[number]
            readers[shard].seek(start)
            return json.loads(readers[shard].readline())["rationale"]

        return {places[copy]: places[original] for copy, original in finder.find(text_of).items()}
