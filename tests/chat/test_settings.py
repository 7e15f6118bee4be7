"""Invariants of what runs have in common: the body of requests has what is given and nothing else; a limit of cost needs the
price; files are named after the output, those of a shard after its number.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dynkp.chat.prices import Price
from dynkp.chat.settings import RunPaths, RunSettings


def test_the_body_of_requests() -> None:
    assert RunSettings("p", "o", "m").request_settings() == {"model": "m", "max_tokens": 1024}
    given = RunSettings("p", "o", "m", temperature=0.0, top_p=0.5, seed=0, max_tokens=7, extra_body={"top_k": 3})
    assert given.request_settings() == {
        "model": "m",
        "max_tokens": 7,
        "temperature": 0.0,
        "top_p": 0.5,
        "seed": 0,
        "top_k": 3,
    }
    renamed = RunSettings("p", "o", "m", extra_body={"max_completion_tokens": 5})
    assert renamed.request_settings() == {"model": "m", "max_completion_tokens": 5}


def test_a_limit_needs_the_price(tmp_path: Path) -> None:
    (tmp_path / "prices.json").write_text('{"m": {"input": 1, "output": 2}}')
    prices = str(tmp_path / "prices.json")
    assert RunSettings("p", "o", "other").price_table() == {}
    assert RunSettings("p", "o", "m", prices=prices, max_cost=1.0).price_table() == {"m": Price(1.0, 2.0)}
    for wrong in (RunSettings("p", "o", "m", max_cost=1.0), RunSettings("p", "o", "other", prices=prices, max_cost=1.0)):
        with pytest.raises(ValueError, match=r"max_cost=1\.0 needs the price of model"):
            wrong.price_table()
    with pytest.raises(ValueError, match="has no price of model 'other'"):
        RunSettings("p", "o", "other", prices=prices).price_table()


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="max_side=15 must be at least 16"):
        RunSettings("p", "o", "m", max_side=15)
    for name in ("messages", "model", "n", "stream"):
        with pytest.raises(ValueError, match=f"extra_body must not have {name}"):
            RunSettings("p", "o", "m", extra_body={name: 1})
    with pytest.raises(ValueError, match="base_url is missing"):
        RunSettings("p", "o", "m").check_server()


def test_files_are_named_after_the_output() -> None:
    paths = RunPaths("out/r.jsonl").of_shard(2, 4)
    names = [path.name for path in (paths.output, paths.errors, paths.report, paths.table, paths.preview, paths.journal)]
    assert names == [
        f"r.2-of-4.{end}" for end in ("jsonl", "errors.jsonl", "report.json", "report.md", "preview.html", "journal")
    ]
    assert {path.parent for path in (paths.output, paths.journal)} == {Path("out")}


@pytest.mark.parametrize("name", ["r.jsonl", "r.errors.jsonl", "r.report.json", "link"])
def test_what_is_read_is_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "r.errors.jsonl")
    paths = RunPaths(tmp_path / "r.jsonl")
    paths.check_inputs(str(tmp_path / "posts.jsonl"))
    with pytest.raises(ValueError, match=f"{name} is read, and would be replaced"):
        paths.check_inputs(str(tmp_path / "posts.jsonl"), str(tmp_path / name))
