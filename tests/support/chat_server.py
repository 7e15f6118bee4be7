"""A chat server for tests, which can be slow, full, and broken in every way that servers are.

As a process: `python tests/support/chat_server.py PORT LOG [--option=JSON]`: every request that arrives is written to LOG, with
what was done with it, before anything is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FAULTS = ("429", "500", "half", "garbage", "closed", "silence")
USAGE = {"prompt_tokens": 100, "completion_tokens": 50}


def last_text(body: dict[str, Any]) -> str:
    """The text of the last user message."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content if part["type"] == "text")


def reply_to(body: dict[str, Any]) -> dict[str, Any]:
    """An answer that names the keyphrases it was told, and differs from post to post."""
    text = last_text(body)
    told = re.search(r'"Keyphrases": (.*)', text)
    words = " ".join(f"w{value % 997}x" for value in hashlib.sha256(text.encode()).digest()[:24])
    return {"content": f"People who care about {told[1] if told else 'this'} would look for it, since {words}."}


class ChatServer:
    """Answers every request after `latency` seconds, `slots` at a time.

    Args:
        log: file that requests are logged to, one JSON row each.
        faults: share of requests answered by a fault, chosen at random.
        cursed: requests whose text has this word are always answered 500.
        latency, slots: how fast.
        silence: seconds of the fault `silence`.
        full: whether requests beyond the slots are answered 429, rather than made to wait.
        seed: of the faults.
        reply: from the body of a request to the message of its answer.
    """

    def __init__(
        self,
        log: str | None = None,
        *,
        faults: float = 0.0,
        cursed: str = "",
        latency: float = 0.0,
        slots: int = 10_000,
        silence: float = 60.0,
        full: bool = False,
        seed: int = 0,
        reply: Any = reply_to,
    ):
        self.log = open(log, "ab", buffering=0) if log else None
        self.faults, self.cursed, self.latency, self.silence, self.full = faults, cursed, latency, silence, full
        self.random = random.Random(seed)
        self.reply = reply
        self.free = asyncio.Semaphore(slots)
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.under_way = self.most_under_way = 0
        self.keep_bodies = True

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                fields = (line.partition(": ") for line in head.split("\r\n")[1:])
                headers = {name.lower(): value for name, _, value in fields}
                body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or b"null")
                if self.keep_bodies:
                    self.bodies.append(body)
                    self.headers.append(headers)
                self.under_way += 1
                self.most_under_way = max(self.most_under_way, self.under_way)
                try:
                    if not await self.answer(writer, body):
                        break
                finally:
                    self.under_way -= 1
        writer.close()

    async def answer(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> bool:
        """Whether the connection may be used again."""
        fault = self.random.choice(FAULTS) if self.random.random() < self.faults else ""
        if self.cursed and self.cursed in last_text(body):
            fault = "500"
        if self.full and self.free.locked():
            fault = "429"
        if self.log:
            text = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
            self.log.write(json.dumps({"text": text, "fault": fault}).encode() + b"\n")
        if fault == "429":
            await respond(writer, 429, {"error": {"message": "slow down"}}, "retry-after-ms: 20\r\n")
            return True
        if fault == "500":
            await respond(writer, 500, {"error": {"message": "it broke"}})
            return True
        if fault == "closed":
            return False
        if fault == "silence":
            await asyncio.sleep(self.silence)
            return False
        async with self.free:
            await asyncio.sleep(self.latency)
        content = json.dumps(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 1,
                "model": body["model"],
                "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", **self.reply(body)}}],
                "usage": USAGE,
            }
        ).encode()
        if fault == "garbage":
            content = content.replace(b'"choices": [', b'"choices": [[[')
        if fault == "half":
            writer.write(http_head(200, len(content)) + content[: len(content) // 2])
            await writer.drain()
            return False
        writer.write(http_head(200, len(content)) + content)
        await writer.drain()
        return True


def http_head(status: int, length: int, more: str = "") -> bytes:
    return f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{more}content-length: {length}\r\n\r\n".encode()


async def respond(writer: asyncio.StreamWriter, status: int, body: Any, more: str = "") -> None:
    content = json.dumps(body).encode()
    writer.write(http_head(status, len(content), more) + content)
    await writer.drain()


@contextlib.contextmanager
def serve(server_class: type[ChatServer] = ChatServer, **options: Any) -> Iterator[tuple[str, ChatServer]]:
    """The server in a thread of this process; its address, and itself, to look at what it was sent."""
    started = threading.Event()
    found: dict[str, Any] = {}

    async def run() -> None:
        found["loop"], found["stop"] = asyncio.get_running_loop(), asyncio.Event()
        found["server"] = server_class(**options)
        listener = await asyncio.start_server(found["server"].handle, "127.0.0.1", 0, limit=1 << 24)
        found["port"] = listener.sockets[0].getsockname()[1]
        started.set()
        await found["stop"].wait()
        listener.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield f"http://127.0.0.1:{found['port']}/v1", found["server"]
    finally:
        found["loop"].call_soon_threadsafe(found["stop"].set)
        thread.join(10)


@contextlib.contextmanager
def serve_in_process(log: Path, **options: Any) -> Iterator[str]:
    """The server in a process of its own, with its own share of the processor."""
    words = [f"--{name}={json.dumps(value)}" for name, value in options.items()]
    process = subprocess.Popen([sys.executable, __file__, str(log), *words], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def main(log: str, options: dict[str, Any]) -> None:
    server = ChatServer(log, **options)
    server.keep_bodies = False
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0, limit=1 << 24)
    print(listener.sockets[0].getsockname()[1], flush=True)
    await listener.serve_forever()


if __name__ == "__main__":
    pairs = (word[2:].partition("=") for word in sys.argv[2:])
    asyncio.run(main(sys.argv[1], {name: json.loads(value) for name, _, value in pairs}))
