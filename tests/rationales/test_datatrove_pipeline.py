"""Invariants of the datatrove pipeline: run by datatrove's own executor, in two processes, it asks about every post of every
file once and writes each with its rationale; run again after a task was lost, it asks nothing again; a post that fails is in
the task's error file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor

from dynkp.rationales.datatrove_pipeline import rationale_pipeline
from dynkp.rationales.run import RationaleSettings
from tests.support.chat_server import serve


def run(folder: Path, url: str, workers: int) -> None:
    settings = RationaleSettings("", "", "m", base_url=url, concurrency=4, max_attempts=2, retry_pause=0.01)
    steps = rationale_pipeline(folder / "posts", folder / "out", folder / "work", settings)
    logs = str(folder / "logs")
    LocalPipelineExecutor(steps, tasks=2, workers=workers, logging_dir=logs, start_method="spawn").run()


def read(folder: Path) -> dict[str, dict]:
    return {row["id"]: row for file in folder.glob("*.jsonl") for row in map(json.loads, file.read_text().splitlines())}


def test_the_pipeline_asks_about_every_post_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("DATATROVE_COLORIZE_LOGS", "0")
    (tmp_path / "posts").mkdir()
    for part in range(3):
        rows = [{"id": f"p{part}-{n}", "text": f"post {part} {n}", "keyphrases": [f"tag {n}"]} for n in range(10)]
        if part == 2:
            rows[3]["text"] += " cursed"
            del rows[4]["id"]
        (tmp_path / "posts" / f"part{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serve(cursed="cursed") as (url, server):
        run(tmp_path, url, workers=2)
        asked = len(server.bodies)
        assert asked == 29 + 2
        rows = read(tmp_path / "out")
        expected = {f"p{part}-{n}" for part in range(3) for n in range(10)} - {"p2-3", "p2-4"} | {"part2-4"}
        assert set(rows) == expected
        assert rows["p1-5"]["keyphrases"] == ["tag 5"]
        assert rows["p1-5"]["rationale"].startswith("People who care about tag 5 would look for it")
        failed = [row for file in (tmp_path / "work").glob("*.errors.jsonl") for row in map(json.loads, file.open())]
        assert [(row["id"], row["reason"]) for row in failed] == [("p2-3", "request_failed")]
        # The executor's record of finished tasks is lost, and a task's output with it.
        shutil.rmtree(tmp_path / "logs")
        shutil.rmtree(tmp_path / "out")
        run(tmp_path, url, workers=1)
        assert len(server.bodies) == asked
        assert read(tmp_path / "out") == rows
