"""Settings and files that all commands asking a chat server about posts have in common (`dynkp rationales`, `dynkp judge`).

A limit of cost without the model's price is refused before anything is asked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynkp.chat.client import KEY_VARIABLE, MAX_ATTEMPTS, ChatClient
from dynkp.chat.post_stream import PostStream
from dynkp.chat.prices import Price, load_prices

# Fields of a request's body that the run sets itself, or that would change the format of answers.
_RESERVED = {"messages", "model", "n", "stream"}


@dataclass(frozen=True)
class RunSettings:
    """Posts, server, sampling and limits of a run.

    Attributes:
        posts: JSON Lines file of posts.
        output: JSON Lines file to write; the other files are named after it (`RunPaths`).
        model: The model's name at the server.
        base_url: The server's address up to `/v1`; may be empty if nothing is asked.
        image_dir: The folder that names of image files are relative to.
        max_side: Longest side of an image in pixels, at least 16; larger images are shrunk.
        allow_image_urls: Whether images may be addresses, from which the server fetches them.
        max_tokens: Maximum length of an answer, in tokens.
        temperature: Sampling temperature; None for the server's default.
        top_p: Nucleus sampling; None for the server's default.
        seed: Seed of sampling; None for the server's default.
        extra_body: Further fields of the request's body.
        limit: Number of posts, from the file's first on; None for all.
        concurrency: Maximum number of requests at once.
        timeout: Seconds to wait for an answer.
        max_attempts: Number of times a request is sent before its post fails.
        retry_pause: Seconds before the second attempt; doubled for each further one, up to a minute.
        key_variable: Environment variable with the API key.
        retry_failed: Whether posts that failed in an earlier run are asked about again.
        prices: File with a table of prices (`dynkp.chat.prices`).
        max_cost: The run stops before all its answers cost more, in the table's currency.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If `max_side` is too small, or `extra_body` has a field that the run sets itself.

    Example:
        >>> RunSettings("posts.jsonl", "r.jsonl", "m", temperature=0.0).request_settings()
        {'model': 'm', 'max_tokens': 1024, 'temperature': 0.0}
    """

    posts: str
    output: str
    model: str
    base_url: str = ""
    image_dir: str | None = None
    max_side: int = 1024
    allow_image_urls: bool = False
    max_tokens: int = 1024
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    concurrency: int = 32
    timeout: float = 120.0
    max_attempts: int = MAX_ATTEMPTS
    retry_pause: float = 0.5
    key_variable: str = KEY_VARIABLE
    retry_failed: bool = False
    prices: str | None = None
    max_cost: float | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.max_side < 16:
            raise ValueError(f"max_side={self.max_side!r} must be at least 16 pixels")
        if reserved := sorted(_RESERVED & self.extra_body.keys()):
            raise ValueError(f"extra_body must not have {', '.join(reserved)}: the run sets these fields itself")

    def request_settings(self) -> dict[str, Any]:
        """The body of every request, without messages."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        given = {name: value for name, value in sampling.items() if value is not None}
        # OpenAI's reasoning models take max_completion_tokens, from extra_body, and refuse max_tokens.
        length = {} if "max_completion_tokens" in self.extra_body else {"max_tokens": self.max_tokens}
        return {"model": self.model, **length, **given, **self.extra_body}

    def price_table(self) -> dict[str, Price]:
        """Load the table of prices.

        Returns:
            The price of each model; empty without a table.

        Raises:
            ValueError: If there is a limit of cost or a table, and the model has no price.
        """
        prices = load_prices(self.prices) if self.prices else {}
        if self.max_cost is not None and self.model not in prices:
            raise ValueError(
                f"max_cost={self.max_cost!r} needs the price of model {self.model!r}, and the table of prices "
                f"({self.prices or 'none was given'}) has none: add it"
            )
        if self.prices and self.model not in prices:
            raise ValueError(f"prices={self.prices!r} has no price of model {self.model!r}: add it, or leave the table out")
        return prices

    def open_posts(self, shard: tuple[int, int] = (1, 1)) -> PostStream:
        """Open the posts.

        Args:
            shard: As in `PostStream`.

        Raises:
            FileNotFoundError: If the file or the image folder does not exist.
            ValueError: If the file is not JSON Lines.
        """
        return PostStream(self.posts, self.image_dir, shard=shard, limit=self.limit, allow_image_urls=self.allow_image_urls)

    def client(self) -> ChatClient:
        """Create a client of the server; call it inside the event loop that uses the client.

        Raises:
            ValueError: As for `ChatClient`.
        """
        return ChatClient(
            self.base_url,
            concurrency=self.concurrency,
            timeout=self.timeout,
            max_attempts=self.max_attempts,
            first_pause=self.retry_pause,
            key_variable=self.key_variable,
        )

    def check_server(self) -> None:
        """Check that the server's address is given.

        Raises:
            ValueError: If it is missing.
        """
        if not self.base_url:
            raise ValueError("base_url is missing: name the server, such as http://127.0.0.1:8000/v1")


class RunPaths:
    """The files of a run, named after its output.

    Args:
        output: The JSON Lines file that the run writes.

    Attributes:
        output: The output.
        errors: `R.errors.jsonl`, the posts without a result.
        report: `R.report.json`, counts, settings and cost.
        table: `R.report.md`, tables for people.
        preview: `R.preview.html`, a page of some posts.
        journal: `R.journal`, the folder of all answers.

    Example:
        >>> RunPaths("out/r.jsonl").errors
        PosixPath('out/r.errors.jsonl')
    """

    def __init__(self, output: str | os.PathLike[str]):
        self.output = Path(output)
        stem = self.output.name.removesuffix(".jsonl")
        self.errors = self.output.with_name(f"{stem}.errors.jsonl")
        self.report = self.output.with_name(f"{stem}.report.json")
        self.table = self.output.with_name(f"{stem}.report.md")
        self.preview = self.output.with_name(f"{stem}.preview.html")
        self.journal = self.output.with_name(f"{stem}.journal")

    def check_inputs(self, *files: str) -> None:
        """Check that the run replaces no file that it reads.

        Args:
            *files: The files that it reads.

        Raises:
            ValueError: If it would replace one of them; the message names it.
        """
        written = (self.output, self.errors, self.report, self.table, self.preview)
        for file in files:
            if os.path.realpath(file) in map(os.path.realpath, written):
                raise ValueError(f"{file} is read, and would be replaced by what is written: choose another output")

    def of_shard(self, number: int, count: int) -> RunPaths:
        """The files of one of several machines: `r.2-of-4.jsonl` and so on.

        Args:
            number: The machine's number, from 1.
            count: The number of machines.
        """
        stem = self.output.name.removesuffix(".jsonl")
        return RunPaths(self.output.with_name(f"{stem}.{number}-of-{count}.jsonl"))
