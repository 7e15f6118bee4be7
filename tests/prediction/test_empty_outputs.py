"""An all-empty result names what most of its outputs have in common; a result with one keyphrase needs no advice."""

from __future__ import annotations

from typing import Any

import pytest

from dynkp.prediction.empty_outputs import advice_on_empty_outputs


def row(raw: str = "", tokens: int = 0, keyphrases: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"raw": raw, "output_tokens": tokens, "keyphrases": list(keyphrases)}


@pytest.mark.parametrize(
    ("rows", "advice"),
    [
        ([row("<think>a", 8), row("<think>b", 8), row("", 1)], "2 of 3 were cut off at 8 tokens, so raise --max-new-tokens"),
        ([row(" ", 1), row("", 0), row("<think>b", 8)], "2 of 3 are blank, so the model ends its answer at once"),
        ([row("<answer></answer>", 4)] * 3, "none can be read as an answer"),
    ],
)
def test_advice(rows: list[dict[str, Any]], advice: str) -> None:
    found = advice_on_empty_outputs(rows, 8, "p.jsonl")
    assert found is not None and advice in found and found.endswith("The outputs are in p.jsonl, column `raw`.")


def test_no_advice() -> None:
    assert advice_on_empty_outputs([], 8, "p.jsonl") is None
    assert advice_on_empty_outputs([row(), row("dog", 1, ("dog",))], 8, "p.jsonl") is None
