"""A log of visits, one JSON row per post, visit and whatever the method decided, in step with the checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerState

from dynkp.files.atomic import atomic_files
from dynkp.files.json_lines import LineAppender


class VisitLog:
    """Appends to a file of the run's folder; used by the main process only.

    Args:
        path: the file, such as `out/choices.jsonl`.

    A fresh run moves an existing file aside (`choices.1.jsonl`, ...). A resumed run drops the rows after its checkpoint,
    a torn last line included, so that every visit stands in the file exactly once.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def write(self, visits: Iterable[Mapping[str, Any]], state: TrainerState) -> None:
        """Append one optimizer step's visits: `id` first, then `epoch` and `step`, then the rest; NaN and infinity as null."""
        when = {"epoch": round(state.epoch or 0.0, 6), "step": state.global_step}
        rows = ({"id": visit["id"], **when} | {key: _finite(value) for key, value in visit.items()} for visit in visits)
        with LineAppender(self.path) as file:
            file.append_rows(rows)

    def begin(self, last_step: int) -> None:
        """Make the file hold exactly the steps up to `last_step`, after which training begins."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        if last_step == 0:
            number = 1
            while (aside := self.path.with_name(f"{self.path.stem}.{number}{self.path.suffix}")).exists():
                number += 1
            self.path.rename(aside)
            return
        with self.path.open("rb") as old, atomic_files(self.path) as (partial,), partial.open("wb") as new:
            for line in old:
                try:
                    keep = line.endswith(b"\n") and json.loads(line)["step"] <= last_step
                except ValueError:
                    keep = False
                if keep:
                    new.write(line)


def _finite(value: Any) -> Any:
    """JSON knows neither infinity nor NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
