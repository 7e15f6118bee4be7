"""Requests and answers in the files of OpenAI's batch interface, which `vllm run-batch` and hosted batch services read.

Given   requests; later, files of results.
Gives   files of requests, within a service's limits; answers in the journal, as if the server had been asked directly.
Holds   a request's `custom_id` is its key, so results may come in any order, from any number of files, more than once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from dynkp.chat.journal import AnswerJournal
from dynkp.chat.request import KEY_BYTES, ChatRequest, read_answer
from dynkp.data.images import ImageError

URL = "/v1/chat/completions"
# OpenAI takes 50,000 requests and 200 MB in one file.
MAX_REQUESTS, MAX_BYTES = 50_000, 190 << 20
# What is known of a request that is away: its stage, which a service does not send back.
_SEPARATOR = "-"


class Imported(NamedTuple):
    """What was in files of results.

    Attributes:
        answers: new answers.
        failures: new failures.
        known: results of requests that had been answered before; they change nothing.
    """

    answers: int
    failures: int
    known: int


def export_requests(
    requests: Iterable[ChatRequest],
    folder: str | os.PathLike[str],
    *,
    max_requests: int = MAX_REQUESTS,
    max_bytes: int = MAX_BYTES,
    refuse: Callable[[ChatRequest, ImageError], None] | None = None,
) -> tuple[int, list[Path]]:
    """Write requests to `batch-00001.jsonl`, `batch-00002.jsonl`, ...

    Args:
        requests: each key once.
        folder: made if need be; must not have such files already.
        max_requests: most requests of a file.
        max_bytes: most bytes of a file; a single request may exceed it.
        refuse: takes a request whose picture cannot be read, which is then left out; None makes it an error.

    Returns:
        The number of requests written, and the files.

    Raises:
        FileExistsError: if the folder has batch files.
        ImageError: if a picture cannot be read and there is no `refuse`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if old := sorted(folder.glob("batch-*.jsonl")):
        raise FileExistsError(f"{old[0]} exists: choose another folder, or delete its batch-*.jsonl once they are imported")
    files: list[Path] = []
    count = in_file = size = 0
    file = None
    try:
        for request in requests:
            try:
                line = _line(request)
            except ImageError as error:
                if refuse is None:
                    raise
                refuse(request, error)
                continue
            if file is None or in_file >= max_requests or size + len(line) > max_bytes:
                if file is not None:
                    file.close()
                files.append(folder / f"batch-{len(files) + 1:05d}.jsonl")
                file = files[-1].open("wb")
                in_file = size = 0
            file.write(line)
            count, in_file, size = count + 1, in_file + 1, size + len(line)
    finally:
        if file is not None:
            file.close()
    return count, files


def _line(request: ChatRequest) -> bytes:
    name = f"{request.key.hex()}{_SEPARATOR}{request.stage}"
    return (json.dumps({"custom_id": name, "method": "POST", "url": URL, "body": request.body()}) + "\n").encode()


def import_results(paths: Iterable[str | os.PathLike[str]], journal: AnswerJournal, *, model: str) -> Imported:
    """Put the results of batches into the journal.

    Args:
        paths: files of results, JSON Lines with `custom_id`, `response` (`status_code`, `body`) and `error`.
        journal: takes the answers.
        model: which the requests named.

    Returns:
        Counts.

    Raises:
        ValueError: naming file and line, if a line is no result.
    """
    answers = failures = known = 0
    for path in paths:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                key, stage, result = _result(line, where)
                if key in journal and not journal.has_failed(key):
                    known += 1
                    continue
                row: dict[str, Any] = {"stage": stage, "model": model}
                try:
                    response = result.get("response") or {}
                    if not isinstance(response, Mapping):
                        raise ValueError(f"{response!r:.300}")
                    body = response.get("body")
                    if isinstance(body, str) and body.startswith("{"):
                        body = json.loads(body)
                    if result.get("error") or response.get("status_code", 200) != 200:
                        raise ValueError(f"{result.get('error') or body!r:.300}")
                    row |= asdict(read_answer(body))
                    answers += 1
                except ValueError as error:
                    row |= {"failed": True, "error": f"batch: {error}"[:500]}
                    failures += 1
                journal.append(key, row)
    journal.sync()
    return Imported(answers, failures, known)


def _result(line: bytes, where: str) -> tuple[bytes, str, Mapping[str, Any]]:
    try:
        result = json.loads(line)
        name, _, stage = result["custom_id"].partition(_SEPARATOR)
        key = bytes.fromhex(name)
        if len(key) != KEY_BYTES:
            raise ValueError(f"custom_id {name!r:.80} is not one of dynkp's")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: not a result of an exported batch ({type(error).__name__}: {error})") from error
    return key, stage, result
