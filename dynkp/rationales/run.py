"""Rationales for posts: from the settings to the files.

Given   settings.
Gives   the actions of `dynkp rationales`: send requests, export and import batches, write the files.
Holds   settings that change requests change the posts' fingerprints, so that answers to other requests are never used;
        settings that do not (concurrency, filters, prices) may change between runs.
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
from dynkp.rationales.prompts import DYNAMIC_COT, RationaleConversation, load_templates


@dataclass(frozen=True)
class RationaleSettings(RunSettings):
    """Settings of a run, besides those of `RunSettings`.

    Attributes:
        task: `dynamic_cot`, `masc`, `msc` or `keyphrases`.
        template: A YAML file of templates; None for the task's own.
        shard: `(i, n)`, i from 1 to n: only every n-th post from the i-th on.
        filters: The names of the filters that reject rationales (`dynkp.rationales.filters.FILTERS`).
        min_words: The least number of words of a rationale.
        max_words: The largest number of words of a rationale.
        max_similarity: The least Jaccard similarity of near-copies, above 0 and at most 1.
        keep_all: Whether posts without a rationale go to the output too, with null.
        preview: The number of posts on the HTML page; 0 for no page.
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
    """A run of `dynkp rationales`; a context manager, which locks the output.

    Args:
        settings: The settings.

    Attributes:
        outcome: How the last `ask` or `replay` ended; None before.

    Raises:
        ValueError: If posts, templates or settings do not match.
        BlockingIOError: If another run writes to the same output.

    Example:
        ```python
        settings = RationaleSettings("posts.jsonl", "r.jsonl", "teacher", base_url="http://127.0.0.1:8000/v1")
        with RationaleRun(settings) as run:
            outcome = run.ask()
            report = run.write()
        ```
    """

    label = "Rationales"

    def __init__(self, settings: RationaleSettings):
        paths = RunPaths(settings.output)
        super().__init__(settings, paths if settings.shard[1] == 1 else paths.of_shard(*settings.shard), shard=settings.shard)
        templates = load_templates(settings.template, settings.task) if settings.template else None
        self.conversation = RationaleConversation(
            settings.task, settings.request_settings(), max_side=settings.max_side, templates=templates
        )
        self.rationale_filter = RationaleFilter(
            settings.filters,
            min_words=settings.min_words,
            max_words=settings.max_words,
            field_names=self.conversation.field_names(),
            reasoning_task=REASONING_TASKS.get(settings.task),
        )
        self._open_journal()
        self.run = self._request_run(self.conversation, self.conversation.describe())

    def ask(self) -> Outcome:
        """Send the requests about all posts that have no answer yet.

        Returns:
            How the run ended.

        Raises:
            ValueError: If `base_url` is not set.
        """
        self.settings.check_server()
        self.outcome = self._ask(self.run)
        return self.outcome

    def replay(self) -> Outcome:
        """Determine from the journal which posts are answered, without sending requests."""
        self.outcome = self.run.replay()
        return self.outcome

    def export(self, folder: str | os.PathLike[str]) -> tuple[int, list[Path]]:
        """Write the next request of every post as batch files (`dynkp.chat.batch_files`).

        A request whose image cannot be read is not written; its post counts as failed, as in `ask`.

        Args:
            folder: The folder for the batch files.

        Returns:
            The number of requests, and the files.
        """
        return export_requests(self.run.next_requests(), folder, on_image_error=self._record_image_error)

    def _record_image_error(self, request: ChatRequest, error: ImageError) -> None:
        row = {"stage": request.stage, "model": self.settings.model, "failed": True, "invalid": True, "error": str(error)}
        self.journal.append(request.key, row)

    def import_results(self, paths: Iterable[str | os.PathLike[str]]) -> ImportCounts:
        """Add the results of batches to the journal.

        Args:
            paths: The result files.

        Returns:
            The numbers of answers, failures and known requests.
        """
        return import_results(paths, self.journal, model=self.settings.model)

    def write(self) -> dict[str, Any]:
        """Write the files for the posts answered so far; `replay` is called if neither it nor `ask` was.

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
            self.rationale_filter,
            max_similarity=settings.max_similarity,
            keep_all=settings.keep_all,
            preview=settings.preview,
            progress=settings.progress,
        )
        recorded = {"keep_all": settings.keep_all, "shard": list(settings.shard), "settings": self._recorded_settings()}
        self._write_report(report, **recorded)
        return report

    def _recorded_settings(self) -> dict[str, Any]:
        """The settings on which the rationales depend: the same for all shards of a run."""
        names = ("task", "model", "limit", "filters", "min_words", "max_words", "keep_all")
        settings = {name: value for name, value in asdict(self.settings).items() if name in names}
        return {**settings, "posts": Path(self.settings.posts).name, **json.loads(json.dumps(self.conversation.describe()))}
