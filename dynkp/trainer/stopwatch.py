"""Times stages of a step on the device's own clock, without making the host wait for it."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

_MOST = 10_000


class Stopwatch:
    """Sums of the times from a start to later marks.

    Example:

    ```python
    >>> watch = Stopwatch(torch.device("cpu"))
    >>> watch.start()
    >>> watch.mark("half")  # half of the work is done
    >>> watch.mark("whole")
    >>> watch.take()
    {'half': 1.0, 'whole': 2.0}
    ```
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._started: Any = None
        self._spans: deque[tuple[str, Any, Any]] = deque(maxlen=_MOST)  # nobody may ever ask for them

    def start(self) -> None:
        self._started = self._now()

    def mark(self, name: str) -> None:
        """Add the time since the start to `name`."""
        self._spans.append((name, self._started, self._now()))

    def take(self) -> dict[str, float]:
        """The sums in seconds since the last call; waits for the device."""
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
