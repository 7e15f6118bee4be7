"""Invariants of the pace:

- never more slots than the limit, never fewer than one;
- an overload halves the limit once per round trip, answers raise it by one per round trip, up to the maximum;
- after Retry-After no slot is given before that time; a waiter that is cancelled loses no slot.
"""

from __future__ import annotations

import asyncio
import time

import pytest

from dynkp.chat.pacing import AdaptiveConcurrency


def test_overloads_halve_once_per_round_trip() -> None:
    pace = AdaptiveConcurrency(32)
    sent_at = time.monotonic()
    pace.overloaded(sent_at)
    pace.overloaded(sent_at)  # sent before the cut: nothing new
    assert pace.limit == 16
    for expected in (8, 4, 2, 1, 1):
        pace.overloaded(time.monotonic() + 1)
        pace._cut_at = float("-inf")
        assert pace.limit == expected


def test_answers_add_a_slot_per_round_trip() -> None:
    pace = AdaptiveConcurrency(6)
    pace.limit = 4.0
    for _ in range(4):
        pace.succeeded()
    assert 4.8 < pace.limit <= 5
    for _ in range(100):
        pace.succeeded()
    assert pace.limit == 6


def test_slots_are_never_exceeded_and_never_lost() -> None:
    async def run() -> tuple[int, int]:
        pace = AdaptiveConcurrency(5)
        most = done = 0

        async def work(number: int) -> None:
            nonlocal most, done
            await pace.acquire()
            try:
                most = max(most, pace.in_flight)
                await asyncio.sleep(0.001)
                if number % 7 == 0:
                    pace.overloaded(time.monotonic())
                else:
                    pace.succeeded()
            finally:
                pace.release()
            done += 1

        tasks = [asyncio.create_task(work(number)) for number in range(200)]
        await asyncio.sleep(0.01)
        for task in tasks[::3]:
            task.cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
        assert pace.in_flight == 0
        assert done >= 133
        return most, done

    most, _ = asyncio.run(run())
    assert most == 5


def test_retry_after_holds_all_back() -> None:
    async def run() -> float:
        pace = AdaptiveConcurrency(2)
        pace.overloaded(time.monotonic(), retry_after=0.2)
        start = time.monotonic()
        await pace.acquire()
        return time.monotonic() - start

    assert asyncio.run(run()) >= 0.19


def test_a_stopped_run_does_not_wait() -> None:
    async def run() -> float:
        pace = AdaptiveConcurrency(2)
        pace.overloaded(time.monotonic(), retry_after=600)
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(0.1, stop.set)
        start = time.monotonic()
        await pace.acquire(stop)
        return time.monotonic() - start

    assert asyncio.run(run()) < 60


def test_no_slot_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="concurrency=0 must be at least 1"):
        AdaptiveConcurrency(0)
