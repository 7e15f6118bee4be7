"""How many requests are under way at once.

Given   the most that the user allows, and after each request how it went.
Gives   slots to send in.
Holds   never more requests at once than allowed; each overload (429, 5xx, a timeout) halves the number, once per round trip,
        and each round trip without one adds a slot; after Retry-After nothing is sent before that time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque


class AdaptiveConcurrency:
    """Additive increase, multiplicative decrease, as TCP has it.

    Args:
        maximum: most requests at once, at least 1. The run begins with it: the user knows the server.

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
        """Wait for a slot. Give it back with `release`.

        Args:
            stop: once set, Retry-After is not waited for: nothing is going to be sent.
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
                    self._wake()  # the turn may have been ours already
                    raise

    def release(self) -> None:
        """Give a slot back."""
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
        """An answer came."""
        self.limit = min(float(self.maximum), self.limit + 1 / self.limit)
        self._wake()

    def overloaded(self, sent_at: float, retry_after: float | None = None) -> None:
        """The server could not take a request.

        Args:
            sent_at: when it was sent, by `time.monotonic`. What was sent before the last cut says nothing new.
            retry_after: seconds to send nothing for, where the server says so.
        """
        now = time.monotonic()
        if sent_at > self._cut_at:
            self.limit = max(1.0, self.limit / 2)
            self._cut_at = now
        if retry_after is not None:
            self._resume_at = max(self._resume_at, now + retry_after)
