"""Rationales for millions of posts on a cluster: a `datatrove` pipeline.

Given   a folder of JSON Lines files of posts, and the settings of a run.
Gives   pipeline steps for any of datatrove's executors (local, Slurm, Ray): each task reads its share of the files, sends the
        requests, and writes its share of the rationales.
Holds   a task that is killed and restarted resumes from its own journal; posts without a rationale are not in the output but
        in the task's `.errors.jsonl`. Between steps a document's text is the rationale, so that datatrove's own steps
        (MinHash deduplication over all tasks, filters) process rationales.

Needs the extra `datatrove`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers.jsonl import JsonlWriter

from dynkp.files.json_lines import json_line, read_json_lines, write_json_lines
from dynkp.rationales.run import RationaleRun, RationaleSettings

_POST = "post"


class AskTeacher(PipelineStep):
    """A pipeline step that requests rationales for a task's posts, and yields the posts that have one.

    Args:
        settings: The settings of `dynkp rationales`; the step sets `posts`, `output`, `shard`, `keep_all` and `progress`.
        work_dir: A folder that all machines share; contains the files of each task.

    Example:
        >>> step = AskTeacher(RationaleSettings("", "", "teacher", base_url="http://127.0.0.1:8000/v1"), "work")
        >>> step.settings.model
        'teacher'
    """

    type = "💬 - TEACHER"
    name = "dynkp rationales"

    def __init__(self, settings: RationaleSettings, work_dir: str):
        super().__init__()
        self.settings = settings
        self.work_dir = work_dir

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Request rationales for the posts of one task.

        Args:
            data: The task's documents, whose metadata hold the posts.
            rank: The task's number, from 0.
            world_size: The number of tasks.

        Yields:
            The posts that have a rationale, as documents whose text is the rationale.

        Raises:
            RuntimeError: If the run ended before all posts were processed; the executor restarts the task.
        """
        folder = Path(self.work_dir)
        folder.mkdir(parents=True, exist_ok=True)
        posts, output = (folder / f"{rank:05d}.{kind}.jsonl" for kind in ("posts", "rationales"))
        # A restarted task writes the same lines again, and its journal recognises them.
        write_json_lines(posts, (document.metadata[_POST] for document in data))
        settings = dataclasses.replace(
            self.settings, posts=str(posts), output=str(output), shard=(1, 1), keep_all=False, progress=False
        )
        with self.track_time(), RationaleRun(settings) as run:
            outcome = run.ask()
            if outcome.stopped is not None:
                # The executor counts the task as failed, and restarts it.
                raise RuntimeError(f"task {rank} stopped with {outcome.open} posts open ({outcome.stopped}: {outcome.reason})")
            report = run.write()
        self.stat_update("posts", value=report["posts"])
        self.stat_update("rationales", value=report["written"])
        for reason, count in {**report["rejected"], "failed": outcome.failed}.items():
            self.stat_update(f"without_{reason}", value=count)
        for _, post in read_json_lines(output):
            yield Document(text=post["rationale"], id=post["id"], metadata={_POST: post})


def _read_post(self: Any, data: dict[str, Any], path: str, id_in_file: int | str) -> dict[str, Any]:
    """Adapter of datatrove's reader: the text is the whole post, because datatrove drops documents without text."""
    post = {"id": f"{Path(path).stem}-{id_in_file}", **data}
    return {"text": json_line(post), "id": str(post["id"]), "metadata": {_POST: post}}


def _write_post(self: Any, document: Document) -> dict[str, Any]:
    """Adapter of datatrove's writer: the post with its rationale."""
    return document.metadata[_POST]


def rationale_pipeline(
    posts_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    work_dir: str | os.PathLike[str],
    settings: RationaleSettings,
) -> list[PipelineStep]:
    """Build the steps from posts to posts with rationales.

    Args:
        posts_dir: The folder of `*.jsonl` (or `.jsonl.gz`) files. A task reads whole files: provide at least one per task.
        output_dir: The folder for the output, one file per task.
        work_dir: A folder for the tasks' journals, kept until all tasks have finished.
        settings: The settings of the run; `posts` and `output` are set for each task.

    Returns:
        The steps, for an executor.

    Example:
        ```python
        steps = rationale_pipeline("posts", "rationales", "work", settings)
        LocalPipelineExecutor(steps, tasks=8, workers=8, logging_dir="logs").run()
        ```
    """
    return [
        JsonlReader(str(posts_dir), adapter=_read_post),
        AskTeacher(settings, str(work_dir)),
        JsonlWriter(str(output_dir), adapter=_write_post, compression=None),
    ]
