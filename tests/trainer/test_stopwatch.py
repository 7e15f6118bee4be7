"""The stopwatch adds up times from its last start, and begins anew after they were taken."""

from __future__ import annotations

import pytest
import torch

from dynkp.trainer import stopwatch
from dynkp.trainer.stopwatch import Stopwatch


def test_times_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 11.0, 13.0, 20.0, 20.5])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(clock))
    watch = Stopwatch(torch.device("cpu"))
    watch.start()
    watch.mark("half")
    watch.mark("step")
    watch.start()
    watch.mark("step")
    assert watch.take() == {"half": 1.0, "step": 3.5}
    assert watch.take() == {}


def test_a_lap_ends_when_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 2.0, 4.0])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(clock))
    watch = Stopwatch(torch.device("cpu"))
    watch.start()
    assert list(watch.laps(["full", "text"])) == ["full", "text"]
    assert watch.take() == {"full": 1.0, "text": 3.0}


def test_times_that_are_never_taken_do_not_pile_up() -> None:
    watch = Stopwatch(torch.device("cpu"))
    watch.start()
    for _ in range(stopwatch._MOST + 5):
        watch.mark("step")
    assert len(watch._spans) == stopwatch._MOST
