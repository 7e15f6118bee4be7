"""Time, memory and agreement of ways to compute the same thing, on a shared, noisy machine.

Given   steps: functions without arguments that compute the same loss and gradients in different ways.
Gives   seconds per step, bytes at its peak, and how far the steps differ in loss and gradients.
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
from torch import nn
from torch.profiler import ProfilerActivity, profile

import dynkp

Step = Callable[[], Any]

# Largest relative difference, in the loss or in the whole gradient, of steps that compute the same: their float32 sums differ
# in order.
AGREEMENT = 1e-4


class Setting(NamedTuple):
    """What a suite is run with.

    Attributes:
        device: Device of models and tensors.
        threads: Number of torch's CPU threads.
        repeats: Number of timed rounds per row; an untimed one precedes them.
        quick: Whether the model is tiny: it shows that the benchmark runs, and its times mean nothing.
    """

    device: torch.device
    threads: int
    repeats: int
    quick: bool

    @property
    def clock(self) -> str:
        """The clock that times a step, in words."""
        if self.device.type == "cuda":
            return "device events"
        # Several threads' CPU time adds up, so it would hide how well a step spreads over them.
        return "process CPU time" if self.threads == 1 else "wall time"


class FirstRound(NamedTuple):
    """What the untimed first round of a row found.

    Attributes:
        memory: Bytes at the peak of each step, above those in use before it.
        disagreement: The largest relative difference, in loss or gradient, between steps that must agree.
    """

    memory: dict[str, int]
    disagreement: float


def first_round(model: nn.Module, steps: Mapping[str, Step], what: str, must_agree: Mapping[str, str]) -> FirstRound:
    """Run every step once: measure its memory, and check that steps which must compute the same do.

    Args:
        model: The model whose gradients the steps compute.
        steps: Steps by name; each returns its loss.
        what: The row's name, for errors.
        must_agree: Step by name -> the step whose loss and gradient it must have, up to [`AGREEMENT`].

    Raises:
        RuntimeError: If steps disagree, so that their times cannot be compared, or if a trained parameter has no gradient.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    memory: dict[str, int] = {}
    results: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, step in steps.items():
        model.zero_grad()  # or the step would release the gradients of the step before, and its peak would be too low
        memory[name], loss = peak_bytes(step, parameters[0].device)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if len(gradients) < len(parameters):
            raise RuntimeError(f"{what}: {name} gave {len(gradients)} of {len(parameters)} trained parameters a gradient.")
        results[name] = loss.double(), torch.cat([gradient.double().flatten() for gradient in gradients])
    worst = 0.0
    for name, reference in must_agree.items():
        (loss, gradient), (other_loss, other_gradient) = results[reference], results[name]
        differences = (other_loss - loss).abs() / loss.abs(), (other_gradient - gradient).norm() / gradient.norm()
        if not all(difference <= AGREEMENT for difference in differences):
            raise RuntimeError(
                f"{what}: {name} and {reference} differ by {differences[0]:.1e} in the loss and {differences[1]:.1e} in the "
                f"gradient, more than {AGREEMENT:g}: they do not compute the same, so their times mean nothing."
            )
        worst = max(worst, *(float(difference) for difference in differences))
    return FirstRound(memory, worst)


def median_seconds(steps: Mapping[str, Step], setting: Setting) -> dict[str, float]:
    """Time steps against each other.

    Args:
        steps: Steps by name. Each is called `setting.repeats` times, one call of every step per round. Each should have run
            once before, so that work which only a first call does is not timed.
        setting: Device, clock and number of rounds.

    Returns:
        Median seconds of each step.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    gc.freeze()  # what the libraries hold need not be walked before every step
    for turn in range(setting.repeats):
        names = list(steps)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # no step always follows the same one
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
    """Measure the most bytes of tensors in use at once during a step, above those in use before it.

    On a GPU this is the caching allocator's own count. On a CPU it is the running sum of the allocations and releases that
    torch's profiler records: `tracemalloc` does not see torch's memory, and a process's resident size never shrinks. Scratch
    space inside a matrix library is not counted.

    Returns:
        The bytes, and what the step returned.
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
    in_use = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        in_use += event.nbytes()
        peak = max(peak, in_use)
    return peak, result


def environment(setting: Setting) -> dict[str, Any]:
    """Describe the machine, the clock and the libraries, as columns of a row."""
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
