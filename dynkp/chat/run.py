"""The run: asks a chat server about all posts, many requests at a time, and no request twice.

An answer is in the journal before the next request is sent in its place, and a request whose answer is in the journal is not
sent, so a run that was killed repeats at most the requests that were under way. The number of posts in memory is the number
of requests at once, and a few more. The run stops when the server fails every request; posts that failed for that reason are
asked about again by the next run.

A conversation says what to ask about a post. It is a generator function that yields requests, receives their answers, and
ends when the post needs no more:

```python
def conversation(post):
    answer = yield ChatRequest(...)
    if not good(answer):
        yield ChatRequest(...)
```

It must depend on nothing but the post and the answers, because it is replayed from the journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, takewhile
from typing import Any

from tqdm.auto import tqdm

from dynkp.chat.client import ChatClient, RequestFailed, RunStopped, ServerUnusable
from dynkp.chat.journal import AnswerJournal
from dynkp.chat.post_stream import PostStream, SourcePost
from dynkp.chat.prices import Price
from dynkp.chat.request import KEY_BYTES, ChatAnswer, ChatRequest

logger = logging.getLogger(__name__)

# From a post to the requests about it.
Conversation = Callable[[dict[str, Any]], Generator[ChatRequest, ChatAnswer, None]]
# Posts that are scanned without a pause: a thread that never pauses would delay the requests.
_SCAN_POSTS = 2000
_SECONDS_BETWEEN_SYNCS = 2.0
# Requests that fail one after another, without an answer between them, before the server counts as unusable.
_FAILURES_IN_A_ROW, _FAILURES_AT_FIRST = 50, 10
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        settled: Number of posts that need no more requests, those of earlier runs included.
        failed: Number of these that have no answer.
        open: Number of posts that may need requests.
        stopped: Why the run ended early: `interrupted`, `max_cost` or `server`; None if it did not.
        reason: The same in words.
        requests: Number of requests that this run sent.
        cost: Cost of all answers in the journal, in the currency of the prices; None without prices.
    """

    settled: int
    failed: int
    open: int
    stopped: str | None = None
    reason: str = ""
    requests: int = 0
    cost: float | None = None


class RequestRun:
    """Posts, the conversation about each, and the journal of answers.

    ```python
    with AnswerJournal("out/r.journal") as journal:
        run = RequestRun(PostStream("posts.jsonl"), conversation, journal, settings="{}")
        outcome = run.ask(lambda: ChatClient("http://127.0.0.1:8000/v1", concurrency=32), concurrency=32)
    ```

    Args:
        posts: The posts.
        conversation: What to ask about a post. If it raises an exception, the post has failed.
        journal: The answers so far.
        settings: JSON text of everything besides the post that the conversation depends on. With other settings, every post
            is looked at again.
        prices: Price of each model, for the running cost.
        max_cost: No request is sent that would raise the cost above this limit if it cost as much as the dearest one so far.
            Needs the price of the model.
        retry_failed: Whether posts that failed in an earlier run are asked about again.
        label: Label of the progress bar.
        progress: Whether to show the progress bar.
    """

    def __init__(
        self,
        posts: PostStream,
        conversation: Conversation,
        journal: AnswerJournal,
        *,
        settings: str,
        prices: Mapping[str, Price] | None = None,
        max_cost: float | None = None,
        retry_failed: bool = False,
        label: str = "Asking",
        progress: bool = True,
    ):
        self.posts, self.conversation, self.journal = posts, conversation, journal
        self.settings = hashlib.blake2b(settings.encode(), digest_size=KEY_BYTES).digest()
        self.prices, self.max_cost = dict(prices or {}), max_cost
        self.retry_failed = retry_failed
        self.label, self.progress = label, progress
        self._last_keys = _KeyTable()
        self._settled = self._failed = self._settled_by_asking = 0
        self._counting = threading.Lock()
        self._client: Any = None
        self._stopped: str | None = None
        self._reason = ""
        self._failures_in_a_row: list[bytes] = []
        self._last_error: Exception | None = None
        # Requests that failed because the last run's server was unusable.
        self._retry_keys = {bytes.fromhex(key) for key in journal.cursor().get("again", ())}
        self._failed_now: set[bytes] = set()
        # Requests that failed because the server could not be reached.
        self._unreachable_keys: set[bytes] = set()
        self._in_flight: dict[bytes, asyncio.Future[None]] = {}
        self._highest_cost: float | None = None
        self._under_way = 0

    # --- without a server ---

    def replay(self) -> Outcome:
        """Settle all posts whose requests are answered in the journal, without asking.

        Returns:
            The outcome.
        """
        with self._bar("Looking through") as bar:
            for source in self.posts:
                if self._settled_key(source) is None:
                    self._replay(source)
                bar.update()
        return self._outcome()

    def next_requests(self) -> Iterator[ChatRequest]:
        """The requests that posts need next, each once; the content of batch files."""
        seen: set[bytes] = set()
        for source in self.posts:
            if self._settled_key(source) is None and (request := self._replay(source)) and request.key not in seen:
                seen.add(request.key)
                yield request

    def last_key(self, index: int) -> bytes | None:
        """Key of a post's last answer.

        Args:
            index: The post's number in the shard, from 0.

        Returns:
            The key, or None if the post is not settled.
        """
        return self._last_keys.get(index)

    def _settled_key(self, source: SourcePost) -> bytes | None:
        """Key of the post's last answer if it is settled; the post is then counted."""
        fingerprint = source.fingerprint(self.settings)
        key = self.journal.settled(fingerprint)
        if key is None or (self.journal.has_failed(key) and self._is_retried(key)):
            return None
        self._count(source, key)
        return key

    def _is_retried(self, key: bytes) -> bool:
        """Whether a request that failed in an earlier run is sent again."""
        return self.retry_failed or key in self._retry_keys

    def _replay(self, source: SourcePost) -> ChatRequest | None:
        """Settle a post from the answers in the journal, or return its first request that has none."""
        try:
            steps, request = self._start(source)
        except Exception as error:  # of this post alone, whatever it is
            self._settle_invalid(source, error)
            return None
        if request is None:
            self._settle_without_request(source, {"failed": False})
            return None
        while request.key in self.journal:
            row = self.journal.read(request.key)
            if row["failed"]:
                if self._is_retried(request.key):
                    return request
                break
            try:
                request = steps.send(_answer(row))
            except StopIteration:
                break
            except Exception as error:
                self._settle_invalid(source, error)
                return None
        else:
            return request
        self._settle(source, request.key)
        return None

    def _start(self, source: SourcePost) -> tuple[Generator[ChatRequest, ChatAnswer, None], ChatRequest | None]:
        """Start a post's conversation; returns it with its first request, which is None where there is nothing to ask.

        Raises:
            ValueError: If the post is invalid.
        """
        if findings := source.findings():
            raise ValueError("; ".join(findings))
        steps = self.conversation(source.post)
        request = next(steps, None)
        if request is not None:
            request.key  # noqa: B018 (computed here, in a thread)
        return steps, request

    def _settle_invalid(self, source: SourcePost, error: Exception) -> None:
        """Settle a post that cannot be asked about, as a failure without a request."""
        self._settle_without_request(source, {"failed": True, "invalid": True, "error": _message(error)})

    def _settle_without_request(self, source: SourcePost, row: Mapping[str, Any]) -> None:
        key = hashlib.blake2b(source.fingerprint(self.settings) + b"post", digest_size=KEY_BYTES).digest()
        self.journal.append(key, {"id": source.id, **row})
        self._settle(source, key)

    def _settle(self, source: SourcePost, key: bytes) -> None:
        self.journal.settle(source.fingerprint(self.settings), key)
        self._count(source, key)

    def _count(self, source: SourcePost, key: bytes) -> None:
        with self._counting:  # called by the thread that scans, too
            self._settled += 1
            self._failed += self.journal.has_failed(key)
            self._last_keys.set(self.posts.index_in_shard(source.index), key)

    # --- with a server ---

    def ask(self, client: Callable[[], ChatClient], *, concurrency: int) -> Outcome:
        """Ask until every post is settled.

        After Ctrl-C or SIGTERM the requests under way are completed; a second signal ends the run at once.

        Args:
            client: Creates the client; called inside the event loop that uses it.
            concurrency: Maximum number of requests at once.

        Returns:
            The outcome.
        """
        return asyncio.run(self._ask(client, concurrency))

    async def _ask(self, make_client: Callable[[], ChatClient], concurrency: int) -> Outcome:
        self._stop = asyncio.Event()
        self._closing = False
        self._first_price = asyncio.Lock()
        self._client = make_client()
        # More posts than requests are in preparation, so that one is ready, images included, when a request ends.
        workers = concurrency + max(4, concurrency // 4)
        self._queue: asyncio.Queue[SourcePost | None] = asyncio.Queue(maxsize=max(4, concurrency // 4))
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(4, thread_name_prefix="dynkp-teacher"))
        with self._bar(self.label, _BAR) as self._progress_bar, _signals(loop, self._interrupt):
            work = [asyncio.create_task(self._work()) for _ in range(workers)]
            tasks = [asyncio.create_task(self._scan(workers)), *work, sync := asyncio.create_task(self._sync())]
            try:
                await _all_or_first_error([task for task in tasks if task is not sync])
                if self._failures_in_a_row and self._failures_in_a_row[-1] in self._unreachable_keys:
                    self._end("server", self._last_failures())
                self._show()
            finally:
                self._closing = True
                await _cancel(tasks)
                await self._client.close()
                self._save_retry_keys()
        return self._outcome()

    def _save_retry_keys(self) -> None:
        cursor = self.journal.cursor()
        keys = self._keys_to_retry()
        if keys != cursor.get("again", []):
            self.journal.set_cursor({**cursor, "again": keys})

    def _keys_to_retry(self) -> list[str]:
        """The failed requests that the next run sends again, since the server failed, not they."""
        keys = self._retry_keys | self._unreachable_keys
        return sorted(key.hex() for key in keys.union(self._failures_in_a_row if self._stopped == "server" else ()))

    def _interrupt(self) -> None:
        if self._stop.is_set():
            raise KeyboardInterrupt
        self._end("interrupted", "stopped by a signal")

    def _end(self, why: str, reason: str) -> None:
        if not self._stop.is_set():
            self._stopped, self._reason = why, reason
            self._stop.set()

    async def _scan(self, workers: int) -> None:
        """Put the posts that are not settled into the queue, beginning where the last run was reading."""
        loop = asyncio.get_running_loop()
        identity = self.posts.identity()
        cursor = self.journal.cursor()
        offset, index = (cursor["offset"], cursor["index"]) if cursor.get("posts") == identity else (0, 0)
        # The posts before are scanned afterwards, so that the first request need not wait for them.
        before = takewhile(lambda source: source.index < index, self.posts.read())
        sources = chain(self.posts.read(offset, index), before)
        noted = time.monotonic()
        while not self._stop.is_set():
            batch, more = await loop.run_in_executor(None, self._unsettled, sources, self._queue.maxsize)
            self._show()
            for source in batch:
                await self._queue.put(source)
                if time.monotonic() - noted > _SECONDS_BETWEEN_SYNCS:
                    noted = time.monotonic()
                    place = {"posts": identity, "offset": source.end, "index": source.index + 1}
                    cursor = {**place, "again": self._keys_to_retry()}
                    await loop.run_in_executor(None, self.journal.set_cursor, cursor)
            if not more:
                break
        for _ in range(workers):
            await self._queue.put(None)

    def _unsettled(self, sources: Iterator[SourcePost], wanted: int) -> tuple[list[SourcePost], bool]:
        """The next posts that are not settled, and whether there may be more. Runs in a thread."""
        found: list[SourcePost] = []
        for scanned, source in enumerate(sources, start=1):
            if self._settled_key(source) is None:
                found.append(source)
            if len(found) == wanted or scanned == _SCAN_POSTS:
                return found, True
        return found, False

    async def _work(self) -> None:
        while not self._closing and (source := await self._queue.get()) is not None:
            if self._stop.is_set():
                continue  # the queue may be full, and must be emptied for the scan to end
            try:
                await self._ask_about(source)
            except (RunStopped, ServerUnusable) as error:
                if isinstance(error, ServerUnusable):
                    self._end("server", str(error))
            except asyncio.CancelledError:
                if self._closing:
                    raise
                # Not of this task: raised by a library below. Without workers, the scan would wait for ever.
                self._settle_without_request(source, {"failed": True, "error": "the request was cancelled by a library"})
            self._show()

    async def _ask_about(self, source: SourcePost) -> None:
        """Complete the conversation about a post. Images are read, and prompts built, in a thread."""
        try:
            steps, request = await asyncio.get_running_loop().run_in_executor(None, self._start, source)
        except Exception as error:  # of this post alone, whatever it is: no keyphrases, a broken image
            self._settle_invalid(source, error)
            return
        if request is None:
            self._settle_without_request(source, {"failed": False})
            return
        while (answer := await self._answer_to(request, source.id)) is not None:
            try:
                request = steps.send(answer)
            except StopIteration:
                break
            except Exception as error:
                self._settle_invalid(source, error)
                return
        self._settle(source, request.key)
        self._settled_by_asking += 1

    async def _answer_to(self, request: ChatRequest, post_id: str) -> ChatAnswer | None:
        """The answer from the journal, or from the server and then in the journal; None if the request fails."""
        key = request.key
        while key in self._in_flight:  # another post has the same request
            # Shielded: a cancellation of this worker must not cancel the other one's request.
            await asyncio.shield(self._in_flight[key])
        if key in self.journal:
            row = self.journal.read(key)
            if not row["failed"]:
                return _answer(row)
            if not self._is_retried(key) or key in self._failed_now:
                return None
        done = asyncio.get_running_loop().create_future()
        self._in_flight[key] = done
        try:
            row = {"id": post_id, "stage": request.stage, "model": request.settings["model"], "time": int(time.time())}
            try:
                answer = await self._ask_within_cost(request)
            except (RunStopped, ServerUnusable):
                raise
            except Exception as error:  # a failed request, or one that cannot be built
                row |= {"failed": True, "error": _message(error)}
                if not isinstance(error, RequestFailed):
                    row |= {"invalid": True}
                self.journal.append(key, row)
                self._failed_now.add(key)
                self._note_failure(key, error)
                return None
            self.journal.append(key, row | asdict(answer))
            self._failures_in_a_row.clear()
            self._retry_keys.discard(key)
            return answer
        finally:
            del self._in_flight[key]
            if not done.done():
                done.set_result(None)

    def _note_failure(self, key: bytes, error: Exception) -> None:
        self._retry_keys.discard(key)
        if not isinstance(error, RequestFailed):
            return
        self._failures_in_a_row.append(key)
        if error.unreachable:
            self._unreachable_keys.add(key)
        self._last_error = error
        limit = max(_FAILURES_IN_A_ROW, 2 * self._client.pace.maximum) if self._client.answered else _FAILURES_AT_FIRST
        if len(self._failures_in_a_row) >= limit:
            self._end("server", self._last_failures())

    def _last_failures(self) -> str:
        failures = len(self._failures_in_a_row)
        return f"{failures} {'post' if failures == 1 else 'posts in a row'} failed, the last: {self._last_error}"

    async def _ask_within_cost(self, request: ChatRequest) -> ChatAnswer:
        """Send a request unless it would raise the cost above the limit if it cost as much as the dearest one so far."""
        if self.max_cost is None:
            return await self._client.ask(request, self._stop)
        if self._highest_cost is None:
            async with self._first_price:  # the cost of a request is unknown until one is answered
                if self._highest_cost is None:
                    return await self._ask_and_count(request)
        return await self._ask_and_count(request)

    async def _ask_and_count(self, request: ChatRequest) -> ChatAnswer:
        cost, limit = self.cost() or 0.0, self.max_cost or 0.0
        if cost + (self._under_way + 1) * (self._highest_cost or 0.0) > limit or cost >= limit:
            self._end("max_cost", f"{cost:.2f} spent of {limit:.2f}")
            raise RunStopped
        self._under_way += 1
        try:
            answer = await self._client.ask(request, self._stop)
        finally:
            self._under_way -= 1
        price = self.prices[request.settings["model"]]
        self._highest_cost = max(self._highest_cost or 0.0, price.cost(answer.prompt_tokens, answer.completion_tokens))
        if not answer.prompt_tokens and not answer.completion_tokens:
            self._end("server", "the server counts no tokens, so that no limit of cost can be kept: leave max_cost out")
        return answer

    def cost(self) -> float | None:
        """The cost of all answers in the journal, in the currency of the prices; None without prices."""
        if not self.prices:
            return None
        return sum(price.cost(*self.journal.tokens(model)) for model, price in self.prices.items())

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(_SECONDS_BETWEEN_SYNCS)
            await asyncio.get_running_loop().run_in_executor(None, self.journal.sync)

    # --- progress ---

    def _bar(self, label: str, bar_format: str | None = None) -> Any:
        self._settled = self._failed = self._settled_by_asking = 0
        self._began = time.monotonic()
        return tqdm(total=len(self.posts), desc=label, unit="post", disable=not self.progress, bar_format=bar_format)

    def _show(self) -> None:
        """Update the bar; its speed and time left leave out the posts that earlier runs settled."""
        bar = self._progress_bar
        parts = [f"{self._client.pace.limit:.0f} at once"]
        if self._settled_by_asking:
            rate = self._settled_by_asking / (time.monotonic() - self._began)
            left = tqdm.format_interval((bar.total - self._settled) / rate)
            parts = [f"{rate:.1f} post/s", f"{left} left", *parts]
        if (cost := self.cost()) is not None:
            parts.append(f"cost {cost:.2f}" + ("" if self.max_cost is None else f" of {self.max_cost:.2f}"))
        if self._failed:
            parts.append(f"{self._failed} failed")
        bar.set_postfix_str(", ".join(parts), refresh=False)
        bar.update(self._settled - bar.n)

    def _outcome(self) -> Outcome:
        return Outcome(
            settled=self._settled,
            failed=self._failed,
            open=max(0, len(self.posts) - self._settled),
            stopped=self._stopped,
            reason=self._reason,
            requests=self._client.sent if self._client else 0,
            cost=self.cost(),
        )


class _KeyTable:
    """The last key of each post, by the post's number: 16 bytes a post."""

    def __init__(self) -> None:
        self._keys = bytearray()

    def set(self, index: int, key: bytes) -> None:
        start = index * KEY_BYTES
        if len(self._keys) < start:
            self._keys.extend(bytes(start - len(self._keys)))
        self._keys[start : start + KEY_BYTES] = key

    def get(self, index: int) -> bytes | None:
        key = bytes(self._keys[index * KEY_BYTES : (index + 1) * KEY_BYTES])
        return key if any(key) else None


def _answer(row: Mapping[str, Any]) -> ChatAnswer:
    return ChatAnswer(**{name: row[name] for name in ChatAnswer.__dataclass_fields__})


def _message(error: Exception) -> str:
    """What to record about a failure; errors that are not this package's own are named with their type."""
    known = isinstance(error, ValueError | RequestFailed) and str(error)
    return str(error) if known else f"{type(error).__name__}: {str(error)[:500]}"


async def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel tasks until they have ended: a library in a task may swallow a cancellation."""
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=1.0)


async def _all_or_first_error(tasks: Iterable[asyncio.Task[None]]) -> None:
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in done:
        task.result()


@contextlib.contextmanager
def _signals(loop: asyncio.AbstractEventLoop, handler: Callable[[], None]) -> Iterator[None]:
    signals = (signal.SIGINT, signal.SIGTERM)
    # Not possible in threads and on Windows: there, Ctrl-C ends the run at once, which loses no answer either.
    with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
        for number in signals:
            loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
            for number in signals:
                loop.remove_signal_handler(number)
