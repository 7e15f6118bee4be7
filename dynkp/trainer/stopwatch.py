"""A stopwatch for the stages of a step that uses the device's own clock, without waiting for the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch

_MOST = 10_000


class Stopwatch:
    """Adds up the times from a start to later marks.

    Args:
        device (`torch.device`): the device whose work is timed.

    Example:
        >>> watch = Stopwatch(torch.device("cpu"))
        >>> watch.start()
        >>> watch.mark("half")
        >>> watch.mark("whole")
        >>> times = watch.take()
        >>> 0 < times["half"] < times["whole"]
        True
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._started: Any = None
        self._spans: deque[tuple[str, Any, Any]] = deque(maxlen=_MOST)  # `take` may never be called

    def start(self) -> None:
        """Start, or start again."""
        self._started = self._now()

    def mark(self, name: str) -> None:
        """Add the time since the start to a sum.

        Args:
            name (`str`): name of the sum.
        """
        self._spans.append((name, self._started, self._now()))

    def laps(self, names: Iterable[str]) -> Iterator[str]:
        """Iterate over names, and mark the time when the next one is asked for.

        Args:
            names (`Iterable[str]`): names of the sums.
        """
        for name in names:
            yield name
            self.mark(name)

    def take(self) -> dict[str, float]:
        """Return the sums since the last call, in seconds; waits for the device."""
        sums: dict[str, float] = {}
        for name, start, end in self._spans:
            sums[name] = sums.get(name, 0.0) + self._seconds(start, end)
        self._spans.clear()
        return sums

    def _now(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        if self.device.type == "cpu":
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000
