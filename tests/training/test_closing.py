"""The closing table fits 80 columns: long names are cut, or rows become columns, and no figure is lost."""

from __future__ import annotations

from typing import Any

import pytest

from dynkp.training.closing import WIDTH, aligned, closing_table, wrapped


def system(words: float | None = 3.25, reasoning: float | None = 1.0) -> dict[str, Any]:
    scores = {"posts": 1234, "f1@1": 1.0, "p@1": 0.5}
    return {
        "convention": "aimkp",
        "posts": 1234,
        "subsets": {"all": scores, "seen": {**scores, "posts": 1000}, "unseen": {**scores, "f1@1": None, "posts": 234}},
        "empty_share": 0.1234,
        **({} if words is None else {"output_words": words}),
        **({} if reasoning is None else {"reasoning_share": reasoning}),
    }


def test_the_table() -> None:
    long = "most frequent keyphrase (the longest keyphrase that anybody ever tagged a post with)"
    text = closing_table({"dynamic": system(512.0), long: system(None, None)})
    lines = text.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines[0].split() == ["system", "F1@1", "seen", "unseen", "P@1", "reason", "words", "empty"]
    assert lines[1].split() == ["dynamic", "100.00", "100.00", "-", "50.00", "100.00", "512.0", "12.34"]
    assert lines[2].startswith("most frequent keyphrase (") and "…" in lines[2]
    assert lines[2].split()[-3:] == ["-", "-", "12.34"]
    legend = " ".join(text.split("\n\n")[1].split())
    assert legend.startswith("In percent, convention aimkp. F1@1 and P@1 over 1,234 posts, 1,000 with seen and 234 with unseen")


def test_without_training_keyphrases_there_is_neither_seen_nor_unseen() -> None:
    one = system()
    del one["subsets"]["seen"], one["subsets"]["unseen"]
    text = closing_table({"direct": one})
    assert text.split("\n")[0].split() == ["system", "F1@1", "P@1", "reason", "words", "empty"] and "seen" not in text


def test_a_wide_table_is_turned() -> None:
    heads = ["system", *(f"a measure {n}" for n in range(8))]
    text = aligned([heads, ["mulcot_rd, image only", *(f"{n}.00" for n in range(8))]])
    lines = text.splitlines()
    assert max(map(len, lines)) <= WIDTH and len(lines) == 9
    assert lines[0].split() == ["system", "mulcot_rd,", "image", "only"] and lines[8].split() == ["a", "measure", "7", "7.00"]


@pytest.mark.parametrize("width", [1, 30, 79, 80])
def test_narrow_tables_keep_their_names(width: int) -> None:
    name = "n" * max(1, width - 8)
    assert aligned([["s", "F1@1"], [name, "9.00"]]).splitlines()[1].startswith(name)


def test_paths_stay_whole() -> None:
    path = "/a/very-long/path" * 8
    assert path in wrapped(f"Written: predictions.jsonl in {path} and more words behind it that are wrapped")
