"""Invariants of prices: a table in JSON or YAML is read; what is no price is refused by its model's name; costs add up."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynkp.chat.prices import Price, load_prices


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.json", '{"gpt": {"input": 2, "output": 8.5}, "free": {"input": 0, "output": 0}}'),
        ("p.yaml", "gpt: {input: 2, output: 8.5}\nfree: {input: 0, output: 0}\n"),
    ],
)
def test_a_table_is_read(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert load_prices(tmp_path / name) == {"gpt": Price(2.0, 8.5), "free": Price(0.0, 0.0)}


@pytest.mark.parametrize("entry", ["3", '{"input": 1}', '{"input": -1, "output": 1}', '{"input": "1", "output": 1}', "null"])
def test_what_is_no_price_is_refused(tmp_path: Path, entry: str) -> None:
    (tmp_path / "p.json").write_text(f'{{"gpt": {entry}}}')
    with pytest.raises(ValueError, match="the price of 'gpt' must have"):
        load_prices(tmp_path / "p.json")


@pytest.mark.parametrize("text", ["[1]", "{", "a: ]"])
def test_what_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ValueError, match="table of prices"):
        load_prices(tmp_path / "p.yaml")


def test_costs() -> None:
    assert Price(2.0, 8.0).cost(1_000_000, 0) == 2.0
    assert Price(2.0, 8.0).cost(500_000, 250_000) == 3.0
    assert Price(2.0, 8.0).cost(0, 0) == 0.0
