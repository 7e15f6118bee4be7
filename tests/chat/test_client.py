"""Invariants of the client:

- each transient failure (429, 5xx, timeout, closed connection, half a body, invalid JSON) is followed by another attempt, up to
  `max_attempts`; 429 does not count; a refusal of the request itself (400) is not repeated;
- 401 ends the run, and so does 404 while nothing has been answered; 404 later fails one request;
- the key is in the header and nowhere else: not in an answer or an error, whatever the server echoes, in whatever spelling;
- Retry-After is read in each of its forms.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from dynkp.chat.client import ChatClient, RequestFailed, RunStopped, ServerUnusable, read_retry_after
from dynkp.chat.request import ChatAnswer, ChatRequest
from tests.support.chat_server import ChatServer, http_head, respond, serve

KEY = "secret-0123456789abcdefXYZ"
KEY_WITH_SLASHES = "ab/cd+efgh/SECRET=="
QUESTION = ChatRequest([{"role": "user", "content": "Why?"}], {"model": "m", "max_tokens": 5, "top_k": 3})


class Script(ChatServer):
    """Answers by the list `script`: a fault's name, a status, or "" for an answer."""

    script: Iterator[Any]

    def __init__(self, script: list[Any], **options: Any) -> None:
        super().__init__(silence=60, **options)
        self.script = iter(script)

    async def answer(self, writer: Any, body: Any) -> bool:
        step = next(self.script)
        self.random.choice = lambda _: step  # type: ignore[method-assign]
        self.faults = 1.0 if step else 0.0
        if isinstance(step, int):
            await respond(writer, step, {"error": {"message": f"no: {self.headers[-1].get('authorization')}"}})
            return True
        return await super().answer(writer, body)


def ask(script: list[Any], times: int = 1, **options: Any) -> tuple[list[Any], ChatClient, ChatServer]:
    """What becomes of the question, asked several times in turn: answers and exceptions."""

    async def run(url: str) -> tuple[list[Any], ChatClient]:
        client = ChatClient(url, **{"concurrency": 4, "timeout": 0.5, "first_pause": 0.001, **options})
        found: list[Any] = []
        for _ in range(times):
            try:
                found.append(await client.ask(QUESTION))
            except (RequestFailed, ServerUnusable) as error:
                found.append(error)
        await client.close()
        return found, client

    with serve(Script, script=script) as (url, server):
        found, client = asyncio.run(run(url))
    assert next(server.script, None) is None, "not all of the script was asked for"
    return found, client, server


def test_an_answer_and_what_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    (answer,), client, server = ask([""])
    assert isinstance(answer, ChatAnswer) and "look for it" in answer.text
    assert (answer.finish_reason, answer.prompt_tokens, answer.completion_tokens) == ("stop", 100, 50)
    assert server.bodies == [QUESTION.body()]
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert client.sent == client.answered == 1


@pytest.mark.parametrize("fault", ["429", "500", 503, 529, "half", "garbage", "closed", "silence"])
def test_transient_failures_are_tried_again(fault: Any) -> None:
    (answer,), client, _ = ask([fault, fault, ""])
    assert isinstance(answer, ChatAnswer)
    assert (client.sent, client.answered) == (3, 1)
    assert client.pace.limit < 4


def test_a_request_that_keeps_failing_is_given_up() -> None:
    (error,), client, _ = ask(["500", "garbage", "closed"], max_attempts=3)
    assert isinstance(error, RequestFailed) and str(error).startswith("3 attempts, the last: connection failed")


def test_rate_limits_do_not_count_as_attempts() -> None:
    (answer,), _, _ = ask(["429"] * 4 + ["500", ""], max_attempts=2)
    assert isinstance(answer, ChatAnswer)


def test_rate_limits_without_end_stop_the_run() -> None:
    (error,), _, _ = ask(["429"], patience=0.0)
    assert isinstance(error, ServerUnusable) and "no answer for 0 s" in str(error)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_the_server_objects_to_is_not_repeated(status: int) -> None:
    (error,), _, _ = ask([status])
    assert isinstance(error, RequestFailed) and f"status {status}" in str(error)


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_a_server_that_refuses_everyone_stops_the_run(status: int) -> None:
    (error,), _, _ = ask([status])
    assert isinstance(error, ServerUnusable)


def test_403_and_404_later_are_about_one_request() -> None:
    found, _, _ = ask(["", 403, 404, 401], times=4)
    assert [type(one) for one in found] == [ChatAnswer, RequestFailed, RequestFailed, ServerUnusable]


def test_a_server_that_is_not_there() -> None:
    async def run() -> None:
        client = ChatClient("http://127.0.0.1:9/v1", concurrency=1, max_attempts=2, first_pause=0.001)
        with pytest.raises(RequestFailed, match="2 attempts, the last: connection failed"):
            await client.ask(QUESTION)
        await client.close()

    asyncio.run(run())


def test_a_stopped_run_sends_nothing_again() -> None:
    async def run(url: str) -> int:
        client = ChatClient(url, concurrency=1, first_pause=30)
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(0.3, stop.set)
        start = time.monotonic()
        with pytest.raises(RunStopped):
            await client.ask(QUESTION, stop)
        assert time.monotonic() - start < 10
        with pytest.raises(RunStopped):
            await client.ask(QUESTION, stop)
        await client.close()
        return client.sent

    with serve(Script, script=["500"]) as (url, _):
        assert asyncio.run(run(url)) == 1


@pytest.mark.parametrize("step", [400, 401, 500, ""])
def test_an_echoed_key_is_redacted(
    step: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level(logging.DEBUG)

    class Echo(Script):
        def __init__(self, script: list[Any]) -> None:
            super().__init__(script)
            self.reply = lambda body: {"content": f"your key is {KEY}", "reasoning_content": f"Bearer {KEY}"}

    async def run(url: str) -> Any:
        client = ChatClient(url, concurrency=1, max_attempts=1, key_variable="MY_KEY")
        try:
            return await client.ask(QUESTION)
        except (RequestFailed, ServerUnusable) as error:
            return error
        finally:
            await client.close()

    with serve(Echo, script=[step]) as (url, server):
        found = asyncio.run(run(url))
    assert KEY in server.headers[0]["authorization"]
    said = repr(found) + str(found) + repr(vars(found)) + "".join(capsys.readouterr())
    assert KEY not in said and "secret" not in said
    assert KEY not in caplog.text


def respelt(key: str) -> list[str]:
    """How servers' JSON, in an error's repr or not, may spell a key."""
    slashes = key.replace("/", r"\/")
    codes = "".join(f"\\u{ord(one):04X}" for one in key)
    return [key, slashes, codes, key.replace("/", r"\u002f"), repr(slashes)[1:-1], quote(key, safe=""), key.replace("/", "%2f")]


@pytest.mark.parametrize("spelt", respelt(KEY_WITH_SLASHES))
@pytest.mark.parametrize("status", [200, 400])
def test_a_key_is_found_however_it_is_spelt(spelt: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY_WITH_SLASHES}\n")
    frame = '{"choices": [{"message": {"content": "MESSAGE"}}]}' if status == 200 else '{"error": "MESSAGE"}'
    content = frame.replace("MESSAGE", f"sent: {spelt}.")

    class Raw(ChatServer):
        async def answer(self, writer: Any, body: Any) -> bool:
            writer.write(http_head(status, len(content)) + content.encode())
            await writer.drain()
            return True

    async def run(url: str) -> str:
        client = ChatClient(url, concurrency=1, max_attempts=1)
        try:
            return (await client.ask(QUESTION)).text
        except RequestFailed as error:
            return str(error)
        finally:
            await client.close()

    with serve(Raw) as (url, _):
        said = asyncio.run(run(url))
    assert "sent: [key]." in said


def test_a_key_does_not_follow_to_another_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    class Elsewhere(ChatServer):
        async def answer(self, writer: Any, body: Any) -> bool:
            writer.write(http_head(307, 0, f"location: {other}/chat/completions\r\n"))
            await writer.drain()
            return True

    async def run(url: str) -> None:
        client = ChatClient(url, concurrency=1)
        with pytest.raises(RequestFailed, match="status 307: redirects are not followed"):
            await client.ask(QUESTION)
        await client.close()

    with serve() as (other, reached), serve(Elsewhere) as (url, asked):
        asyncio.run(run(url))
    assert KEY in str(asked.headers) and reached.headers == []


def test_a_key_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("two\nlines of a file", "sk-sécret-key"):
        monkeypatch.setenv("OPENAI_API_KEY", wrong)
        with pytest.raises(ValueError, match="OPENAI_API_KEY must hold a key: one line of ASCII") as error:
            ChatClient("http://host/v1", concurrency=1)
        assert wrong[:5] not in str(error.value)
    with pytest.raises(ValueError, match="must be the name of an environment variable") as error:
        ChatClient("http://host/v1", concurrency=1, key_variable=KEY)
    assert KEY not in str(error.value)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host/v1", "http://user:password@host/v1", "http://host/v1?key=abc"])
def test_addresses_that_are_none_or_hold_a_secret(url: str) -> None:
    with pytest.raises(ValueError, match="base_url must") as error:
        ChatClient(url, concurrency=1)
    assert "password@" not in str(error.value) and "abc" not in str(error.value)


def test_options_out_of_range() -> None:
    with pytest.raises(ValueError, match="timeout=0 must be above 0"):
        ChatClient("http://host/v1", concurrency=1, timeout=0)


def test_retry_after_in_each_form() -> None:
    now = 1_700_000_000.0
    assert read_retry_after({}) is None
    assert read_retry_after({"retry-after": "2.5"}) == 2.5
    assert read_retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert read_retry_after({"retry-after": email.utils.formatdate(now + 30, usegmt=True)}, now) == 30
    assert read_retry_after({"retry-after": email.utils.formatdate(now - 30, usegmt=True)}, now) == 0
    assert read_retry_after({"retry-after": "soon"}) is None
    assert read_retry_after({"retry-after": "nan"}) is None
    assert read_retry_after({"retry-after": "1e9"}) == 600
    assert read_retry_after({"retry-after": "-3"}) == 0
