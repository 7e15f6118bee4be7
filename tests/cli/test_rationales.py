"""Invariants of `dynkp rationales`:

- killed five times at random moments, with a server that breaks in every way: in the end every post has its rationale or
  stands in the error file, once; beyond the faults at most 1.02 requests are sent per answered post;
- each way to end has its exit status; the next run goes on;
- the API key is nowhere but in the request's header: not in a file, nor on the screen, nor accepted as an argument;
- export, import, write, shards and merge work together from the command line; the help's lists are those of the library.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dynkp import cli
from dynkp.cli import rationales
from dynkp.cli.chat_options import COST_REACHED, SOME_FAILED
from dynkp.cli.errors import DONE, INTERRUPTED, RUN_FAILED, USER_ERROR
from dynkp.rationales.filters import DEFAULT_FILTERS, FILTERS
from dynkp.rationales.prompts import TASKS
from tests.conftest import REPOSITORY
from tests.support.chat_server import ChatServer, respond, serve, serve_in_process

KEY = "secret-0123456789abcdefXYZ"


def write_posts(folder: Path, count: int, cursed: tuple[int, ...] = ()) -> None:
    rows = [{"id": f"p{n}", "text": f"post {n}" + " cursed" * (n in cursed), "keyphrases": [f"tag {n}"]} for n in range(count)]
    (folder / "posts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(folder: Path, *more: str, action: str = "ask") -> list[str]:
    return [
        *("rationales", action, "--posts", str(folder / "posts.jsonl"), "--output", str(folder / "r.jsonl"), "--model", "m"),
        *("--no-progress", "--retry-pause", "0.01", "--max-attempts", "2", "--concurrency", "4", *more),
    ]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answered(folder: Path) -> int:
    file = folder / "r.journal" / "answers-00001.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_killed_five_times_by_a_server_that_breaks(tmp_path: Path) -> None:
    posts, concurrency, generator = 2000, 8, random.Random(5)
    cursed = tuple(range(7, posts, 400))
    write_posts(tmp_path, posts, cursed)
    log = tmp_path / "log"
    with serve_in_process(log, latency=0.01, faults=0.05, cursed="cursed", seed=3, silence=60) as url:
        command = [sys.executable, "-m", "dynkp.cli", *arguments(tmp_path, "--base-url", url, "--timeout", "2")]
        command += ["--max-attempts", "6", "--concurrency", str(concurrency)]
        for moment in sorted(generator.sample(range(50, posts - 100), 5)):
            process = subprocess.Popen(command, cwd=REPOSITORY)
            while answered(tmp_path) < moment:
                assert process.poll() is None
                time.sleep(0.002)
            time.sleep(0.03 * generator.random())
            process.send_signal(signal.SIGKILL)
            process.wait()
        last = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert last.returncode == SOME_FAILED, last.stderr
    rows, errors = read(tmp_path / "r.jsonl"), read(tmp_path / "r.errors.jsonl")
    assert [row["id"] for row in rows] == [f"p{n}" for n in range(posts) if n not in cursed]
    assert all(f"care about tag {row['id'][1:]} would" in row["rationale"] for row in rows)
    assert [(row["id"], row["reason"]) for row in errors] == [(f"p{n}", "request_failed") for n in cursed]
    requests = read(log)
    faults = Counter(row["fault"] for row in requests)
    assert all(faults[fault] > 5 for fault in ("429", "500", "half", "garbage", "closed", "silence"))
    # What was sent beyond the faults: one request per answered post, and those under way when the run was killed.
    sent = Counter(row["text"] for row in requests if not row["fault"])
    assert len(sent) == len(rows)
    assert sent.total() <= 1.02 * len(rows)
    assert max(sent.values()) <= 1 + 5


def test_each_ending_has_its_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_posts(tmp_path, 20, cursed=(4,))
    (tmp_path / "prices.json").write_text('{"m": {"input": 10000, "output": 20000}}')
    with serve(cursed="cursed") as (url, server):
        cost = ("--prices", str(tmp_path / "prices.json"), "--max-cost", "11")
        assert cli.main(arguments(tmp_path, "--base-url", url, *cost)) == COST_REACHED
        said = capsys.readouterr()
        assert "--max-cost reached" in said.err and "not asked yet" in said.out and "cost " in said.out
        assert 1 <= len(read(tmp_path / "r.jsonl")) <= 5
        assert cli.main(arguments(tmp_path, "--base-url", url)) == SOME_FAILED
        said = capsys.readouterr()
        assert "19 with a rationale, 1 failed" in said.out and "--retry-failed asks them again" in said.err
        server.cursed = ""
        assert cli.main(arguments(tmp_path, "--base-url", url, "--retry-failed", "--preview", "3")) == DONE
        assert "20 with a rationale; 1 requests" in capsys.readouterr().out
        assert (tmp_path / "r.preview.html").read_text().count("<article>") == 3
    assert cli.main(arguments(tmp_path, "--base-url", url, "--max-tokens", "9")) == RUN_FAILED
    said = capsys.readouterr()
    assert "10 posts in a row failed, the last: 2 attempts, the last: connection failed" in said.err


def test_ctrl_c_and_on(tmp_path: Path) -> None:
    write_posts(tmp_path, 60)
    with serve(latency=0.2) as (url, server):
        command = [sys.executable, "-m", "dynkp.cli", *arguments(tmp_path, "--base-url", url)]
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
        while answered(tmp_path) < 8:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == INTERRUPTED and "the same command continues" in said
        assert answered(tmp_path) == len(server.bodies) < 60
        assert cli.main(arguments(tmp_path, "--base-url", url, "--concurrency", "32")) == 0
        assert len(server.bodies) == 60


class Echo(ChatServer):
    """Says the key wherever it can."""

    async def answer(self, writer: Any, body: Any) -> bool:
        key = self.headers[-1]["authorization"]
        if "cursed" in json.dumps(body):
            await respond(writer, 400, {"error": {"message": f"you sent {key}", "param": key}})
            return True
        self.reply = lambda body: {
            "content": f"{key} is your key, and this makes a rationale of more than ten words",
            "reasoning_content": key,
        }
        return await super().answer(writer, body)


@pytest.mark.parametrize("status", [200, 401])
def test_the_key_is_nowhere(tmp_path: Path, status: int) -> None:
    class Refusing(Echo):
        async def answer(self, writer: Any, body: Any) -> bool:
            await respond(writer, 401, {"error": {"message": f"wrong key: {self.headers[-1]['authorization']}"}})
            return True

    write_posts(tmp_path, 6, cursed=(2,))
    environment = {**os.environ, "TEACHER_KEY": KEY, "OPENAI_LOG": "debug"}
    with serve(Echo if status == 200 else Refusing) as (url, server):
        # With its progress bar, and with the openai client's own log at its loudest.
        words = [word for word in arguments(tmp_path, "--base-url", url, "--preview", "6") if word != "--no-progress"]
        result = subprocess.run(
            [sys.executable, "-m", "dynkp.cli", *words, "--api-key-env", "TEACHER_KEY"],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env=environment,
        )
        assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert result.returncode == (SOME_FAILED if status == 200 else RUN_FAILED), result.stderr
    assert KEY not in result.stdout + result.stderr
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    written = {"r.jsonl", "r.errors.jsonl", "r.report.json", "r.preview.html", "answers-00001.jsonl", "index.sqlite"}
    assert written <= {file.name for file in files}
    assert [file.name for file in files if KEY.encode() in file.read_bytes()] == []


def test_a_key_on_the_command_line_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    write_posts(tmp_path, 1)
    with pytest.raises(SystemExit):
        cli.main(arguments(tmp_path, "--base-url", f"http://127.0.0.1:9/v1?key={KEY}"))
    said = capsys.readouterr()
    assert "an argument holds the API key" in said.err and KEY not in said.err + said.out
    monkeypatch.delenv("OPENAI_API_KEY")
    assert cli.main(arguments(tmp_path, "--base-url", f"http://user:{KEY}@127.0.0.1:9/v1")) == USER_ERROR
    said = capsys.readouterr()
    assert "base_url must have no user" in said.err and KEY not in said.err + said.out


def test_batches_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_posts(tmp_path, 5)
    batch = tmp_path / "batch"
    assert cli.main(arguments(tmp_path, "--batch-dir", str(batch), action="export")) == 0
    assert "5 requests in 1 files" in capsys.readouterr().out
    requests = read(batch / "batch-00001.jsonl")
    message = {"content": "one two three four five six seven eight nine ten"}
    body = {"choices": [{"message": message, "finish_reason": "stop"}]}
    results = [{"custom_id": row["custom_id"], "response": {"status_code": 200, "body": body}} for row in requests]
    (tmp_path / "results").write_text("".join(json.dumps(row) + "\n" for row in results[:4]))
    given = arguments(tmp_path, "--results", str(tmp_path / "results"), action="import")
    assert cli.main(given) == SOME_FAILED
    said = capsys.readouterr()
    assert "4 answers, 0 failures, 0 known before" in said.out and "1 posts need more requests" in said.err
    assert "1 with a rationale" in said.out and "3 near_copy" in said.out
    (tmp_path / "results").write_text(json.dumps(results[4]))
    assert cli.main(given) == 0
    assert cli.main(arguments(tmp_path, "--filters", action="write")) == 0
    assert len(read(tmp_path / "r.jsonl")) == 5
    assert cli.main(arguments(tmp_path, "--filters", "near_copy", action="write")) == 0
    assert len(read(tmp_path / "r.jsonl")) == 1


def test_shards_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_posts(tmp_path, 7)
    with serve() as (url, _):
        for shard in ("1/2", "2/2"):
            assert cli.main(arguments(tmp_path, "--base-url", url, "--shard", shard)) == 0
    assert cli.main(["rationales", "merge", "--output", str(tmp_path / "r.jsonl"), "--no-progress"]) == 0
    assert "7 posts: 7 with a rationale" in capsys.readouterr().out
    assert [row["id"] for row in read(tmp_path / "r.jsonl")] == [f"p{n}" for n in range(7)]
    assert cli.main(["rationales", "merge", "--output", str(tmp_path / "other.jsonl")]) == USER_ERROR
    assert "there is no finished shard" in capsys.readouterr().err


def test_the_lists_of_the_help_are_the_library_s() -> None:
    assert rationales.TASKS == TASKS
    assert rationales.FILTERS == tuple(FILTERS)
    assert rationales.DEFAULT_FILTERS == DEFAULT_FILTERS


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--output", "r.jsonl"], "ask needs --posts, --model, --base-url"),
        (["export", "--output", "r.jsonl", "--posts", "p", "--model", "m"], "export needs --batch-dir"),
        (["--output", "p.jsonl", "--posts", "p.jsonl", "--model", "m", "--base-url", "u"], "--output is the posts file itself"),
        (["--output", ".", "--posts", "p.jsonl", "--model", "m", "--base-url", "u"], "is a folder"),
        (["--output", "r.jsonl", "--shard", "3/2"], "not of the form I/N"),
        (["--output", "r.jsonl", "--max-cost", "0"], "not a number above 0"),
        (["--output", "r.jsonl", "--extra-body", "[]"], "not a JSON object"),
        (["--output", "r.jsonl", "--extra-body", "{"], "not JSON"),
        (["--output", "r.jsonl", "--temperature", "-1"], "not a number from 0"),
        (["--output", "r.jsonl", "--top-p", "2"], "not above 0 and at most 1"),
        (["--output", "r.jsonl", "--concurrency", "0"], "not a number of 1 or more"),
        (["fly", "--output", "r.jsonl"], "invalid choice: 'fly'"),
    ],
)
def test_command_lines_that_cannot_be_understood(words: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        rationales.main(words)
    assert exit.value.code == 2
    assert error in capsys.readouterr().err


def test_files_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(tmp_path, "--base-url", "http://127.0.0.1:9/v1")) == USER_ERROR
    error = capsys.readouterr().err
    assert error.startswith("dynkp rationales: error: --posts=") and error.endswith("there is no such file\n")


def test_an_invalid_post_is_to_be_corrected_and_a_dead_server_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_posts(tmp_path, 3)
    with (tmp_path / "posts.jsonl").open("a") as posts:
        posts.write('{"id": "bad", "text": 7, "keyphrases": ["a"]}\n')
    with serve() as (url, _):
        pass
    assert cli.main(arguments(tmp_path, "--base-url", url)) == RUN_FAILED
    said = capsys.readouterr()
    assert "3 posts in a row failed" in said.err and "The same command continues" in said.err
    with serve() as (url, server):
        assert cli.main(arguments(tmp_path, "--base-url", url)) == SOME_FAILED
        said = capsys.readouterr()
        assert "1 posts are invalid (correct them" in said.err and "--retry-failed" not in said.err
        assert len(server.bodies) == 3
