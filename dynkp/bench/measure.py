"""Clocks and memory for comparing ways of computing the same thing on a shared, noisy machine.

Given   steps: functions without arguments that compute the same thing in different ways.
Gives   seconds per step and bytes at its peak.
Holds   the steps run in turn, so that a machine that slows down slows them all; with one CPU thread the clock is the
        process's own CPU time, which other processes cannot lengthen.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

import dynkp

Step = Callable[[], Any]


class Setting(NamedTuple):
    """What a suite is run with.

    Attributes:
        device: where models and tensors are.
        threads: torch's CPU threads.
        repeats: timed rounds per row, behind one that is not timed.
        quick: a model of a size that proves the benchmark works and measures nothing.
    """

    device: torch.device
    threads: int
    repeats: int
    quick: bool

    @property
    def clock(self) -> str:
        """How a step is timed."""
        if self.device.type == "cuda":
            return "device events"
        # Several threads' CPU time adds up, so it would hide how well a step spreads over them.
        return "process CPU time" if self.threads == 1 else "wall time"


def median_seconds(steps: Mapping[str, Step], setting: Setting) -> dict[str, float]:
    """Time steps against each other.

    Args:
        steps: by name; each is called `setting.repeats` times, one call of every step per round. They should have run
            once before, so that no first call's work is timed.
        setting: device, clock and number of rounds.

    Returns:
        Median seconds of each step.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    gc.freeze()  # what the libraries hold need not be walked before every step
    for turn in range(setting.repeats):
        names = list(steps)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody always follows the same step
            gc.collect()
            seconds[name].append(_seconds(steps[name], setting))
    gc.unfreeze()
    return {name: statistics.median(times) for name, times in seconds.items()}


def _seconds(step: Step, setting: Setting) -> float:
    if setting.device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize(setting.device)
        return start.elapsed_time(end) / 1000
    clock = time.process_time if setting.threads == 1 else time.perf_counter
    began = clock()
    step()
    return clock() - began


def peak_bytes(step: Step, device: torch.device) -> tuple[int, Any]:
    """Most bytes of tensors alive at once during `step`, above those alive before it; and what the step returns.

    On a GPU this is the caching allocator's own count. On a CPU, where neither `tracemalloc` nor the process's resident
    size says it (one does not see torch, the other never shrinks), it is the running sum of the allocations and releases
    that torch's profiler records. Scratch space inside a matrix library is not counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = step()
        return torch.cuda.max_memory_allocated(device) - before, result
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = step()
    # The raw record: the profiler's public table sums per operator, which loses the order of events.
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak, result


def environment(setting: Setting) -> dict[str, Any]:
    """Where and with what a row was measured, for the row itself."""
    on_gpu = setting.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(setting.device) if on_gpu else "cpu",
        "machine": f"{_processor()}, {os.cpu_count()} CPUs",
        "threads": setting.threads,
        "clock": setting.clock,
        "repeats": setting.repeats,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "dynkp": dynkp.__version__,  # it may run from a checkout that is not installed
            **{name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        },
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
