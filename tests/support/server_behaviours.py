"""What servers may send in place of an answer, as data: each behaviour with the outcome that its post must have.

The outcomes:

- `ANSWER`: a rationale;
- `REJECTED`: an answer that the filters reject;
- `FAILED`: the request fails, and the run goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.support.chat_server import USAGE, ChatServer, last_text

ANSWER, REJECTED, FAILED = "answer", "rejected", "failed"
RATIONALE = "People who collect {name} search for it, because the picture and the words both show {name} quite clearly."
ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m"
# More than the limit, but not much more: what is cut must be cut by size, not by patience.
TOO_MANY = 9 << 20


@dataclass(frozen=True)
class Behaviour:
    """A server's behaviour.

    Args:
        name: Its name, which is the text of the post that meets it.
        outcome: `ANSWER`, `REJECTED` or `FAILED`.
        body: The body of the response.
        status: The status line, without the version.
        headers: Headers that replace the usual ones; None leaves one out.
        chunks: Generates pieces to send after the body: bytes, or seconds to wait. The connection is closed after them.
        raw: Bytes to send in place of a response.
        closes: Whether the connection is closed.
    """

    name: str
    outcome: str
    body: bytes = b""
    status: str = "200 OK"
    headers: Mapping[str, str | None] | None = None
    chunks: Callable[[], Iterable[bytes | float]] | None = None
    raw: bytes | None = None
    closes: bool = False

    def response(self) -> bytes:
        """The response's head and body."""
        if self.raw is not None:
            return self.raw
        headers = {"content-type": "application/json", "content-length": str(len(self.body)), **(self.headers or {})}
        lines = [f"{name}: {value}\r\n" for name, value in headers.items() if value is not None]
        return f"HTTP/1.1 {self.status}\r\n{''.join(lines)}\r\n".encode("latin-1") + self.body


def completion(name: str, content: Any = None, *, finish_reason: Any = "stop", usage: Any = USAGE, **message: Any) -> Any:
    """A chat completion about a post."""
    said = {"role": "assistant", "content": RATIONALE.format(name=name) if content is None else content, **message}
    return {"id": "1", "choices": [{"index": 0, "finish_reason": finish_reason, "message": said}], "usage": usage}


def encoded(name: str, *arguments: Any, **options: Any) -> bytes:
    """The same as bytes."""
    return json.dumps(completion(name, *arguments, **options)).encode()


def gzipped(data: bytes) -> bytes:
    return zlib.compress(data, wbits=31)


@functools.cache
def gzip_bomb(megabytes: int) -> bytes:
    """A small gzip stream that decodes to many megabytes of JSON."""
    packer = zlib.compressobj(9, wbits=31)
    parts = [packer.compress(b'{"choices": "')]
    parts += [packer.compress(b"x" * (1 << 20)) for _ in range(megabytes)]
    return b"".join([*parts, packer.compress(b'"}'), packer.flush()])


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (*pieces, b""))


def endless() -> Iterator[bytes]:
    for _ in range(64):
        yield b"%x\r\n%s\r\n" % (1 << 20, b" " * (1 << 20))


def drops() -> Iterator[bytes | float]:
    for _ in range(200):
        yield b" "
        yield 0.1


def behaviours(elsewhere: str) -> list[Behaviour]:
    """All behaviours.

    Args:
        elsewhere: Address of another server, which must not be asked.
    """
    found: list[Behaviour] = []

    def add(name: str, outcome: str, body: bytes | None = None, **more: Any) -> None:
        found.append(Behaviour(name, outcome, encoded(name) if body is None else body, **more))

    # The way of the answer.
    add("plain", ANSWER)
    add("gzip", ANSWER, gzipped(encoded("gzip")), headers={"content-encoding": "gzip"})
    add("chunked", ANSWER, chunked(encoded("chunked")), headers={"content-length": None, "transfer-encoding": "chunked"})
    add("until closed", ANSWER, headers={"content-length": None}, closes=True)
    add("without a type", ANSWER, headers={"content-type": None})
    for status in (301, 302, 303, 307, 308):
        add(f"redirect {status}", FAILED, status=f"{status} Go", headers={"location": f"{elsewhere}/chat/completions"})
    add("redirect nowhere", FAILED, status="302 Go")
    add("redirect with escapes", FAILED, status="302 Go", headers={"location": f"http://x/{ESCAPES}"})
    # Sizes and encodings.
    add("gzip bomb", FAILED, gzip_bomb(40), headers={"content-encoding": "gzip"})
    add("gzip twice", FAILED, gzipped(gzipped(b"{}")), headers={"content-encoding": "gzip, gzip"})
    add("gzip cut off", FAILED, gzipped(encoded("x"))[:-20], headers={"content-encoding": "gzip"})
    add("gzip that is none", FAILED, headers={"content-encoding": "gzip"})
    add("brotli", FAILED, headers={"content-encoding": "br"})
    add("a bomb as an error", FAILED, gzip_bomb(20), status="400 No", headers={"content-encoding": "gzip"})
    add("nine megabytes", FAILED, encoded("x", "y" * TOO_MANY))
    add("nine megabytes of error", FAILED, b"x" * TOO_MANY, status="400 No")
    add("endless", FAILED, b"", headers={"content-length": None, "transfer-encoding": "chunked"}, chunks=endless)
    add("drop by drop", FAILED, b"", headers={"content-length": "1000"}, chunks=drops)
    add("shorter than it says", FAILED, headers={"content-length": "100000"}, closes=True)
    add("two lengths", FAILED, headers={"content-length": "5\r\ncontent-length: 7"}, closes=True)
    add("a header of 300 kB", FAILED, headers={"x-long": "x" * 300_000}, closes=True)
    add("no HTTP", FAILED, raw=b"SSH-2.0-OpenSSH_9.6\r\n", closes=True)
    add("closed", FAILED, raw=b"", closes=True)
    add("silence", FAILED, raw=b"", chunks=lambda: [30.0])
    # Statuses.
    add("empty", FAILED, b"")
    add("no content", FAILED, b"", status="204 No Content", headers={"content-length": None})
    for status in (400, 404, 418, 451, 500, 501, 503, 599):
        add(f"status {status}", FAILED, b'{"error": {"message": "no"}}', status=f"{status} No")
    add("an error nested 100,000 deep", FAILED, b"[" * 100_000, status="400 No")
    add(
        "an error with escapes",
        FAILED,
        json.dumps({"error": {"message": ESCAPES}}, ensure_ascii=False).encode(),
        status="422 No",
    )
    # What is no completion.
    add("a page", FAILED, b"<html><body>Sign in</body></html>", headers={"content-type": "text/html"})
    add("events", FAILED, b'data: {"choices": []}\n\ndata: [DONE]\n\n', headers={"content-type": "text/event-stream"})
    add("null", FAILED, b"null")
    add("a list", FAILED, b"[]")
    add("no choices", FAILED, b'{"choices": []}')
    add("an error with status 200", FAILED, b'{"error": {"message": "overloaded"}}')
    add("a number as content", FAILED, encoded("x", 7))
    add("nested 100,000 deep", FAILED, b'{"a": ' * 100_000)
    add("nested 300 deep", ANSWER, encoded("nested 300 deep")[:-1] + b', "a": ' + b"[" * 300 + b"]" * 300 + b"}")
    add("nested 900 deep", FAILED, b'{"choices": ' + b"[" * 900 + b"]" * 900 + b"}")
    add(
        "reasoning nested 300 deep",
        ANSWER,
        encoded("reasoning").replace(b'"role"', b'"reasoning": ' + b"[" * 300 + b"]" * 300 + b', "role"'),
    )
    add("a number of 5,000 digits", FAILED, b'{"choices": ' + b"9" * 5000 + b"}")
    # Numbers.
    usage = {"prompt_tokens": 10**400, "completion_tokens": 10**400}
    add("counts of 400 digits", ANSWER, encoded("counts of 400 digits", usage=usage))
    add("counts below zero", ANSWER, encoded("counts below zero", usage={"prompt_tokens": -5, "completion_tokens": -5}))
    add("no counts", ANSWER, encoded("no counts", usage=None))
    add("counts that are none", FAILED, encoded("x", usage={"prompt_tokens": float("nan")}))
    # Reasons for the end.
    for reason in ("length", "content_filter", "max_tokens", "tool_calls", "", None, {"type": "stop"}, 7, "x" * 100_000):
        name = f"finish {reason!r:.20}"
        add(name, REJECTED, encoded(name, finish_reason=reason))
    for reason in ("abort", "error"):
        add(f"finish {reason}", FAILED, encoded("x", finish_reason=reason))
    # Texts.
    add("nothing", REJECTED, encoded("x", ""))
    add("no text", REJECTED, json.dumps({"choices": [{"message": {}, "finish_reason": "stop"}]}).encode())
    add("refusal", REJECTED, json.dumps(completion("x", content="", refusal="I'm sorry, but I can't.")).encode())
    add("parts", ANSWER, encoded("parts", [{"type": "text", "text": RATIONALE.format(name="parts")}]))
    add("half a pair", ANSWER, encoded("half a pair", RATIONALE.format(name="half \ud83d pair")))
    add("escapes", ANSWER, encoded("escapes", RATIONALE.format(name=ESCAPES)))
    add("not UTF-8", ANSWER, encoded("not UTF-8").replace(b"collect", b"\xff\xfe"))
    add("a megabyte of braces", REJECTED, encoded("x", "{" * (1 << 20)))
    return found


class HostileServer(ChatServer):
    """Answers a request by the behaviour that its text names, and others as usual.

    Args:
        elsewhere: As for `behaviours`.
    """

    def __init__(self, elsewhere: str = "http://127.0.0.1:9", **options: Any):
        super().__init__(**options)
        self.behaviours = {behaviour.name: behaviour for behaviour in behaviours(elsewhere)}

    async def answer(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> bool:
        named = last_text(body).partition("<<")[2].partition(">>")[0]
        if named not in self.behaviours:
            return await super().answer(writer, body)
        behaviour = self.behaviours[named]
        with contextlib.suppress(ConnectionError):
            writer.write(behaviour.response())
            await writer.drain()
            for piece in behaviour.chunks() if behaviour.chunks else ():
                if isinstance(piece, bytes):
                    writer.write(piece)
                    await writer.drain()
                else:
                    await asyncio.sleep(piece)
        return not (behaviour.closes or behaviour.chunks)
