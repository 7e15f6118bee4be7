"""Systems ranked by a large model: from the settings to the files.

Given   settings: posts, and files of systems' predictions.
Gives   the files of `dynkp judge`: `R.jsonl` (ranks per post), `R.errors.jsonl`, `R.report.json`, `R.report.md`.
Holds   settings that change requests change the posts' fingerprints, as in `dynkp.rationales.run`; every post is in exactly
        one of the first two files, unless the run ended before it; names and order of the systems, ties and resampling may
        change without a new request.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dynkp.chat.client import RequestFailed, ServerUnusable
from dynkp.chat.post_run import PostRun
from dynkp.chat.post_stream import SourcePost
from dynkp.chat.request import ChatRequest
from dynkp.chat.run import Outcome, RequestRun
from dynkp.chat.settings import RunPaths, RunSettings
from dynkp.files.atomic import atomic_files, write_text
from dynkp.files.json_lines import json_line
from dynkp.judging.candidates import load_candidates
from dynkp.judging.prompts import JudgeConversation, read_answer_ranks, response_format
from dynkp.judging.ranks import CRITERIA, TIES, Judgement, rank_report, rank_tables

INVALID, FAILED, UNREADABLE = "invalid_post", "request_failed", "invalid_ranks"
ANSWER_FORMATS = ("auto", "json_schema", "text")


@dataclass(frozen=True)
class JudgeSettings(RunSettings):
    """Settings of a judging run, besides those of `RunSettings`.

    Attributes:
        predictions: System -> JSON Lines file of predictions.
        allow_missing: Whether a post without a prediction counts as one with an empty prediction.
        top: The number of each system's keyphrases that are shown; None for all.
        shuffle_seed: The seed of the orders shown, and of resampling.
        answer_format: `json_schema` sends the request field `response_format`, `text` does not, `auto` tests once which of them
            the server supports.
        max_replies: The largest number of answers requested per post until one is valid, at least 1.
        ties: The ranks of equal candidates, as in `dynkp.judging.ranks.mean_ranks`.
        confidence: The confidence of the intervals, between 0 and 1.
        resamples: The number of resamples of the posts.
    """

    predictions: Mapping[str, str] = field(default_factory=dict)
    allow_missing: bool = False
    top: int | None = None
    shuffle_seed: int = 0
    answer_format: str = "auto"
    max_replies: int = 3
    ties: str = "dense"
    confidence: float = 0.95
    resamples: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("answer_format", ANSWER_FORMATS), ("ties", TIES)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}={value!r} is not known: use one of {', '.join(known)}")


class JudgeRun(PostRun[JudgeSettings]):
    """A run of `dynkp judge`; a context manager, which locks the output.

    Args:
        settings: The settings.

    Attributes:
        candidates: Post id -> candidates, in the order in which they are shown.
        missing: The number of missing predictions.
        outcome: How the last `ask` or `write` ended; None before.

    Raises:
        ValueError: If posts, predictions or settings do not match.
        BlockingIOError: If another run writes to the same output.

    Example:
        ```python
        predictions = {"direct": "direct.jsonl", "dynamic": "dynamic.jsonl"}
        url = "http://127.0.0.1:8000/v1"
        with JudgeRun(JudgeSettings("posts.jsonl", "ranks.jsonl", "m", url, predictions=predictions)) as run:
            outcome = run.ask()
            report = run.write()
        ```
    """

    label = "Judging"

    def __init__(self, settings: JudgeSettings):
        super().__init__(settings, RunPaths(settings.output), *settings.predictions.values())
        self.candidates, self.missing = load_candidates(
            self.posts,
            settings.predictions,
            seed=settings.shuffle_seed,
            top=settings.top,
            allow_missing=settings.allow_missing,
        )
        self.conversation = self._conversation(structured=False)
        self._open_journal()
        self._probes = 0
        self.run: RequestRun | None = None

    def ask(self) -> Outcome:
        """Send the requests about all posts that have no ranks yet.

        Returns:
            How the run ended.

        Raises:
            ValueError: If `base_url` is not set.
        """
        self.settings.check_server()
        structured = self._structured()
        if structured is None:
            try:
                structured = asyncio.run(self._try_formats())
            except (RequestFailed, ServerUnusable) as error:
                self.outcome = Outcome(0, 0, len(self.posts), stopped="server", reason=str(error), requests=self._probes)
                return self.outcome
        self.run = self._ranking_run(structured)
        outcome = self._ask(self.run)
        self.outcome = Outcome(**{**asdict(outcome), "requests": outcome.requests + self._probes})
        return self.outcome

    # --- the format of answers ---

    def _probe(self, structured: bool) -> ChatRequest:
        prompt = 'Reply with this JSON object: {"correctness": {"A": 1}, "relevance": {"A": 1}, "usefulness": {"A": 1}}'
        more = {"response_format": response_format(1)} if structured else {}
        return ChatRequest([{"role": "user", "content": prompt}], {**self.settings.request_settings(), **more}, "probe")

    def _structured(self) -> bool | None:
        """Whether the server supports `response_format`; None if that is not known yet."""
        if self.settings.answer_format != "auto":
            return self.settings.answer_format == "json_schema"
        for structured in (True, False):
            key = self._probe(structured).key
            if key in self.journal and not self.journal.has_failed(key):
                return structured
        return None

    async def _try_formats(self) -> bool:
        """Send a small request in one format, and in the other if the server rejects it; the journal records the results."""
        client = self.settings.client()
        try:
            try:
                await self._try(client, structured=True)
                return True
            except RequestFailed as error:
                if error.unreachable:  # the other format would not be answered either
                    raise
                await self._try(client, structured=False)
                return False
        finally:
            self._probes = client.sent
            await client.close()

    async def _try(self, client: Any, structured: bool) -> None:
        request = self._probe(structured)
        row = {"id": "", "stage": request.stage, "model": self.settings.model}
        try:
            answer = await client.ask(request)
        except RequestFailed as error:
            self.journal.append(request.key, {**row, "failed": True, "error": str(error)})
            raise
        self.journal.append(request.key, {**row, **asdict(answer)})

    def _conversation(self, structured: bool) -> JudgeConversation:
        return JudgeConversation(
            self.candidates,
            self.settings.request_settings(),
            structured=structured,
            max_replies=self.settings.max_replies,
            max_side=self.settings.max_side,
        )

    def _ranking_run(self, structured: bool) -> RequestRun:
        self.conversation = self._conversation(structured)
        shown = {post_id: [one.keyphrases for one in candidates] for post_id, candidates in self.candidates.items()}
        text = json.dumps(shown, sort_keys=True)
        asked = {**self.conversation.describe(), "candidates": hashlib.blake2b(text.encode()).hexdigest()}
        return self._request_run(self.conversation, asked)

    # --- files ---

    def write(self) -> dict[str, Any]:
        """Write the files for the posts ranked so far; without `ask`, from the journal of an earlier run.

        Returns:
            The report; without `mean_ranks` if no post is ranked.
        """
        if self.run is None:
            self.run = self._ranking_run(bool(self._structured()))
            replayed = self.run.replay()
            self.outcome = self.outcome or replayed
        assert self.outcome is not None
        settings, paths = self.settings, self.paths
        counts: Counter[str] = Counter()
        judgements: list[Judgement] = []
        with atomic_files(paths.errors, paths.output) as (errors, output):
            with output.open("w", encoding="utf-8", errors="replace") as ranks, errors.open("w", encoding="utf-8") as failures:
                for place, source in enumerate(self.posts):
                    key = self.run.last_key(place)
                    if key is None:
                        counts["open"] += 1
                        continue
                    row = self.journal.read(key)
                    found = self._judgement(source, row)
                    if isinstance(found, Judgement):
                        judgements.append(found)
                        ranks.write(json_line(found.row(settings.ties)))
                    else:
                        reason, error = found
                        counts[reason] += 1
                        failure = {"reason": reason, "error": error, "reply": row.get("text")}
                        failures.write(json_line({"index": source.index, "id": source.id, **failure}))
        report: dict[str, Any] = {
            "posts": counts.total() + len(judgements),
            "ranked": len(judgements),
            **{name: counts[name] for name in (INVALID, FAILED, UNREADABLE, "open")},
            "missing_predictions": self.missing,
        }
        if judgements:
            report |= rank_report(
                judgements,
                list(settings.predictions),
                ties=settings.ties,
                confidence=settings.confidence,
                resamples=settings.resamples,
                seed=settings.shuffle_seed,
            )
        made = {name: getattr(settings, name) for name in ("model", "limit", "top", "shuffle_seed", "resamples")}
        self._write_report(report, settings={"posts": Path(settings.posts).name, **made, **self.conversation.describe()})
        write_text(paths.table, rank_tables(report) + "\n" if judgements else "No post is ranked.\n")
        return report

    def _judgement(self, source: SourcePost, row: Mapping[str, Any]) -> Judgement | tuple[str, str]:
        """A post's ranks; if there are none, the reason and an error message."""
        if row["failed"]:
            return (INVALID if row.get("invalid") else FAILED), row["error"]
        candidates = self.candidates[source.id]
        order = [candidate.systems for candidate in candidates]
        if len(candidates) == 1:
            return Judgement(source.id, order, {name: [1] for name in CRITERIA}, self.settings.model)
        try:
            ranks = read_answer_ranks(row["text"], len(candidates), row["finish_reason"])
            return Judgement(source.id, order, ranks, self.settings.model)
        except ValueError as error:
            return UNREADABLE, f"{self.settings.max_replies} answers, the last: {error}"


def judging_summary(report: Mapping[str, Any]) -> str:
    """Format a report's counts as one line.

    Args:
        report: The report that `JudgeRun.write` returned.

    Example:
        >>> report = {"posts": 3, "ranked": 2, "request_failed": 1, "invalid_post": 0, "invalid_ranks": 0, "open": 0}
        >>> judging_summary({**report, "missing_predictions": 0})
        '3 posts: 2 ranked, 1 failed'
    """
    parts = [f"{report['ranked']:,} ranked"]
    words = {FAILED: "failed", INVALID: "invalid", UNREADABLE: "without a valid ranking", "open": "not asked yet"}
    parts += [f"{report[name]:,} {text}" for name, text in words.items() if report[name]]
    if report["missing_predictions"]:
        parts.append(f"{report['missing_predictions']:,} predictions missing, counted as empty")
    return f"{report['posts']:,} posts: {', '.join(parts)}"
