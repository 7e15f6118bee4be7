"""Invariants of the run:

- every post is settled, each request is sent once, posts that ask the same share an answer, several questions follow each
  other; a run that was interrupted goes on, wherever its cursor stands, and sends only what is missing;
- what fails is a failure of its post and is asked again only on demand; a server that fails everyone ends the run;
- no more requests at once, and no more posts in memory, than the concurrency allows, however many posts there are;
- the cost stays below the limit;
- nine tenths of a server's 160 answers a second are used (200 ms, 32 slots); of a million posts, a run that goes on begins
  to ask within 10 s of processor time, in less than 1 GiB.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Generator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from dynkp.chat import post_stream
from dynkp.chat.client import ChatClient
from dynkp.chat.journal import AnswerJournal
from dynkp.chat.post_stream import PostStream, SourcePost
from dynkp.chat.prices import Price
from dynkp.chat.request import ChatAnswer, ChatRequest
from dynkp.chat.run import Outcome, RequestRun
from tests.conftest import REPOSITORY
from tests.support.chat_server import ChatServer, last_text, respond, serve, serve_in_process
from tests.support.conversations import once, question, twice


def write_posts(folder: Path, texts: list[str]) -> Path:
    path = folder / "posts.jsonl"
    path.write_text("".join(json.dumps({"id": f"p{n}", "text": text}) + "\n" for n, text in enumerate(texts)))
    return path


def ask(
    folder: Path,
    url: str,
    conversation: Any = once,
    *,
    concurrency: int = 4,
    attempts: int = 2,
    settings: str = "s",
    **options: Any,
) -> tuple[Outcome, list[dict[str, Any] | None]]:
    """Run over `posts.jsonl`; the last answer of each post."""
    stream = PostStream(folder / "posts.jsonl")
    with AnswerJournal(folder / "journal") as journal:
        run = RequestRun(stream, conversation, journal, settings=settings, **{"progress": False, **options})
        outcome = run.ask(
            lambda: ChatClient(url, concurrency=concurrency, max_attempts=attempts, first_pause=0.01, timeout=20),
            concurrency=concurrency,
        )
        keys = [run.last_key(place) for place in range(len(stream))]
        return outcome, [None if key is None else journal.read(key) for key in keys]


def test_every_post_is_asked_about_once(tmp_path: Path) -> None:
    write_posts(tmp_path, [f"post {n}" for n in range(50)])
    with serve() as (url, server):
        outcome, answers = ask(tmp_path, url)
        assert outcome == Outcome(settled=50, failed=0, open=0, requests=50)
        assert sorted(last_text(body) for body in server.bodies) == sorted(f"post {n}" for n in range(50))
        assert [row["id"] for row in answers if row] == [f"p{n}" for n in range(50)]
        again, same = ask(tmp_path, url)
        assert again.requests == 0 and same == answers
        # Other settings: the posts are looked at anew, and the answers to the same requests are found.
        again, same = ask(tmp_path, url, settings="t")
        assert again.requests == 0 and same == answers


def test_posts_that_ask_the_same_share_the_answer(tmp_path: Path) -> None:
    write_posts(tmp_path, ["a", "b", "a", "a", "b"] * 8)
    with serve(latency=0.05) as (url, server):
        outcome, answers = ask(tmp_path, url, concurrency=16)
    assert (outcome.settled, outcome.requests, len(server.bodies)) == (40, 2, 2)
    assert len({row["text"] for row in answers if row}) == 2


def test_one_question_follows_another(tmp_path: Path) -> None:
    write_posts(tmp_path, [f"{('even', 'odd')[n % 2]} {n}" for n in range(20)])
    with serve() as (url, server):
        outcome, answers = ask(tmp_path, url, twice)
        assert outcome.requests == 30 and outcome.settled == 20
        assert [row["stage"] for row in answers if row] == ["second", "first"] * 10
        # Without the notes of what is settled, the conversations are replayed from their answers.
        (tmp_path / "journal" / "index.sqlite").unlink()
        again, same = ask(tmp_path, url, twice)
        assert again.requests == 0 and same == answers


def test_a_post_may_need_no_question(tmp_path: Path) -> None:
    def conversation(post: dict[str, Any]) -> Generator[ChatRequest, ChatAnswer, None]:
        if post["text"] != "known":
            yield question(post["text"])

    write_posts(tmp_path, ["a", "known", "b", "known"])
    with serve() as (url, _):
        for requests in (2, 0):
            outcome, answers = ask(tmp_path, url, conversation)
            assert outcome == Outcome(settled=4, failed=0, open=0, requests=requests)
            assert ["text" in row for row in answers if row] == [True, False, True, False]
    with AnswerJournal(tmp_path / "other") as journal:
        run = RequestRun(PostStream(tmp_path / "posts.jsonl"), conversation, journal, settings="s", progress=False)
        assert run.replay().open == 2


@pytest.mark.parametrize("cursor", [None, "middle", "end", "other file"])
def test_a_run_goes_on_wherever_the_last_one_was_reading(tmp_path: Path, cursor: str | None) -> None:
    path = write_posts(tmp_path, [f"post {n}" for n in range(40)])
    with serve() as (url, server):
        stream = PostStream(path, limit=25)
        with AnswerJournal(tmp_path / "journal") as journal:
            run = RequestRun(stream, once, journal, settings="s", progress=False)
            run.ask(lambda: ChatClient(url, concurrency=4), concurrency=4)
            # As if five answers had been lost on the way.
            lost = [run.last_key(place) for place in range(3, 8)]
            for key in lost:
                assert key is not None
            whole = PostStream(path)
            place = {"middle": list(whole)[20], "end": list(whole)[-1], "other file": list(whole)[5]}.get(cursor or "")
            if place is not None:
                identity = {**whole.identity(), **({"size": 1} if cursor == "other file" else {})}
                journal.set_cursor({"posts": identity, "offset": place.end, "index": place.index + 1})
        answers = tmp_path / "journal" / "answers-00001.jsonl"
        kept = [
            line
            for line in answers.read_bytes().splitlines(keepends=True)
            if json.loads(line)["key"] not in {key.hex() for key in lost if key}
        ]
        answers.write_bytes(b"".join(kept))
        (tmp_path / "journal" / "index.sqlite").unlink()
        outcome, rows = ask(tmp_path, url)
        assert outcome == Outcome(settled=40, failed=0, open=0, requests=20)
        assert [row["id"] for row in rows if row] == [f"p{n}" for n in range(40)]
        assert len(server.bodies) == 45


def test_failures_are_their_posts_own(tmp_path: Path) -> None:
    write_posts(tmp_path, ["good 1", "cursed", "", "good 2"])
    with serve(cursed="cursed") as (url, server):
        outcome, answers = ask(tmp_path, url)
        assert (outcome.settled, outcome.failed, outcome.stopped) == (4, 2, None)
        assert [row and row["failed"] for row in answers] == [False, True, True, False]
        assert answers[1] and "2 attempts, the last: status 500" in answers[1]["error"]
        assert answers[2] and answers[2]["invalid"] and answers[2]["error"] == "the post is empty"
        sent = len(server.bodies)
        again, _ = ask(tmp_path, url)
        assert (again.failed, again.requests, len(server.bodies)) == (2, 0, sent)
        server.cursed = ""
        again, answers = ask(tmp_path, url, retry_failed=True)
        assert (again.failed, again.requests) == (1, 1)
        assert [row and row["failed"] for row in answers] == [False, False, True, False]


def test_a_post_that_fails_again_is_asked_once_more_only(tmp_path: Path) -> None:
    write_posts(tmp_path, ["cursed", "cursed", "good"])
    with serve(cursed="cursed") as (url, server):
        ask(tmp_path, url)
        server.bodies.clear()
        outcome, _ = ask(tmp_path, url, retry_failed=True)
        assert (outcome.failed, len(server.bodies)) == (2, 2)  # one request, two attempts


@pytest.mark.parametrize(
    ("texts", "reason"), [("cursed", "10 posts in a row failed"), ("post", "the server refuses: status 401")]
)
def test_a_server_that_fails_everyone_ends_the_run(tmp_path: Path, texts: str, reason: str) -> None:
    class Refusing(ChatServer):
        async def answer(self, writer: Any, body: Any) -> bool:
            if texts == "cursed":
                return await super().answer(writer, body)
            await respond(writer, 401, {"error": {"message": "who are you?"}})
            return True

    write_posts(tmp_path, [f"{texts} {n}" for n in range(500)])
    with serve(Refusing, cursed="cursed") as (url, server):
        outcome, _ = ask(tmp_path, url)
    assert outcome.stopped == "server" and reason in outcome.reason
    assert len(server.bodies) < 60 and outcome.open > 450


@pytest.mark.parametrize("answered", [0, 20])
def test_what_failed_as_the_server_was_down_is_asked_again(tmp_path: Path, answered: int) -> None:
    class GoesDown(ChatServer):
        async def answer(self, writer: Any, body: Any) -> bool:
            if len(self.bodies) > answered:
                self.cursed = "post"
            return await super().answer(writer, body)

    write_posts(tmp_path, [f"post {n}" for n in range(300)])
    with serve(GoesDown) as (url, _):
        outcome, _ = ask(tmp_path, url)
        assert outcome.stopped == "server" and outcome.failed >= 10
        still_down, _ = ask(tmp_path, url)
        assert still_down.stopped == "server"
    with serve(cursed="post 299") as (url, server):
        outcome, answers = ask(tmp_path, url)
        assert (outcome.stopped, outcome.settled, outcome.failed) == (None, 300, 1)
        assert [row is not None and not row["failed"] for row in answers] == [True] * 299 + [False]
        asked = len(server.bodies)
        # A failure of its own is not asked about again.
        outcome, _ = ask(tmp_path, url)
        assert (outcome.failed, len(server.bodies)) == (1, asked)


def test_a_signal_lets_requests_end(tmp_path: Path) -> None:
    write_posts(tmp_path, [f"post {n}" for n in range(200)])
    with serve(latency=0.1) as (url, server):
        timer = threading.Timer(0.35, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        outcome, answers = ask(tmp_path, url, concurrency=8)
        timer.join()
        assert outcome.stopped == "interrupted"
        assert 8 <= outcome.settled == outcome.requests == len(server.bodies) < 60
        assert outcome.open == 200 - outcome.settled == answers.count(None)
        outcome, _ = ask(tmp_path, url, concurrency=64)
        assert outcome.settled == 200 and len(server.bodies) == 200


def test_no_more_at_once_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_posts(tmp_path, [f"post {n}" for n in range(600)])
    sources: weakref.WeakSet[SourcePost] = weakref.WeakSet()
    alive = []

    class Counted(SourcePost):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            sources.add(self)

    monkeypatch.setattr(post_stream, "SourcePost", Counted)

    def counted(post: dict[str, Any]) -> Generator[ChatRequest, ChatAnswer, None]:
        alive.append(len(sources))
        yield question(post["text"])

    with serve(latency=0.02) as (url, server):
        ask(tmp_path, url, counted, concurrency=8)
        assert server.most_under_way <= 8
    # Under way 8, made ready 4, in the queue 4, just scanned 4.
    assert 8 <= max(alive) <= 28


def test_full_servers_are_sent_less(tmp_path: Path) -> None:
    write_posts(tmp_path, [f"post {n}" for n in range(300)])
    with serve(latency=0.01, slots=4, full=True) as (url, server):
        outcome, _ = ask(tmp_path, url, concurrency=64)
    assert (outcome.settled, outcome.failed) == (300, 0)
    assert len(server.bodies) < 3 * 300


def test_the_cost_stays_below_the_limit(tmp_path: Path) -> None:
    write_posts(tmp_path, [f"post {n}" for n in range(100)])
    price = {"m": Price(10_000.0, 20_000.0)}  # a request has 100 + 50 tokens: 2.0
    with serve(latency=0.01) as (url, server):
        outcome, _ = ask(tmp_path, url, prices=price, max_cost=41.0, concurrency=3)
        assert outcome.stopped == "max_cost"
        assert 30.0 <= outcome.cost <= 41.0 and outcome.cost == 2.0 * outcome.settled
        # What was spent before counts.
        again, _ = ask(tmp_path, url, prices=price, max_cost=41.0, concurrency=1)
        assert again.stopped == "max_cost" and outcome.cost <= again.cost <= 41.0
        done, _ = ask(tmp_path, url, prices=price, max_cost=1000.0)
        assert done.stopped is None and done.cost == 200.0 and len(server.bodies) == 100


def test_the_bar_shows_speed_time_left_and_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_posts(tmp_path, [*(f"post {n}" for n in range(30)), "cursed"])
    with serve(latency=0.05, cursed="cursed") as (url, _):
        ask(tmp_path, url, prices={"m": Price(10_000.0, 20_000.0)}, max_cost=100.0, progress=True)
    last = capsys.readouterr().err.rpartition("\r")[2]
    assert re.search(
        r"Asking: 100%\|.*\| 31/31 \[.*, [\d.]+ post/s, 00:00 left, [1-4] at once, cost 60\.00 of 100\.00, 1 failed\]", last
    )


def test_a_limit_of_cost_needs_counts_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_posts(tmp_path, [f"post {n}" for n in range(50)])
    monkeypatch.setattr("tests.support.chat_server.USAGE", None)
    with serve(latency=0.05) as (url, server):
        outcome, _ = ask(tmp_path, url, prices={"m": Price(1.0, 1.0)}, max_cost=1.0)
        assert (outcome.stopped, outcome.settled, len(server.bodies)) == ("server", 1, 1)
        assert "counts no tokens" in outcome.reason
        outcome, _ = ask(tmp_path, url, prices={"m": Price(1.0, 1.0)})
        assert outcome.settled == 50


def test_without_a_price_requests_go_side_by_side(tmp_path: Path) -> None:
    write_posts(tmp_path, [f"post {n}" for n in range(40)])
    with serve(latency=0.05) as (url, server):
        ask(tmp_path, url, prices={"m": Price(0.0, 0.0)}, max_cost=1.0, concurrency=8)
    assert server.most_under_way == 8


def test_without_a_server_answers_are_taken_stock_of(tmp_path: Path) -> None:
    path = write_posts(tmp_path, [f"{('even', 'odd')[n % 2]} {n}" for n in range(6)] + [""])
    with AnswerJournal(tmp_path / "journal") as journal:
        run = RequestRun(PostStream(path), twice, journal, settings="s", progress=False)
        assert run.replay() == Outcome(settled=0, failed=0, open=7)
        first = list(run.next_requests())
        assert [request.stage for request in first] == ["first"] * 7
        for request in first:
            journal.append(request.key, {"model": "m", "stage": "first", **vars(ChatAnswer("so"))})
        run = RequestRun(PostStream(path), twice, journal, settings="s", progress=False)
        second = list(run.next_requests())
        assert [request.messages[0]["content"] for request in second] == [f"even {n} again: so" for n in (0, 2, 4)]
        assert run.replay().settled == 4


def test_nine_tenths_of_a_server_are_used(tmp_path: Path) -> None:
    write_posts(tmp_path, [f"post {n}" for n in range(1200)])
    rates = []
    with serve_in_process(tmp_path / "log", latency=0.2, slots=32) as url:
        for attempt in range(5):  # other work on the machine is not the client's fault
            start = time.monotonic()
            # A quarter more than the slots, so that one is always waiting at the server.
            outcome, _ = ask(tmp_path, url, settings=str(attempt), concurrency=40)
            rates.append(1200 / (time.monotonic() - start))
            assert outcome.requests == 1200
            if rates[-1] >= 0.9 * 160:
                break
            for file in (tmp_path / "journal").iterdir():
                file.unlink()
    assert max(rates) >= 0.9 * 160, rates


CHILD = """
import json, sys, time
from dynkp.chat import post_stream
from dynkp.chat.client import ChatClient
from dynkp.chat.journal import AnswerJournal
from dynkp.chat.post_stream import PostStream
from dynkp.chat.run import RequestRun
from tests.support.conversations import once
began = []
class Client(ChatClient):
    async def ask(self, *given):
        began.append(time.process_time())
        return await super().ask(*given)
folder, url = sys.argv[1:]
with AnswerJournal(folder + "/journal") as journal:
    run = RequestRun(PostStream(folder + "/posts.jsonl"), once, journal, settings="s", progress=False)
    outcome = run.ask(lambda: Client(url, concurrency=8), concurrency=8)
# Not getrusage: Linux hands a new program the peak of the process that started it.
peak = next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([began[0], peak, outcome.settled, outcome.requests]))
"""


def million_line(number: int) -> bytes:
    return b'{"id": "p%d", "text": "post number %d about the sea", "keyphrases": ["sea", "fish %d"]}' % ((number,) * 3)


def million_key(number: int) -> bytes:
    return blake2b(b"%d" % number, digest_size=16).digest()


def test_a_million_posts_go_on(tmp_path: Path) -> None:
    count, cursor = 1_000_000, 999_900
    settings = blake2b(b"s", digest_size=16).digest()
    folder = tmp_path / "journal"
    folder.mkdir()
    open_posts = {10, *range(cursor - 5, count, 20)}
    offset = 0
    with (tmp_path / "posts.jsonl").open("wb") as posts, (folder / "answers-00001.jsonl").open("wb") as answers:
        for number in range(count):
            line = million_line(number)
            posts.write(line + b"\n")
            if number < cursor:
                offset += len(line) + 1
            if number in open_posts:
                continue
            row = b'{"key": "%s", "failed": false, "prompt_tokens": 9, "completion_tokens": 9, "model": "m", "text": "%d %s"}\n'
            answers.write(row % (million_key(number).hex().encode(), number, b"why " * 20))
    stream = PostStream(tmp_path / "posts.jsonl")
    (folder / "cursor.json").write_text(json.dumps({"posts": stream.identity(), "offset": offset, "index": cursor}))
    began = time.process_time()
    with AnswerJournal(folder) as journal:
        built = time.process_time() - began
        for number in range(count):
            if number not in open_posts:
                journal.settle(blake2b(settings + million_line(number), digest_size=16).digest(), million_key(number))
    with serve() as (url, server):
        result = subprocess.run(
            [sys.executable, "-c", CHILD, str(tmp_path), url], capture_output=True, text=True, cwd=REPOSITORY, timeout=200
        )
        assert result.returncode == 0, result.stderr
        seconds, mebibytes, done, requests = json.loads(result.stdout)
        assert done == count and requests == len(open_posts) == len(server.bodies)
    assert built < 20  # the index, from the answers alone
    assert seconds < 10
    assert mebibytes < 1024


def test_any_exception_at_a_post_is_its_failure(tmp_path: Path) -> None:
    errors = [
        ValueError("v"),
        TypeError("t"),
        RecursionError("r"),
        KeyError("k"),
        MemoryError(),
        OSError(24, "files"),
        OverflowError(),
    ]

    def conversation(post: dict[str, Any]) -> Generator[ChatRequest, ChatAnswer, None]:
        kind, number = post["text"].split()
        if kind == "before":
            raise errors[int(number)]
        if kind == "body":
            yield ChatRequest([{"role": "user", "content": 7}], {"model": "m"})
        answer = yield question(post["text"])
        assert answer.text
        if kind == "after":
            raise errors[int(number)]

    texts = [f"{kind} {number}" for number in range(len(errors)) for kind in ("before", "good", "after")]
    write_posts(tmp_path, [*texts, "body 1", "good 100"])
    with serve() as (url, _):
        for _ in range(2):  # the second one replays what the first has asked
            outcome, answers = ask(tmp_path, url, conversation)
            assert (outcome.stopped, outcome.settled, outcome.failed) == (None, len(texts) + 2, 2 * len(errors) + 1)
            failed = [row["failed"] for row in answers if row]
            assert failed == [not text.startswith("good") for text in [*texts, "body 1", "good 100"]]
            (tmp_path / "journal" / "index.sqlite").unlink()


def test_workers_survive_cancellations_of_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send = ChatClient._send
    swallowed = []

    async def broken(self: ChatClient, body: Any) -> ChatAnswer:
        if "cancelled" in last_text(dict(body)):
            raise asyncio.CancelledError
        if "swallows" in last_text(dict(body)):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                swallowed.append(True)
        return await send(self, body)

    monkeypatch.setattr(ChatClient, "_send", broken)
    write_posts(tmp_path, [f"{'cancelled' if number % 2 else 'good'} {number}" for number in range(40)])
    with serve() as (url, _):
        outcome, answers = ask(tmp_path, url)
        assert (outcome.stopped, outcome.settled, outcome.failed) == (None, 40, 20)
        # An error that ends the run, such as a full disk, ends it also where a worker swallows its cancellation.
        write_posts(tmp_path, ["swallows 1", "swallows 2", "good 101", "good 102"])
        monkeypatch.setattr(AnswerJournal, "append", lambda *_: (_ for _ in ()).throw(OSError(28, "no space left")))
        began = time.monotonic()
        with pytest.raises(OSError, match="no space left"):
            ask(tmp_path, url, settings="other")
        assert swallowed and time.monotonic() - began < 20


@pytest.mark.parametrize("posts", [1, 3, 30])
@pytest.mark.parametrize("status", [None, 503])
def test_a_dead_server_is_reported_and_its_posts_are_asked_again(
    tmp_path: Path, posts: int, status: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    class Away(ChatServer):
        async def answer(self, writer: Any, body: Any) -> bool:
            await respond(writer, 503, {"error": {"message": "starting"}})
            return True

    write_posts(tmp_path, [f"post {n}" for n in range(posts)])
    with serve(Away) as (url, _):
        outcome, _ = ask(tmp_path, "http://127.0.0.1:9/v1" if status is None else url)
    failed = min(posts, 10)
    assert outcome.stopped == "server" and outcome.failed >= failed
    assert "failed, the last: 2 attempts, the last: " in outcome.reason
    assert caplog.text.count("cannot be reached") == 1
    with serve() as (url, server):
        outcome, answers = ask(tmp_path, url)
        assert (outcome.stopped, outcome.failed, outcome.settled, len(server.bodies)) == (None, 0, posts, posts)
        outcome, _ = ask(tmp_path, url)
        assert len(server.bodies) == posts


def test_posts_that_met_a_restart_are_asked_again(tmp_path: Path) -> None:
    class Restarts(ChatServer):
        async def answer(self, writer: Any, body: Any) -> bool:
            if 10 <= len(self.bodies) < 20:
                await respond(writer, 502, {"error": {"message": "bad gateway"}})
                return True
            return await super().answer(writer, body)

    write_posts(tmp_path, [f"post {n}" for n in range(40)])
    with serve(Restarts) as (url, _):
        outcome, _ = ask(tmp_path, url, attempts=1)
        assert outcome.stopped is None and 0 < outcome.failed <= 10
        outcome, _ = ask(tmp_path, url)
        assert (outcome.failed, outcome.settled) == (0, 40)
