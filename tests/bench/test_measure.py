"""Steps are timed in turn and compared first; peak memory counts the tensors that exist at once."""

from __future__ import annotations

import pytest
import torch

from dynkp.bench.measure import Setting, first_round, median_seconds, peak_bytes

CPU = Setting(torch.device("cpu"), threads=1, repeats=1, quick=True)


def test_a_step_without_gradients_is_not_timed() -> None:
    model = torch.nn.Linear(1, 1)

    def step() -> torch.Tensor:
        loss = (2 * model.weight).sum()
        loss.backward()
        return loss.detach()

    with pytest.raises(RuntimeError, match="a row: only gave 1 of 2 trained parameters a gradient"):
        first_round(model, {"only": step}, "a row", {})


def test_steps_are_timed_in_turn() -> None:
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    assert set(median_seconds(steps, CPU._replace(repeats=3))) == set("abc")
    assert "".join(calls) == "abcbcacab"


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    def step() -> str:
        for _ in range(3):
            torch.ones(1 << 20)  # 4 MiB, released before the next
        held = [torch.ones(1 << 20) for _ in range(2)]
        del held
        return "done"

    peak, result = peak_bytes(step, torch.device("cpu"))
    assert result == "done" and 8 <= peak / 2**20 < 9


def test_clocks() -> None:
    assert CPU.clock == "process CPU time"
    assert CPU._replace(threads=2).clock == "wall time"
    assert CPU._replace(device=torch.device("cuda")).clock == "device events"
