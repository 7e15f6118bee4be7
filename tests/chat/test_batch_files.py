"""Invariants of batch files: they hold what would have been sent, within a service's limits; results come back in any order,
from `vllm run-batch` and hosted services alike, and count as answers; failures are failures; nothing known is overwritten;
what is no result is named by file and line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from dynkp.chat.batch_files import ImportCounts, export_requests, import_results
from dynkp.chat.journal import AnswerJournal
from dynkp.chat.request import ChatRequest

REQUESTS = [ChatRequest([{"role": "user", "content": f"Why {n}?"}], {"model": "m"}, ("", "predict")[n % 2]) for n in range(10)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def result(exported: dict[str, Any], **more: Any) -> dict[str, Any]:
    body = {"choices": [{"message": {"content": f"To {exported['body']['messages'][0]['content']}"}, "finish_reason": "stop"}]}
    return {
        "id": "1",
        "custom_id": exported["custom_id"],
        "response": {"status_code": 200, "body": body},
        "error": None,
        **more,
    }


def test_files_hold_what_would_be_sent(tmp_path: Path) -> None:
    count, files = export_requests(iter(REQUESTS), tmp_path / "batch", max_requests=4)
    assert (count, [file.name for file in files]) == (10, [f"batch-0000{n}.jsonl" for n in (1, 2, 3)])
    rows = [row for file in files for row in lines(file)]
    assert [len(lines(file)) for file in files] == [4, 4, 2]
    assert [row["body"] for row in rows] == [request.body() for request in REQUESTS]
    assert {(row["method"], row["url"]) for row in rows} == {("POST", "/v1/chat/completions")}
    assert len({row["custom_id"] for row in rows}) == 10 and max(len(row["custom_id"]) for row in rows) <= 64


def test_files_keep_to_their_size(tmp_path: Path) -> None:
    _, files = export_requests(REQUESTS, tmp_path, max_bytes=500)
    assert len(files) > 2 and all(file.stat().st_size <= 500 for file in files)
    with pytest.raises(FileExistsError, match="batch-00001.jsonl exists"):
        export_requests(REQUESTS, tmp_path)


def test_nothing_to_ask_makes_no_file(tmp_path: Path) -> None:
    assert export_requests([], tmp_path) == (0, [])


def test_results_come_back_in_any_order(tmp_path: Path) -> None:
    _, files = export_requests(REQUESTS, tmp_path / "batch")
    rows = [result(row) for row in lines(files[0])]
    rows[3] |= {"response": {"status_code": 500, "body": {"error": "it broke"}}}
    rows[4] |= {"response": None, "error": {"message": "expired"}}
    rows[5]["response"]["body"] = json.dumps(rows[5]["response"]["body"])
    rows[6]["response"]["body"] = {"choices": []}
    rows[7]["response"] = "it broke"
    rows[8]["response"]["body"] = '{"choices": ['
    random.Random(0).shuffle(rows)
    for name, part in (("a", rows[:5]), ("b", rows[5:])):
        (tmp_path / name).write_text("\n".join(map(json.dumps, part)) + "\n\n")
    with AnswerJournal(tmp_path / "journal") as journal:
        assert import_results([tmp_path / "a", tmp_path / "b"], journal, model="m") == ImportCounts(5, 5, 0)
        for number, request in enumerate(REQUESTS):
            row = journal.read(request.key)
            assert row["stage"] == request.stage and row["model"] == "m"
            if number in (3, 4, 6, 7, 8):
                assert row["failed"] and row["error"].startswith("batch: ")
            else:
                assert (row["text"], row["finish_reason"]) == (f"To Why {number}?", "stop")
        # A second batch answers what had failed; the rest stays as it is.
        again = [result(row) for row in lines(files[0])]
        (tmp_path / "c").write_text("\n".join(map(json.dumps, again)))
        assert import_results([tmp_path / "c"], journal, model="m") == ImportCounts(5, 0, 5)
        assert not any(journal.has_failed(request.key) for request in REQUESTS)


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"custom_id": "mine-1"}', '{"custom_id": "00ff-"}'])
def test_what_is_no_result_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "a").write_text(f"\n{line}\n")
    with AnswerJournal(tmp_path / "journal") as journal, pytest.raises(ValueError, match="a, line 2: not a result"):
        import_results([tmp_path / "a"], journal, model="m")
