"""Batch files: requests and results in the format of OpenAI's batch interface, for `vllm run-batch` and hosted services.

Requests are written to files within a service's limits. Results become answers in the journal, as if the server had been
asked directly. The `custom_id` of a request is its key, so results may come in any order, from any number of files, and more
than once.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from dynkp.chat.journal import AnswerJournal
from dynkp.chat.request import KEY_BYTES, ChatRequest, read_answer
from dynkp.data.images import ImageError
from dynkp.files.atomic import atomic_files

URL = "/v1/chat/completions"
# OpenAI accepts 50,000 requests and 200 MB in one file.
MAX_REQUESTS, MAX_BYTES = 50_000, 190 << 20
# Between the key and the stage in a `custom_id`: services do not return other data of a request.
_SEPARATOR = "-"


class ImportCounts(NamedTuple):
    """Numbers of results that were imported.

    Attributes:
        answers: New answers.
        failures: New failures.
        known: Results of requests that had been answered before; they were ignored.
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
    on_image_error: Callable[[ChatRequest, ImageError], None] | None = None,
) -> tuple[int, list[Path]]:
    """Write requests to `batch-00001.jsonl`, `batch-00002.jsonl`, ...

    Args:
        requests: Requests with distinct keys.
        folder: The folder, created if it does not exist. It must not contain such files yet.
        max_requests: Maximum number of requests in a file.
        max_bytes: Maximum size of a file in bytes; a single request may exceed it.
        on_image_error: Called with a request whose image cannot be read, and the error; the request is left out. If None,
            the error is raised.

    Returns:
        The number of requests written, and the files.

    Raises:
        FileExistsError: If the folder contains batch files.
        ImageError: If an image cannot be read and `on_image_error` is None.

    Example:
        >>> import tempfile
        >>> request = ChatRequest([{"role": "user", "content": "Why?"}], {"model": "m"})
        >>> count, files = export_requests([request], tempfile.mkdtemp())
        >>> count, files[0].name
        (1, 'batch-00001.jsonl')
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if old := sorted(folder.glob("batch-*.jsonl")):
        raise FileExistsError(f"{old[0]} exists: choose another folder, or delete its batch-*.jsonl once they are imported")
    files: list[Path] = []
    count = in_file = size = 0
    with contextlib.ExitStack() as stack:  # holds the file that is being written
        for request in requests:
            try:
                line = _line(request)
            except ImageError as error:
                if on_image_error is None:
                    raise
                on_image_error(request, error)
                continue
            if not files or in_file >= max_requests or size + len(line) > max_bytes:
                stack.close()
                files.append(folder / f"batch-{len(files) + 1:05d}.jsonl")
                (partial,) = stack.enter_context(atomic_files(files[-1]))
                file = stack.enter_context(partial.open("wb"))
                in_file = size = 0
            file.write(line)
            count, in_file, size = count + 1, in_file + 1, size + len(line)
    return count, files


def _line(request: ChatRequest) -> bytes:
    name = f"{request.key.hex()}{_SEPARATOR}{request.stage}"
    return (json.dumps({"custom_id": name, "method": "POST", "url": URL, "body": request.body()}) + "\n").encode()


def import_results(paths: Iterable[str | os.PathLike[str]], journal: AnswerJournal, *, model: str) -> ImportCounts:
    """Write the results of batches to the journal.

    Args:
        paths: Files of results: JSON Lines with `custom_id`, `response` (`status_code`, `body`) and `error`.
        journal: The journal that gets the answers.
        model: The model that the requests name.

    Returns:
        The numbers of results.

    Raises:
        ValueError: If a line is not a result; the message names file and line.
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
    return ImportCounts(answers, failures, known)


def _result(line: bytes, where: str) -> tuple[bytes, str, Mapping[str, Any]]:
    """Key, stage and result of a line."""
    try:
        result = json.loads(line)
        name, _, stage = result["custom_id"].partition(_SEPARATOR)
        key = bytes.fromhex(name)
        if len(key) != KEY_BYTES:
            raise ValueError(f"custom_id {name!r:.80} is not one of dynkp's")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: not a result of an exported batch ({type(error).__name__}: {error})") from error
    return key, stage, result
