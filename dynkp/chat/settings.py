"""What every command that asks a chat server about posts is told: which posts, which server, how much.

Given   the options that `dynkp rationales` and `dynkp judge` have in common.
Gives   the posts, the client and the body of requests.
Holds   a limit of cost without a price is refused before anything is asked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynkp.chat.client import KEY_VARIABLE, ChatClient
from dynkp.chat.prices import Price, load_prices

# Of a request's body: what the run sets, and what would change the form of answers.
_RESERVED = {"messages", "model", "n", "stream"}


@dataclass(frozen=True)
class RunSettings:
    """Posts, server, sampling and limits.

    Attributes:
        posts: JSON Lines file of posts.
        output: JSON Lines file to write; the other files are named after it.
        model: as the server calls it.
        base_url: the server's address up to `/v1`.
        image_dir: the folder that image names are relative to.
        max_side: longest side of a picture in pixels, at least 16.
        allow_image_urls: whether pictures may be addresses, which the server fetches.
        max_tokens: longest answer, in tokens.
        temperature, top_p, seed: of sampling; None leaves them to the server.
        extra_body: more fields of the request's body.
        limit: only the first posts; None for all.
        concurrency: most requests at once.
        timeout: seconds to wait for an answer.
        max_attempts: how often a request is sent before its post fails.
        retry_pause: seconds before a request is sent again; doubled each time, up to a minute.
        key_variable: environment variable with the API key.
        retry_failed: whether to ask again about posts that failed in an earlier run.
        prices: file with a table of prices.
        max_cost: stop before answers cost more.
        progress: whether to show progress bars.
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
    max_attempts: int = 6
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
            raise ValueError(f"extra_body must not have {', '.join(reserved)}: a request has its own, and one whole answer")

    def request_settings(self) -> dict[str, Any]:
        """The body of every request, messages aside."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        given = {name: value for name, value in sampling.items() if value is not None}
        # Where extra_body sets another name for it, as OpenAI's reasoning models want it, max_tokens must not be sent.
        length = {} if "max_completion_tokens" in self.extra_body else {"max_tokens": self.max_tokens}
        return {"model": self.model, **length, **given, **self.extra_body}

    def price_table(self) -> dict[str, Price]:
        """The prices that are known.

        Raises:
            ValueError: if there is a limit of cost, or a table, and no price of the model.
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

    def client(self) -> ChatClient:
        """A client of the server; to be made inside the event loop it is to live in.

        Raises:
            ValueError: if the address is none.
        """
        return ChatClient(
            self.base_url,
            concurrency=self.concurrency,
            timeout=self.timeout,
            max_attempts=self.max_attempts,
            first_pause=self.retry_pause,
            key_variable=self.key_variable,
        )

    def need_server(self) -> None:
        """See that there is an address to ask at.

        Raises:
            ValueError: if there is none.
        """
        if not self.base_url:
            raise ValueError("base_url is missing: name the server, such as http://127.0.0.1:8000/v1")


class RunPaths:
    """The files of a run, named after its output.

    Args:
        output: the JSON Lines file that the run writes.

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
        """See that no file that is read would be replaced.

        Raises:
            ValueError: naming the file.
        """
        written = (self.output, self.errors, self.report, self.table, self.preview)
        for file in files:
            if os.path.realpath(file) in map(os.path.realpath, written):
                raise ValueError(f"{file} is read, and would be replaced by what is written: choose another output")

    def of_shard(self, number: int, count: int) -> RunPaths:
        """The files of one of several machines: `r.2-of-4.jsonl` and so on."""
        stem = self.output.name.removesuffix(".jsonl")
        return RunPaths(self.output.with_name(f"{stem}.{number}-of-{count}.jsonl"))
