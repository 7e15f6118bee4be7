"""Rationales for posts, from the settings to the files.

Given   settings.
Gives   what `dynkp rationales` does: ask, export and import batches, write the files.
Holds   settings that change what is asked change the posts' fingerprints, so that answers to other questions are never taken
        for these; settings that do not (concurrency, filters, prices) may change between runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dynkp.chat.batch_files import ImportCounts, export_requests, import_results
from dynkp.chat.post_run import PostRun
from dynkp.chat.request import ChatRequest
from dynkp.chat.run import Outcome
from dynkp.chat.settings import RunPaths, RunSettings
from dynkp.data.images import ImageError
from dynkp.data.reasoning_tasks import REASONING_TASKS
from dynkp.rationales.files import write_rationales
from dynkp.rationales.filters import DEFAULT_FILTERS, RationaleFilter
from dynkp.rationales.prompts import DYNAMIC_COT, RationaleDialogue, load_templates


@dataclass(frozen=True)
class RationaleSettings(RunSettings):
    """What to ask about which posts, and what to do with the answers.

    Attributes:
        task: `dynamic_cot`, `masc`, `msc` or `keyphrases`.
        template: file of templates; None for the task's own.
        shard: `(i, n)`: every n-th post from the i-th on.
        filters, min_words, max_words, max_similarity: what rationales are rejected for.
        keep_all: whether posts without rationale go to the output, too, with null.
        preview: posts on the HTML page.

    The others are those of `RunSettings`.
    """

    task: str = DYNAMIC_COT
    template: str | None = None
    shard: tuple[int, int] = (1, 1)
    filters: tuple[str, ...] = DEFAULT_FILTERS
    min_words: int = 10
    max_words: int = 600
    max_similarity: float = 0.8
    keep_all: bool = False
    preview: int = 0


class RationaleRun(PostRun[RationaleSettings]):
    """A run of `dynkp rationales`.

    Args:
        settings: the settings.

    Raises:
        ValueError: naming what does not fit.
        BlockingIOError: if another run writes to the same output.

    Example:
        >>> settings = RationaleSettings("posts.jsonl", "r.jsonl", "teacher", base_url="http://127.0.0.1:8000/v1")
        >>> with RationaleRun(settings) as run:
        ...     outcome = run.ask()
        ...     report = run.write()
    """

    label = "Rationales"

    def __init__(self, settings: RationaleSettings):
        paths = RunPaths(settings.output)
        super().__init__(settings, paths if settings.shard[1] == 1 else paths.of_shard(*settings.shard), shard=settings.shard)
        templates = load_templates(settings.template, settings.task) if settings.template else None
        self.dialogue = RationaleDialogue(
            settings.task, settings.request_settings(), max_side=settings.max_side, templates=templates
        )
        self.judge = RationaleFilter(
            settings.filters,
            min_words=settings.min_words,
            max_words=settings.max_words,
            field_names=self.dialogue.field_names(),
            reasoning_task=REASONING_TASKS.get(settings.task),
        )
        self._open_journal()
        self.run = self._request_run(self.dialogue, self.dialogue.describe())

    def ask(self) -> Outcome:
        """Ask about all posts that are not answered yet.

        Raises:
            ValueError: if there is no address to ask at.
        """
        self.settings.check_server()
        self.outcome = self._ask(self.run)
        return self.outcome

    def replay(self) -> Outcome:
        """Take stock of what is answered, without asking."""
        self.outcome = self.run.replay()
        return self.outcome

    def export(self, folder: str | os.PathLike[str]) -> tuple[int, list[Path]]:
        """Write the requests that come next as batch files (`dynkp.chat.batch_files`).

        A request whose picture cannot be read is left out: its post has failed, as when it is asked about directly.
        """
        return export_requests(self.run.next_requests(), folder, on_image_error=self._record_image_error)

    def _record_image_error(self, request: ChatRequest, error: ImageError) -> None:
        row = {"stage": request.stage, "model": self.settings.model, "failed": True, "invalid": True, "error": str(error)}
        self.journal.append(request.key, row)

    def import_results(self, paths: Iterable[str | os.PathLike[str]]) -> ImportCounts:
        """Take the results of batches into the journal."""
        return import_results(paths, self.journal, model=self.settings.model)

    def write(self) -> dict[str, Any]:
        """Write the files, as far as posts are answered; `ask` or `replay` comes first.

        Returns:
            The report.
        """
        if self.outcome is None:
            self.replay()
        assert self.outcome is not None
        settings = self.settings
        report = write_rationales(
            self.posts,
            self.run.last_key,
            self.journal,
            self.paths,
            self.judge,
            max_similarity=settings.max_similarity,
            keep_all=settings.keep_all,
            preview=settings.preview,
            progress=settings.progress,
        )
        recorded = {"keep_all": settings.keep_all, "shard": list(settings.shard), "settings": self._recorded_settings()}
        self._write_report(report, **recorded)
        return report

    def _recorded_settings(self) -> dict[str, Any]:
        """What made the rationales: the same for all shards of a run."""
        made = ("task", "model", "limit", "filters", "min_words", "max_words", "keep_all")
        settings = {name: value for name, value in asdict(self.settings).items() if name in made}
        return {**settings, "posts": Path(self.settings.posts).name, **json.loads(json.dumps(self.dialogue.describe()))}
