"""examples/keyphrases.py, as a newcomer runs it: within a minute of CPU time, offline, and what it learned is right."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

from dynkp.data.tasks import TASKS
from dynkp.models.saved_task import FILE, SavedTask
from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "examples/keyphrases.py"


def test_it_learns_and_is_short(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 60
    figures = re.search(r"F1@3 (\S+), of keyphrases in the text (\S+); (\d+)% reasoned", done.stdout)
    assert figures is not None and float(figures[1]) > 0.9 and float(figures[2]) > 0.9 and int(figures[3]) > 50
    assert SavedTask.read(tmp_path / "runs/keyphrases" / FILE).task == TASKS["dynamic_cot"]
    assert len(SCRIPT.read_text().splitlines()) <= 60
