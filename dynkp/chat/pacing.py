"""The pace of requests: how many may be under way at once.

There are never more requests at once than the user allows. Each overload of the server (429, 5xx, a timeout) halves the
number, once per round trip; each round trip without an overload adds one. After Retry-After, nothing is sent before that time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque


class AdaptiveConcurrency:
    """A limit on concurrent requests: additive increase, multiplicative decrease, as in TCP.

    Args:
        maximum: Maximum number of requests at once, at least 1. The limit begins there.

    Attributes:
        limit: The present limit, from 1 to `maximum`; its whole part counts.
        in_flight: Number of requests under way.

    Raises:
        ValueError: If `maximum` is below 1.

    Example:
        >>> pace = AdaptiveConcurrency(32)
        >>> pace.overloaded(sent_at=time.monotonic())
        >>> pace.limit
        16.0
    """

    def __init__(self, maximum: int):
        if maximum < 1:
            raise ValueError(f"concurrency={maximum!r} must be at least 1")
        self.maximum = maximum
        self.limit = float(maximum)
        self.in_flight = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._cut_at = float("-inf")
        self._resume_at = float("-inf")

    async def acquire(self, stop: asyncio.Event | None = None) -> None:
        """Wait until a request may be sent. Call `release` after its answer.

        Args:
            stop: Once this event is set, the time of Retry-After is not awaited, since nothing will be sent.
        """
        stop = stop or asyncio.Event()
        while True:
            pause = self._resume_at - time.monotonic()
            if pause > 0 and not stop.is_set():
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(stop.wait(), pause)
            elif self.in_flight < max(1, int(self.limit)):
                self.in_flight += 1
                return
            else:
                waiter = asyncio.get_running_loop().create_future()
                self._waiting.append(waiter)
                try:
                    await waiter
                except asyncio.CancelledError:
                    self._wake()  # this one may have been woken already
                    raise

    def release(self) -> None:
        """Note that a request has ended."""
        self.in_flight -= 1
        self._wake()

    def _wake(self) -> None:
        free = max(1, int(self.limit)) - self.in_flight
        while self._waiting and free > 0:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                free -= 1

    def succeeded(self) -> None:
        """Note that a request was answered: the limit grows."""
        self.limit = min(float(self.maximum), self.limit + 1 / self.limit)
        self._wake()

    def overloaded(self, sent_at: float, retry_after: float | None = None) -> None:
        """Note that the server could not take a request: the limit is halved.

        Args:
            sent_at: When the request was sent, by `time.monotonic`. A request sent before the limit was last halved changes
                nothing.
            retry_after: Seconds during which nothing is sent, or None.
        """
        now = time.monotonic()
        if sent_at > self._cut_at:
            self.limit = max(1.0, self.limit / 2)
            self._cut_at = now
        if retry_after is not None:
            self._resume_at = max(self._resume_at, now + retry_after)
