"""The log of Dynamic CoT's choices: one JSON row per post and visit, in step with the checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

from transformers.trainer_callback import TrainerState


class ChoiceLog:
    """Appends to `choices.jsonl`; written by the main process only.

    Args:
        output_dir: the run's folder.

    A fresh run moves an existing file aside (`choices.1.jsonl`, ...). A resumed run drops the rows after its checkpoint,
    a torn last line included, so that every visit stands in the file exactly once.
    """

    def __init__(self, output_dir: str | Path):
        self.path = Path(output_dir) / "choices.jsonl"
        self._aligned = False

    def write(
        self, visits: Iterable[tuple[str, float | None, bool]], state: TrainerState, gamma: float | None
    ) -> None:
        """Append one optimizer step's visits: (id, direct loss in nats per token or None, taught to reason)."""
        if not self._aligned:
            self._align(state.global_step - 1)
        rows = (
            {
                "id": post_id,
                "epoch": round(state.epoch or 0.0, 6),
                "step": state.global_step,
                "direct_loss": _finite(loss),
                "gamma": _finite(gamma),
                "choice": "reasoning" if reasoned else "direct",
            }
            for post_id, loss, reasoned in visits
        )
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def _align(self, last_step: int) -> None:
        """Make the file hold exactly the steps up to `last_step`."""
        self._aligned = True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        if last_step == 0:
            number = 1
            while (aside := self.path.with_name(f"choices.{number}.jsonl")).exists():
                number += 1
            self.path.rename(aside)
            return
        partial = self.path.with_name("choices.jsonl.partial")
        with self.path.open(encoding="utf-8") as old, partial.open("w", encoding="utf-8") as new:
            for line in old:
                try:
                    keep = line.endswith("\n") and json.loads(line)["step"] <= last_step
                except ValueError:
                    keep = False
                if keep:
                    new.write(line)
        partial.replace(self.path)


def _finite(value: float | None) -> float | None:
    """JSON knows neither infinity nor NaN."""
    return value if value is not None and math.isfinite(value) else None
