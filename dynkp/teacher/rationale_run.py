"""Rationales for posts, from the settings to the files.

Given   settings.
Gives   what `dynkp rationales` does: ask, export and import batches, write the files.
Holds   settings that change what is asked change the posts' fingerprints, so that answers to other questions are never taken
        for these; settings that do not (concurrency, filters, prices) may change between runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dynkp.data.reasoning_tasks import REASONING_TASKS
from dynkp.report.scores import write_json
from dynkp.teacher.batch_files import Imported, export_requests, import_results
from dynkp.teacher.chat_client import KEY_VARIABLE, ChatClient
from dynkp.teacher.journal import AnswerJournal
from dynkp.teacher.post_stream import PostStream
from dynkp.teacher.prices import load_prices
from dynkp.teacher.rationale_files import RationalePaths, write_rationales
from dynkp.teacher.rationale_filters import DEFAULT_FILTERS, RationaleFilter
from dynkp.teacher.rationale_prompts import DYNAMIC_COT, RationaleDialogue, load_templates
from dynkp.teacher.request_run import Outcome, RequestRun


@dataclass(frozen=True)
class RationaleSettings:
    """What to ask about which posts, and what to do with the answers.

    Attributes:
        posts: JSON Lines file of posts.
        output: JSON Lines file of posts with rationales; the other files are named after it.
        model: as the server calls it.
        base_url: the server's address up to `/v1`.
        image_dir: the folder that image names are relative to.
        task: `dynamic_cot`, `masc`, `msc` or `keyphrases`.
        template: file of templates; None for the task's own.
        max_side: longest side of a picture in pixels, at least 16.
        allow_image_urls: whether pictures may be addresses, which the server fetches.
        max_tokens: longest answer, in tokens.
        temperature, top_p, seed: of sampling; None leaves them to the server.
        extra_body: more fields of the request's body.
        shard: `(i, n)`: every n-th post from the i-th on.
        limit: only the first posts; None for all.
        concurrency: most requests at once.
        timeout: seconds to wait for an answer.
        max_attempts: how often a request is sent before its post fails.
        retry_pause: seconds before a request is sent again; doubled each time, up to a minute.
        key_variable: environment variable with the API key.
        retry_failed: whether to ask again about posts that failed in an earlier run.
        prices: file with a table of prices.
        max_cost: stop before answers cost more.
        filters, min_words, max_words, max_similarity: what rationales are rejected for.
        keep_all: whether posts without rationale go to the output, too, with null.
        preview: posts on the HTML page.
        progress: whether to show progress bars.
    """

    posts: str
    output: str
    model: str
    base_url: str = ""
    image_dir: str | None = None
    task: str = DYNAMIC_COT
    template: str | None = None
    max_side: int = 1024
    allow_image_urls: bool = False
    max_tokens: int = 1024
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    shard: tuple[int, int] = (1, 1)
    limit: int | None = None
    concurrency: int = 32
    timeout: float = 120.0
    max_attempts: int = 6
    retry_pause: float = 0.5
    key_variable: str = KEY_VARIABLE
    retry_failed: bool = False
    prices: str | None = None
    max_cost: float | None = None
    filters: tuple[str, ...] = DEFAULT_FILTERS
    min_words: int = 10
    max_words: int = 600
    max_similarity: float = 0.8
    keep_all: bool = False
    preview: int = 0
    progress: bool = True

    def request_settings(self) -> dict[str, Any]:
        """The body of every request, messages aside."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        given = {name: value for name, value in sampling.items() if value is not None}
        # Where extra_body sets another name for it, as OpenAI's reasoning models want it, max_tokens must not be sent.
        length = {} if "max_completion_tokens" in self.extra_body else {"max_tokens": self.max_tokens}
        return {"model": self.model, **length, **given, **self.extra_body}


class RationaleRun:
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

    def __init__(self, settings: RationaleSettings):
        if settings.max_side < 16:
            raise ValueError(f"max_side={settings.max_side!r} must be at least 16 pixels")
        self.settings = settings
        paths = RationalePaths(settings.output)
        self.paths = paths if settings.shard[1] == 1 else paths.of_shard(*settings.shard)
        self.stream = PostStream(
            settings.posts,
            settings.image_dir,
            shard=settings.shard,
            limit=settings.limit,
            allow_image_urls=settings.allow_image_urls,
        )
        prices = load_prices(settings.prices) if settings.prices else {}
        if settings.max_cost is not None and settings.model not in prices:
            given = settings.prices or "none was given"
            raise ValueError(
                f"max_cost={settings.max_cost!r} needs the price of model {settings.model!r}, and the table of prices "
                f"({given}) has none: add it"
            )
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
        asked = {**self.dialogue.describe(), "allow_image_urls": settings.allow_image_urls}
        self.journal = AnswerJournal(self.paths.journal)
        self.run = RequestRun(
            self.stream,
            self.dialogue,
            self.journal,
            settings=json.dumps(asked, sort_keys=True),
            prices=prices,
            max_cost=settings.max_cost,
            retry_failed=settings.retry_failed,
            label="Rationales",
            progress=settings.progress,
        )
        self.outcome: Outcome | None = None

    def __enter__(self) -> RationaleRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.close()

    def ask(self) -> Outcome:
        """Ask about all posts that are not answered yet.

        Raises:
            ValueError: if there is no address to ask at.
        """
        settings = self.settings
        if not settings.base_url:
            raise ValueError("base_url is missing: name the server, such as http://127.0.0.1:8000/v1")

        def client() -> ChatClient:
            return ChatClient(
                settings.base_url,
                concurrency=settings.concurrency,
                timeout=settings.timeout,
                max_attempts=settings.max_attempts,
                first_pause=settings.retry_pause,
                key_variable=settings.key_variable,
            )

        self.outcome = self.run.ask(client, concurrency=settings.concurrency)
        return self.outcome

    def replay(self) -> Outcome:
        """Take stock of what is answered, without asking."""
        self.outcome = self.run.replay()
        return self.outcome

    def export(self, folder: str | os.PathLike[str]) -> tuple[int, list[Path]]:
        """Write the requests that come next as batch files (`dynkp.teacher.batch_files`)."""
        return export_requests(self.run.unanswered(), folder)

    def import_results(self, paths: Iterable[str | os.PathLike[str]]) -> Imported:
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
            self.stream,
            self.run.keys.get,
            self.journal,
            self.paths,
            self.judge,
            max_similarity=settings.max_similarity,
            keep_all=settings.keep_all,
            preview=settings.preview,
            progress=settings.progress,
        )
        recorded = {
            **report,
            "cost": self.outcome.cost,
            "requests": self.outcome.requests,
            "keep_all": settings.keep_all,
            "shard": list(settings.shard),
            "settings": self._recorded_settings(),
        }
        write_json(self.paths.report, recorded)
        return report

    def _recorded_settings(self) -> dict[str, Any]:
        """What made the rationales: the same for all shards of a run."""
        made = ("task", "model", "limit", "filters", "min_words", "max_words", "keep_all")
        settings = {name: value for name, value in asdict(self.settings).items() if name in made}
        return {**settings, "posts": Path(self.settings.posts).name, **json.loads(json.dumps(self.dialogue.describe()))}
