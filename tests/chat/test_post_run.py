"""Invariants of the runs that commands make: they ask with the settings' server and limits, and write what it cost; settings
that requests depend on make posts be looked at again; one run at a time has an output, until it is closed; what is wrong is
refused before the journal is opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dynkp.chat.post_run import PostRun
from dynkp.chat.run import Outcome
from dynkp.chat.settings import RunPaths, RunSettings
from tests.support.chat_server import serve
from tests.support.conversations import once


class OneRequest(PostRun[RunSettings]):
    """Asks once about each post."""

    label = "Once"

    def __init__(self, settings: RunSettings, *inputs: str, asked: Mapping[str, Any] | None = None):
        super().__init__(settings, RunPaths(settings.output), *inputs)
        self._open_journal()
        self.run = self._request_run(once, asked or {})

    def ask(self) -> Outcome:
        self.outcome = self._ask(self.run)
        self._write_report({"posts": len(self.posts)}, settings={"model": self.settings.model})
        return self.outcome


def settings(folder: Path, url: str = "", **options: Any) -> RunSettings:
    posts = folder / "posts.jsonl"
    posts.write_text("".join(json.dumps({"id": f"p{n}", "text": f"post {n}"}) + "\n" for n in range(6)))
    return RunSettings(str(posts), str(folder / "r.jsonl"), "m", url, progress=False, **options)


def test_a_run_asks_and_writes_what_it_cost(tmp_path: Path) -> None:
    (tmp_path / "prices.json").write_text('{"m": {"input": 10000, "output": 20000}}')
    with serve() as (url, server):
        given = settings(tmp_path, url, prices=str(tmp_path / "prices.json"), max_cost=7.0, concurrency=1)
        with OneRequest(given) as run:
            outcome = run.ask()
    count = len(server.bodies)
    assert 1 <= count <= 3  # a request costs 2
    assert (outcome.stopped, outcome.settled, outcome.requests, outcome.cost) == ("max_cost", count, count, 2.0 * count)
    report = json.loads((tmp_path / "r.report.json").read_text())
    assert report == {"posts": 6, "cost": 2.0 * count, "requests": count, "settings": {"model": "m"}}


@pytest.mark.parametrize(
    ("options", "asked", "settled"), [({}, {}, 6), ({}, {"template": 2}, 0), ({"allow_image_urls": True}, {}, 0)]
)
def test_posts_are_settled_for_the_settings_that_were_asked(
    tmp_path: Path, options: dict[str, Any], asked: dict[str, Any], settled: int
) -> None:
    with serve() as (url, server), OneRequest(settings(tmp_path, url)) as run:
        run.ask()
    with OneRequest(settings(tmp_path, concurrency=7, **options), asked=asked) as run:
        known = [run.journal.settled(post.fingerprint(run.run.settings)) for post in run.posts]
        assert sum(key is not None for key in known) == settled
        assert run.run.replay().settled == 6  # by the answers, which are the same
    assert len(server.bodies) == 6


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with OneRequest(settings(tmp_path)), pytest.raises(BlockingIOError, match="another run is writing"):
        OneRequest(settings(tmp_path))
    with OneRequest(settings(tmp_path)):
        pass


@pytest.mark.parametrize(
    ("options", "inputs", "error"),
    [
        ({"max_cost": 1.0}, [], "needs the price"),
        ({"image_dir": "missing"}, [], "is not a folder"),
        ({}, ["r.report.json"], "is read, and would be replaced"),
    ],
)
def test_what_is_wrong_is_refused_first(tmp_path: Path, options: dict[str, Any], inputs: list[str], error: str) -> None:
    with pytest.raises((ValueError, OSError), match=error):
        OneRequest(settings(tmp_path, **options), *(str(tmp_path / name) for name in inputs))
    assert not (tmp_path / "r.journal").exists()
