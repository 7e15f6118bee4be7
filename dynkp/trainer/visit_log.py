"""A file with one JSON line per visit of a post and what the method decided, consistent with the checkpoints."""

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
    """Appends to a file in the run's folder; used by the main process only.

    A new run renames an existing file (`choices.1.jsonl`, ...). A resumed run deletes the lines that were written after its
    checkpoint, an incomplete last line included, so that the file contains every visit exactly once.

    Args:
        path (`str` or `Path`): the file, such as `out/choices.jsonl`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def write(self, visits: Iterable[Mapping[str, Any]], state: TrainerState) -> None:
        """Append the visits of an optimizer step.

        Args:
            visits (`Iterable[Mapping]`): one per line, with `id`; written with `epoch` and `step` after the `id`, and NaN and
                infinity as null.
            state ([`~transformers.TrainerState`]): epoch and optimizer step.
        """
        when = {"epoch": round(state.epoch or 0.0, 6), "step": state.global_step}
        rows = ({"id": visit["id"], **when} | {key: _finite(value) for key, value in visit.items()} for visit in visits)
        with LineAppender(self.path) as file:
            file.append_rows(rows)

    def begin(self, last_step: int) -> None:
        """Prepare the file for a training run, so that it contains exactly the steps before it.

        Args:
            last_step (`int`): number of completed optimizer steps; 0 for a new run.
        """
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
    """Replace infinity and NaN, which JSON does not have, by `None`."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
