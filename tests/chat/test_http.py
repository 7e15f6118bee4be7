"""Invariants of the HTTP client:

- every behaviour of `tests.support.server_behaviours` ends in an answer or a failed request, within the time limit;
- a decoded body has at most 8 MB, and no more memory is used for it; only gzip is decoded, once;
- redirects are not followed; loopback addresses are asked without the environment's proxy, others with it;
- a key over plain HTTP is warned of; the organisation's headers go to OpenAI's host alone;
- no control character of a server is in an error.
"""

from __future__ import annotations

import asyncio
import logging
import time
import tracemalloc
import zlib
from typing import Any

import pytest

from dynkp.chat.client import ChatClient, RequestFailed
from dynkp.chat.http import MAX_ANSWER_BYTES, AnswerTooLarge, BodyDecoder, UndecodableAnswer, is_loopback
from dynkp.chat.request import ChatAnswer, ChatRequest
from dynkp.chat.settings import RunSettings
from tests.support.chat_server import serve
from tests.support.server_behaviours import FAILED, HostileServer, behaviours, gzip_bomb, gzipped


def named(text: str) -> ChatRequest:
    return ChatRequest([{"role": "user", "content": text}], {"model": "m"})


def ask(url: str, *texts: str, **options: Any) -> list[Any]:
    """What becomes of requests, sent one after another: answers and exceptions."""

    async def run() -> list[Any]:
        client = ChatClient(url, **{"concurrency": 4, "timeout": 20, "first_pause": 0.001, "max_attempts": 1, **options})
        found: list[Any] = []
        for text in texts:
            try:
                found.append(await client.ask(named(text)))
            except RequestFailed as error:
                found.append(error)
        await client.close()
        return found

    return asyncio.run(run())


def test_the_corpus_has_at_least_32_behaviours() -> None:
    found = behaviours("")
    assert len({behaviour.name for behaviour in found}) == len(found) >= 64


def test_every_behaviour_is_an_answer_or_a_failed_request() -> None:
    wrong = []
    with serve() as (elsewhere, reached), serve(HostileServer, elsewhere=elsewhere) as (url, _):
        for behaviour in behaviours(elsewhere):
            began = time.monotonic()
            slow = behaviour.name in ("silence", "drop by drop")
            first, found, last = ask(url, "good", f"<<{behaviour.name}>>", "good", timeout=0.5 if slow else 20)
            kinds = [ChatAnswer, RequestFailed if behaviour.outcome == FAILED else ChatAnswer, ChatAnswer]
            seconds = time.monotonic() - began
            printable = isinstance(found, ChatAnswer) or str(found).isprintable()
            if [type(one) for one in (first, found, last)] != kinds or not printable or seconds > 15:
                wrong.append((behaviour.name, f"{found!r:.200}", last, seconds))
        assert wrong == [] and reached.bodies == []


def test_a_redirect_is_a_failure_that_names_the_other_address() -> None:
    with serve() as (elsewhere, reached), serve(HostileServer, elsewhere=elsewhere) as (url, _):
        (error,) = ask(url, "<<redirect 307>>")
        assert f"status 307: redirects are not followed. If {elsewhere}/chat/completions is right" in str(error)
        assert reached.bodies == []


def test_a_bomb_takes_no_more_memory_than_the_limit() -> None:
    bomb = gzip_bomb(400)
    assert len(bomb) < 500_000
    tracemalloc.start()
    decoder = BodyDecoder("gzip")
    with pytest.raises(AnswerTooLarge, match="more than 8,388,608 bytes"):
        decoder.add(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * MAX_ANSWER_BYTES


def test_bodies_are_decoded_piece_by_piece_up_to_the_limit() -> None:
    text = bytes(range(256)) * 4
    for encoding, body in (("gzip", gzipped(text)), ("", text), ("identity", text), (" X-GZIP ", gzipped(text))):
        for limit in (1024, 5000):
            decoder = BodyDecoder(encoding, limit=limit)
            for place in range(0, len(body), 7):
                decoder.add(body[place : place + 7])
            assert decoder.finish() == text
        with pytest.raises(AnswerTooLarge):
            BodyDecoder(encoding, limit=1023).add(body)
    for encoding in ("br", "zstd", "deflate", "gzip, gzip"):
        with pytest.raises(UndecodableAnswer, match="was not asked for"):
            BodyDecoder(encoding)
    cut = BodyDecoder("gzip")
    cut.add(gzipped(text)[:-1])
    with pytest.raises(UndecodableAnswer, match="not complete"):
        cut.finish()
    with pytest.raises(UndecodableAnswer, match="not valid gzip"):
        BodyDecoder("gzip").add(zlib.compress(text))


def test_loopback_addresses() -> None:
    for url in ("http://localhost:1", "http://127.1.2.3/v1", "http://[::1]:8/v1", "http://a.localhost", "http://LOCALHOST./v1"):
        assert is_loopback(url), url
    for url in ("http://10.0.0.1", "http://localhost.example.org", "http://example.org/localhost", "http://[::2]", "nothing"):
        assert not is_loopback(url), url


def test_the_proxy_of_the_environment_is_not_used_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as (proxy, seen), serve() as (url, server):
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.removesuffix("/v1"))
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        (answer,) = ask(url, "good")
        assert isinstance(answer, ChatAnswer) and len(server.bodies) == 1 and seen.bodies == []
        (answer,) = ask("http://teacher.invalid/v1", "good")  # which only the proxy could know
        assert isinstance(answer, ChatAnswer) and len(seen.bodies) == 1


def test_a_key_without_encryption_is_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for key, url, warned in (
        ("secret-0123456789", "http://teacher.example.org/v1", True),
        ("secret-0123456789", "https://teacher.example.org/v1", False),
        ("secret-0123456789", "http://127.0.0.1:8000/v1", False),
        ("", "http://teacher.example.org/v1", False),
    ):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            ask(url)
        assert ("without encryption" in caplog.text) == warned, (key, url)
        assert "secret" not in caplog.text


def test_the_organisation_is_told_to_its_host_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-private")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-private")
    monkeypatch.setenv("OPENAI_API_KEY", "secret-0123456789")
    with serve() as (url, server):
        ask(url, "good")
    assert "private" not in str(server.headers)

    async def headers(url: str) -> dict[str, Any]:
        client = ChatClient(url, concurrency=1)
        await client.close()
        return dict(client._client.default_headers)

    assert "org-private" in asyncio.run(headers("https://api.openai.com/v1")).values()
    assert "org-private" not in asyncio.run(headers("https://api.openai.com.example.org/v1")).values()


def test_the_default_patience_is_longer_than_a_restart() -> None:
    settings = RunSettings("posts.jsonl", "r.jsonl", "m", "http://127.0.0.1:9/v1")
    client = settings.client()
    for pauses, attempts in ((client.first_pause, client.max_attempts), (settings.retry_pause, settings.max_attempts)):
        shortest = sum(min(60.0, pauses * 2**number) * 0.5 for number in range(attempts - 1))
        assert shortest > 120
