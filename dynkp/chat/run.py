"""Asks about all posts, many at a time, and never twice.

Given   posts, a dialogue for each (what to ask, and what to ask next), a client and a journal.
Gives   a journal in which every post is settled, or a reason why the run ended earlier.
Holds   an answer is in the journal before its slot is free again, and an answer in the journal is not asked for, so a run
        that was killed repeats at most the requests that were under way; posts in memory are as many as requests at once
        and a few more; the run stops where the server refuses everyone, and posts that failed for that are asked about again
        by the next one.

A dialogue is a generator: it yields requests, is sent their answers, and ends when the post needs no more:

    def dialogue(post):
        answer = yield ChatRequest(...)
        if not good(answer):
            yield ChatRequest(...)

It may depend on nothing but the post and the answers: it is replayed from the journal.
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
from dynkp.data.images import ImageError

logger = logging.getLogger(__name__)

Dialogue = Callable[[dict[str, Any]], Generator[ChatRequest, ChatAnswer, None]]
# Posts looked at without a pause: a thread that never lets go would starve the requests.
_SCAN_POSTS = 2000
_SECONDS_BETWEEN_SYNCS = 2.0
# Posts that fail one after another, with no answer between, before the server counts as unusable.
_FAILURES_IN_A_ROW, _FAILURES_AT_FIRST = 50, 10
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        settled: posts that need no more requests, those of earlier runs with them.
        failed: of these, posts without an answer.
        open: posts that were not come to.
        stopped: why the run ended early: None, `interrupted`, `max_cost` or `server`.
        reason: more about it, in words.
        requests: sent by this run.
        cost: of all answers in the journal, where the prices are known.
    """

    settled: int
    failed: int
    open: int
    stopped: str | None = None
    reason: str = ""
    requests: int = 0
    cost: float | None = None


class RequestRun:
    """Posts, their dialogues, and the journal of answers.

    Args:
        posts: the posts.
        dialogue: what to ask about one. Whatever it raises (`ValueError`) is a post's failure.
        journal: the answers so far.
        settings: what a dialogue depends on besides the post, as JSON text: with other settings no post is settled.
        prices: model -> price, for the running cost.
        max_cost: no request is begun that would take the cost above this, should it cost as much as the dearest so far;
            needs the price of the model.
        retry_failed: whether to ask again about posts that failed in an earlier run.
        label: of the progress bar.
        progress: whether to show it.

    Example:
        >>> run = RequestRun(PostStream("posts.jsonl"), dialogue, journal, settings="{}")
        >>> run.ask(lambda: ChatClient("http://127.0.0.1:8000/v1", concurrency=32), concurrency=32).failed
        0
    """

    def __init__(
        self,
        posts: PostStream,
        dialogue: Dialogue,
        journal: AnswerJournal,
        *,
        settings: str,
        prices: Mapping[str, Price] | None = None,
        max_cost: float | None = None,
        retry_failed: bool = False,
        label: str = "Asking",
        progress: bool = True,
    ):
        self.posts, self.dialogue, self.journal = posts, dialogue, journal
        self.settings = hashlib.blake2b(settings.encode(), digest_size=KEY_BYTES).digest()
        self.prices, self.max_cost = dict(prices or {}), max_cost
        self.retry_failed = retry_failed
        self.label, self.progress = label, progress
        self.keys = _KeyTable()
        self._settled = self._failed = self._settled_by_asking = 0
        self._counting = threading.Lock()
        self._client: Any = None
        self._stopped: str | None = None
        self._reason = ""
        self._failures_in_a_row: list[bytes] = []
        # What failed as the last run's server was down.
        self._again = {bytes.fromhex(key) for key in journal.cursor().get("again", ())}
        self._failed_now: set[bytes] = set()
        self._in_flight: dict[bytes, asyncio.Future[None]] = {}
        self._highest_cost: float | None = None
        self._begun = 0

    # --- without a server ---

    def replay(self) -> Outcome:
        """Look through all posts and settle those that the journal answers; nothing is asked."""
        with self._bar("Looking through") as bar:
            for source in self.posts:
                if self._known(source) is None:
                    self._replayed(source)
                bar.update()
        return self._outcome()

    def unanswered(self) -> Iterator[ChatRequest]:
        """The requests that posts need next, each once: what a batch file holds."""
        seen: set[bytes] = set()
        for source in self.posts:
            if self._known(source) is None and (request := self._replayed(source)) and request.key not in seen:
                seen.add(request.key)
                yield request

    def _known(self, source: SourcePost) -> bytes | None:
        """The post's last key, if it is settled; the post is then counted."""
        fingerprint = source.fingerprint(self.settings)
        key = self.journal.settled(fingerprint)
        if key is None or (self.journal.has_failed(key) and self._retries(key)):
            return None
        self._count(source, key)
        return key

    def _retries(self, key: bytes) -> bool:
        """Whether a request that failed in an earlier run is to be sent again."""
        return self.retry_failed or key in self._again

    def _replayed(self, source: SourcePost) -> ChatRequest | None:
        """Settle a post by answers that are there, or give the first request that has none."""
        try:
            steps, request = self._opened(source)
        except ValueError as error:
            self._refuse(source, error)
            return None
        if request is None:
            self._settle_unasked(source, {"failed": False})
            return None
        while request.key in self.journal:
            row = self.journal.read(request.key)
            if row["failed"]:
                if self._retries(request.key):
                    return request
                break
            try:
                request = steps.send(_answer(row))
            except StopIteration:
                break
            except ValueError as error:
                self._refuse(source, error)
                return None
        else:
            return request
        self._settle(source, request.key)
        return None

    def _begin(self, source: SourcePost) -> Generator[ChatRequest, ChatAnswer, None]:
        if findings := source.findings():
            raise ValueError("; ".join(findings))
        return self.dialogue(source.post)

    def _opened(self, source: SourcePost) -> tuple[Generator[ChatRequest, ChatAnswer, None], ChatRequest | None]:
        """A post's dialogue and its first request, with the key; None where there is nothing to ask."""
        steps = self._begin(source)
        request = next(steps, None)
        if request is not None:
            request.key  # noqa: B018 (computed here, in a thread)
        return steps, request

    def _refuse(self, source: SourcePost, error: Exception) -> None:
        """A post that cannot be asked about: a failure without request."""
        self._settle_unasked(source, {"failed": True, "invalid": True, "error": str(error)})

    def _settle_unasked(self, source: SourcePost, row: Mapping[str, Any]) -> None:
        key = hashlib.blake2b(source.fingerprint(self.settings) + b"post", digest_size=KEY_BYTES).digest()
        self.journal.append(key, {"id": source.id, **row})
        self._settle(source, key)

    def _settle(self, source: SourcePost, key: bytes) -> None:
        self.journal.settle(source.fingerprint(self.settings), key)
        self._count(source, key)

    def _count(self, source: SourcePost, key: bytes) -> None:
        with self._counting:  # the scan's thread counts, too
            self._settled += 1
            self._failed += self.journal.has_failed(key)
            self.keys.set(self.posts.place_of(source.index), key)

    # --- with a server ---

    def ask(self, client: Callable[[], ChatClient], *, concurrency: int) -> Outcome:
        """Ask until every post is settled.

        Ctrl-C and SIGTERM let the requests that are under way end; a second one does not.

        Args:
            client: makes the client, inside the event loop it is to live in.
            concurrency: most requests at once.
        """
        return asyncio.run(self._ask(client, concurrency))

    async def _ask(self, make_client: Callable[[], ChatClient], concurrency: int) -> Outcome:
        self._stop = asyncio.Event()
        self._first_price = asyncio.Lock()
        self._client = make_client()
        # A few posts more than slots are under way, so that one is ready, picture and all, when a slot becomes free.
        workers = concurrency + max(4, concurrency // 4)
        self._queue: asyncio.Queue[SourcePost | None] = asyncio.Queue(maxsize=max(4, concurrency // 4))
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(4, thread_name_prefix="dynkp-teacher"))
        with self._bar(self.label, _BAR) as self._progress_bar, _signals(loop, self._interrupt):
            work = [asyncio.create_task(self._work()) for _ in range(workers)]
            tasks = [asyncio.create_task(self._scan(workers)), *work, sync := asyncio.create_task(self._sync())]
            try:
                await _all_or_first_error([task for task in tasks if task is not sync])
                self._show()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await self._client.close()
                self._note_what_to_ask_again()
        return self._outcome()

    def _note_what_to_ask_again(self) -> None:
        again = self._again.union(self._failures_in_a_row if self._stopped == "server" else ())
        if again != self._again or self._again:
            self.journal.set_cursor({**self.journal.cursor(), "again": sorted(key.hex() for key in again)})

    def _interrupt(self) -> None:
        if self._stop.is_set():
            raise KeyboardInterrupt
        self._end("interrupted", "stopped by a signal")

    def _end(self, why: str, reason: str) -> None:
        if not self._stop.is_set():
            self._stopped, self._reason = why, reason
            self._stop.set()

    async def _scan(self, workers: int) -> None:
        """Put the posts that are not settled into the queue, from where the last run was reading."""
        loop = asyncio.get_running_loop()
        identity = self.posts.identity()
        cursor = self.journal.cursor()
        offset, index = (cursor["offset"], cursor["index"]) if cursor.get("posts") == identity else (0, 0)
        # What lies before is looked at afterwards: nothing is left out, and the first request need not wait for it.
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
                    cursor = {**place, "again": sorted(key.hex() for key in self._again)}
                    await loop.run_in_executor(None, self.journal.set_cursor, cursor)
            if not more:
                break
        for _ in range(workers):
            await self._queue.put(None)

    def _unsettled(self, sources: Iterator[SourcePost], wanted: int) -> tuple[list[SourcePost], bool]:
        """The next posts that are not settled; whether there may be more. Runs in a thread."""
        found: list[SourcePost] = []
        for scanned, source in enumerate(sources, start=1):
            if self._known(source) is None:
                found.append(source)
            if len(found) == wanted or scanned == _SCAN_POSTS:
                return found, True
        return found, False

    async def _work(self) -> None:
        while (source := await self._queue.get()) is not None:
            if self._stop.is_set():
                continue  # let the scan end, whose queue may be full
            try:
                await self._converse(source)
            except (RunStopped, ServerUnusable) as error:
                if isinstance(error, ServerUnusable):
                    self._end("server", str(error))
            self._show()

    async def _converse(self, source: SourcePost) -> None:
        """One post's dialogue. Pictures are read, and prompts written, in a thread."""
        try:
            steps, request = await asyncio.get_running_loop().run_in_executor(None, self._opened, source)
        except ValueError as error:  # the post's own: no keyphrases, a broken picture
            self._refuse(source, error)
            return
        if request is None:
            self._settle_unasked(source, {"failed": False})
            return
        while (answer := await self._answered(request, source.id)) is not None:
            try:
                request = steps.send(answer)
            except StopIteration:
                break
            except ValueError as error:
                self._refuse(source, error)
                return
        self._settle(source, request.key)
        self._settled_by_asking += 1

    async def _answered(self, request: ChatRequest, post_id: str) -> ChatAnswer | None:
        """The answer, from the journal or from the server and then in the journal; None where there is none."""
        key = request.key
        while key in self._in_flight:  # another post asks the same
            await self._in_flight[key]
        if key in self.journal:
            row = self.journal.read(key)
            if not row["failed"]:
                return _answer(row)
            if not self._retries(key) or key in self._failed_now:
                return None
        done = asyncio.get_running_loop().create_future()
        self._in_flight[key] = done
        try:
            row = {"id": post_id, "stage": request.stage, "model": request.settings["model"], "time": int(time.time())}
            try:
                answer = await self._ask_within_cost(request)
            except (RequestFailed, ImageError) as error:
                row |= {"failed": True, "error": str(error)}
                if isinstance(error, ImageError):
                    row |= {"invalid": True}
                self.journal.append(key, row)
                self._failed_now.add(key)
                self._note_failure(key, error)
                return None
            self.journal.append(key, row | asdict(answer))
            self._failures_in_a_row.clear()
            return answer
        finally:
            del self._in_flight[key]
            done.set_result(None)

    def _note_failure(self, key: bytes, error: Exception) -> None:
        self._again.discard(key)
        if isinstance(error, ImageError):
            return
        self._failures_in_a_row.append(key)
        limit = max(_FAILURES_IN_A_ROW, 2 * self._client.pace.maximum) if self._client.answered else _FAILURES_AT_FIRST
        if (failures := len(self._failures_in_a_row)) >= limit:
            self._end("server", f"{failures} posts in a row failed, the last: {error}")

    async def _ask_within_cost(self, request: ChatRequest) -> ChatAnswer:
        """Begin no request that would take the cost above the limit, should it cost as much as the dearest so far."""
        if self.max_cost is None:
            return await self._client.ask(request, self._stop)
        if self._highest_cost is None:
            async with self._first_price:  # until one has been answered nobody knows
                if self._highest_cost is None:
                    return await self._ask_and_count(request)
        return await self._ask_and_count(request)

    async def _ask_and_count(self, request: ChatRequest) -> ChatAnswer:
        cost, limit = self.cost() or 0.0, self.max_cost or 0.0
        if cost + (self._begun + 1) * (self._highest_cost or 0.0) > limit or cost >= limit:
            self._end("max_cost", f"{cost:.2f} spent of {limit:.2f}")
            raise RunStopped
        self._begun += 1
        try:
            answer = await self._client.ask(request, self._stop)
        finally:
            self._begun -= 1
        price = self.prices[request.settings["model"]]
        self._highest_cost = max(self._highest_cost or 0.0, price.cost(answer.prompt_tokens, answer.completion_tokens))
        if not answer.prompt_tokens and not answer.completion_tokens:
            self._end("server", "the server counts no tokens, so that no limit of cost can be kept: leave max_cost out")
        return answer

    def cost(self) -> float | None:
        """Of all answers in the journal; None where no price is known."""
        if not self.prices:
            return None
        return sum(price.cost(*self.journal.tokens(model)) for model, price in self.prices.items())

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(_SECONDS_BETWEEN_SYNCS)
            await asyncio.get_running_loop().run_in_executor(None, self.journal.sync)

    # --- what is shown ---

    def _bar(self, label: str, bar_format: str | None = None) -> Any:
        self._settled = self._failed = self._settled_by_asking = 0
        self._began = time.monotonic()
        return tqdm(total=len(self.posts), desc=label, unit="post", disable=not self.progress, bar_format=bar_format)

    def _show(self) -> None:
        """Update the bar. Posts of earlier runs fly past, so speed and time left are those of what is asked now."""
        bar = self._progress_bar
        shown = [f"{self._client.pace.limit:.0f} at once"]
        if self._settled_by_asking:
            rate = self._settled_by_asking / (time.monotonic() - self._began)
            left = tqdm.format_interval((bar.total - self._settled) / rate)
            shown = [f"{rate:.1f} post/s", f"{left} left", *shown]
        if (cost := self.cost()) is not None:
            shown.append(f"cost {cost:.2f}" + ("" if self.max_cost is None else f" of {self.max_cost:.2f}"))
        if self._failed:
            shown.append(f"{self._failed} failed")
        bar.set_postfix_str(", ".join(shown), refresh=False)
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
    """The last key of each post, by the post's place: 16 bytes a post."""

    def __init__(self) -> None:
        self._keys = bytearray()

    def __len__(self) -> int:
        return len(self._keys) // KEY_BYTES

    def set(self, place: int, key: bytes) -> None:
        start = place * KEY_BYTES
        if len(self._keys) < start:
            self._keys.extend(bytes(start - len(self._keys)))
        self._keys[start : start + KEY_BYTES] = key

    def get(self, place: int) -> bytes | None:
        key = bytes(self._keys[place * KEY_BYTES : (place + 1) * KEY_BYTES])
        return key if any(key) else None


def _answer(row: Mapping[str, Any]) -> ChatAnswer:
    return ChatAnswer(**{name: row[name] for name in ChatAnswer.__dataclass_fields__})


async def _all_or_first_error(tasks: Iterable[asyncio.Task[None]]) -> None:
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in done:
        task.result()


@contextlib.contextmanager
def _signals(loop: asyncio.AbstractEventLoop, handler: Callable[[], None]) -> Iterator[None]:
    signals = (signal.SIGINT, signal.SIGTERM)
    # Not in a thread, and not on Windows: there, Ctrl-C ends the run at once, which loses no answer either.
    with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
        for number in signals:
            loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
            for number in signals:
                loop.remove_signal_handler(number)
