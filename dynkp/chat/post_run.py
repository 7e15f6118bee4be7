"""The base of runs that ask a chat server about posts and write files: what `dynkp rationales` and `dynkp judge` share.

Settings that change what is asked change the fingerprints of the posts, so that an answer to another request is never used.
Other settings (concurrency, prices, and whatever concerns the output only) may change between runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from dynkp.chat.journal import AnswerJournal
from dynkp.chat.run import Conversation, Outcome, RequestRun
from dynkp.chat.settings import RunPaths, RunSettings
from dynkp.files.json_files import write_json

Settings = TypeVar("Settings", bound=RunSettings)


class PostRun(Generic[Settings]):
    """A run over posts, from settings to files. It is a context manager, which closes the journal.

    A derived class checks its own settings, and then calls `_open_journal`.

    Args:
        settings: The settings.
        paths: The files of the run.
        *inputs: Further files that the run reads, besides the posts.
        shard: As in `PostStream`.

    Attributes:
        posts: The posts.
        journal: The journal of answers.
        outcome: The outcome of asking; None before.

    Raises:
        FileNotFoundError: If the posts or their image folder do not exist.
        ValueError: If the settings are wrong, or a file that is read would be replaced.
    """

    label = "Asking"

    def __init__(self, settings: Settings, paths: RunPaths, *inputs: str, shard: tuple[int, int] = (1, 1)):
        self.settings = settings
        self.paths = paths
        self.paths.check_inputs(settings.posts, *inputs)
        self.posts = settings.open_posts(shard)
        self.prices = settings.price_table()
        self.outcome: Outcome | None = None

    def _open_journal(self) -> None:
        """Open the journal, which excludes other runs with this output.

        Raises:
            BlockingIOError: If another run has it.
        """
        self.journal = AnswerJournal(self.paths.journal)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.journal.close()

    def _request_run(self, conversation: Conversation, asked: Mapping[str, Any]) -> RequestRun:
        """Create the run that asks.

        Args:
            conversation: What to ask about a post.
            asked: Everything besides the post that the conversation depends on, as JSON values.
        """
        return RequestRun(
            self.posts,
            conversation,
            self.journal,
            settings=json.dumps({**asked, "allow_image_urls": self.settings.allow_image_urls}, sort_keys=True),
            prices=self.prices,
            max_cost=self.settings.max_cost,
            retry_failed=self.settings.retry_failed,
            label=self.label,
            progress=self.settings.progress,
        )

    def _ask(self, run: RequestRun) -> Outcome:
        """Ask about all posts that are not settled.

        Args:
            run: What `_request_run` created.
        """
        return run.ask(self.settings.client, concurrency=self.settings.concurrency)

    def _write_report(self, report: Mapping[str, Any], **recorded: Any) -> None:
        """Write a report, with the cost and number of requests.

        Args:
            report: The report.
            **recorded: What else to write, such as the settings.
        """
        assert self.outcome is not None
        costs = {"cost": self.outcome.cost, "requests": self.outcome.requests}
        write_json(self.paths.report, {**report, **costs, **recorded})
