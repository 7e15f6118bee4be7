"""Invariants of candidates:

- predictions that are equal but for case, whitespace and "#" are one candidate; the order shown depends only on seed, id and
  predictions, in every process, and each candidate is first equally often;
- predictions and posts are matched by id: unknown, repeated, missing ids and several decodes are errors that name the file.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dynkp.chat.post_stream import PostStream
from dynkp.judging.candidates import draw_candidates, load_candidates, name_systems
from tests.conftest import REPOSITORY


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def posts(folder: Path, count: int = 3, **options: Any) -> PostStream:
    return PostStream(write(folder / "posts.jsonl", [{"id": f"p{n}", "text": "t"} for n in range(count)]), **options)


def predictions(folder: Path, name: str, count: int = 3, phrase: str = "") -> str:
    return write(folder / f"{name}.jsonl", [{"id": f"p{n}", "keyphrases": [phrase or name, "x"]} for n in range(count)])


def test_equal_predictions_are_one_candidate() -> None:
    predicted = {"a": ["NBA", "the  finals"], "b": ["#nba", "The Finals"], "c": ["the finals", "nba"], "d": [], "e": []}
    candidates = draw_candidates("7", predicted)
    assert sorted(candidate.systems for candidate in candidates) == [("a", "b"), ("c",), ("d", "e")]
    (shown,) = (candidate.keyphrases for candidate in candidates if "a" in candidate.systems)
    # Which spelling is shown does not depend on who comes first.
    assert shown == next(one.keyphrases for one in draw_candidates("7", {"b": predicted["b"], "a": predicted["a"]}))


def test_the_order_depends_only_on_seed_id_and_predictions() -> None:
    predicted = {name: [name] for name in "abcdef"}
    shown = [candidate.keyphrases for candidate in draw_candidates("7", predicted)]
    renamed = {f"system {name}": [name] for name in "fedcba"}
    assert [candidate.keyphrases for candidate in draw_candidates("7", renamed)] == shown
    assert shown not in ([one.keyphrases for one in draw_candidates("8", predicted)], sorted(shown))
    assert shown != [one.keyphrases for one in draw_candidates("7", predicted, seed=1)]
    code = (
        "from dynkp.judging.candidates import draw_candidates\n"
        "print([one.keyphrases for one in draw_candidates('7', {name: [name] for name in 'abcdef'})])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(shown)


def test_each_stands_first_equally_often() -> None:
    first = Counter(draw_candidates(str(n), {"a": ["a"], "b": ["b"], "c": ["c"]})[0].systems for n in range(900))
    assert min(first.values()) > 250 and len(first) == 3


def test_degenerate_predictions_are_cut() -> None:
    (one,) = draw_candidates("7", {"a": ["word " * 10_000] * 10_000})
    assert len(one.keyphrases) == 50 and max(map(len, one.keyphrases)) == 200


def test_predictions_are_matched_by_id(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"id": f"p{n}", "keyphrases": [f"a{n}"]} for n in (2, 0, 1)])
    files = {"a": str(tmp_path / "a.jsonl"), "b": predictions(tmp_path, "b")}
    found, missing = load_candidates(posts(tmp_path), files, top=1)
    assert missing == 0 and list(found) == ["p0", "p1", "p2"]
    for number in range(3):
        shown = {candidate.systems: candidate.keyphrases for candidate in found[f"p{number}"]}
        assert shown == {("a",): (f"a{number}",), ("b",): ("b",)}
    # With a limit, predictions of the posts beyond it are no strangers.
    assert list(load_candidates(posts(tmp_path, limit=2), files)[0]) == ["p0", "p1"]


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([("p0", 0), ("p1", 0)], r"other\.jsonl: .*missing ids: 'p2'; allow_missing"),
        ([("p0", 0), ("p1", 0), ("p2", 0), ("p9", 0)], r"other\.jsonl: .*unknown ids: 'p9'"),
        ([("p0", 0), ("p1", 0), ("p2", 0), ("p2", 0)], r"other\.jsonl: .*repeated ids: 'p2'"),
        ([(f"p{n}", decode) for n in range(3) for decode in range(2)], r"other\.jsonl has 2 decodes of each post"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, rows: list[tuple[str, int]], error: str) -> None:
    content = [{"id": post_id, "keyphrases": ["x"], "decode": decode} for post_id, decode in rows]
    files = {"a": predictions(tmp_path, "a"), "other": write(tmp_path / "other.jsonl", content)}
    with pytest.raises(ValueError, match=error):
        load_candidates(posts(tmp_path), files)


def test_missing_predictions_count_as_empty_if_allowed(tmp_path: Path) -> None:
    files = {"a": predictions(tmp_path, "a"), "b": predictions(tmp_path, "b", count=1)}
    found, missing = load_candidates(posts(tmp_path), files, allow_missing=True)
    assert missing == 2
    assert {candidate.systems: candidate.keyphrases for candidate in found["p2"]} == {("a",): ("a", "x"), ("b",): ()}


def test_systems_and_ids_must_be_distinct(tmp_path: Path) -> None:
    stream = posts(tmp_path)
    with pytest.raises(ValueError, match="predictions of 1 systems: give 2 to 26"):
        load_candidates(stream, {"a": predictions(tmp_path, "a")})
    twice = PostStream(write(tmp_path / "twice.jsonl", [{"id": "p0", "text": "t"}, {"id": "p0", "text": "u"}]))
    with pytest.raises(ValueError, match=r"twice\.jsonl: several posts have the same id: 'p0'"):
        load_candidates(twice, {name: predictions(tmp_path, name) for name in "ab"})
    assert name_systems(["x/a.jsonl", "y/a.jsonl"]) == {"x/a.jsonl": "x/a.jsonl", "y/a.jsonl": "y/a.jsonl"}
    assert name_systems(["a.jsonl", "b.jsonl"], ["one", "two"]) == {"one": "a.jsonl", "two": "b.jsonl"}
    with pytest.raises(ValueError, match="1 names for 2 files"):
        name_systems(["a.jsonl", "b.jsonl"], ["one"])
    with pytest.raises(ValueError, match="two systems have the same name"):
        name_systems(["a.jsonl", "b.jsonl"], ["one", "one"])
