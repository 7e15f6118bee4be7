"""Invariants of `dynkp stats`: its figures are those the papers print of CMKP's test set and the ones counted by hand on
three posts; keyphrases are the same whatever their case and blanks; a split that lacks something has a dash, not a zero.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynkp import cli
from dynkp.data.statistics import load_keyphrases, split_statistics, statistics_table


def stats(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    assert cli.main(["stats", *arguments, "--json", str(tmp_path / "stats.json")]) == 0
    return json.loads((tmp_path / "stats.json").read_text())


def test_cmkp(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = shared / "data" / "cmkp"
    arguments = ["--train", str(data / "train_keyphrases.txt"), "--test", str(data / "test.jsonl")]
    found = stats(tmp_path, *arguments, "--markdown", str(tmp_path / "new" / "t.md"))
    test = found["test"]
    assert found["train"] == {"unique_keyphrases": 4261}
    assert (test["posts"], test["keyphrases"], test["unique_keyphrases"]) == (5372, 7117, 2534)
    assert round(test["keyphrases_per_post"], 4) == 1.3248
    assert test["posts_by_keyphrases"] == {"1": 4034, "2": 1001, "3": 267, "4": 70}
    assert (test["unique_in_train"], round(100 * test["unique_in_train_share"], 2)) == (2466, 97.32)
    assert (test["unseen_keyphrases"], test["posts_with_unseen"], test["posts_all_unseen"]) == (68, 74, 54)
    words = test["text_words"]
    assert (round(words["mean"], 2), words["median"], words["min"], words["max"]) == (27.05, 23, 2, 87)
    assert test["image_share"] == 1 and test["rationale_share"] == 0 and test["rationale_words"] is None
    table = capsys.readouterr().out
    assert "97.32%" in table and (tmp_path / "new" / "t.md").read_text() == table


def test_counted_by_hand() -> None:
    posts = [
        {"keyphrases": ["Dogs", "storm  hour"], "text": "my dog  sleeps", "images": ["a.png", "b.png"], "rationale": "A dog."},
        {"keyphrases": ["dogs"], "text": "", "images": [], "rationale": None},
        {"keyphrases": ["#NBA"], "text": "hour of a storm"},
    ]
    table = split_statistics(posts, train_keyphrases=["nba", "Storm hour"])
    assert (table["posts"], table["keyphrases"], table["unique_keyphrases"]) == (3, 4, 3)
    assert table["present_share"] == 0.25
    assert table["text_words"] == {"mean": 3.5, "median": 3.5, "min": 3, "max": 4}
    assert table["rationale_words"]["mean"] == 2 and table["rationale_share"] == pytest.approx(1 / 3)
    assert (table["image_share"], table["images_per_post"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert (table["unique_in_train"], table["unseen_keyphrases"]) == (2, 1)
    assert (table["posts_with_unseen"], table["posts_all_unseen"]) == (2, 1)


def test_no_posts_and_posts_without_keyphrases() -> None:
    empty = split_statistics([])
    assert empty["posts"] == 0 and empty["keyphrases_per_post"] is None and "unique_in_train" not in empty
    bare = split_statistics([{"keyphrases": [], "text": None}], train_keyphrases=["x"])
    assert bare["posts_by_keyphrases"] == {"0": 1} and bare["unique_in_train_share"] is None and bare["posts_all_unseen"] == 0
    rows = statistics_table({"a": empty, "b": {"unique_keyphrases": 7}})
    assert ["posts", "0", "-"] in rows and ["different keyphrases", "0", "7"] in rows


def test_several_sets(tmp_path: Path, shared: Path) -> None:
    data = shared / "data"
    files = [data / "cmkp" / "train_tiny.jsonl", data / "masc_t15" / "test.jsonl", data / "cmkp" / "test.jsonl"]
    found = stats(tmp_path, "--train", str(files[0]), "--test", str(files[1]))
    assert found["train"]["posts"] == 200 and "unique_in_train" not in found["train"]
    assert found["test"]["present_share"] > 0.99 and 0 < found["test"]["image_share"] < 1
    assert found["test"]["rationale_share"] == 1 and found["test"]["rationale_words"]["mean"] > 100
    assert set(stats(tmp_path, "--test", *map(str, files[1:]))) == set(map(str, files[1:]))  # both are called test


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"id": "1"', "line 1: not valid JSON"), ("\xff", "not UTF-8")],
)
def test_files_that_cannot_be_read(content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "posts.jsonl").write_bytes(content.encode("latin-1"))
    assert cli.main(["stats", "--test", str(tmp_path / "posts.jsonl")]) == 2
    assert message in capsys.readouterr().err


def test_something_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["stats"])
    assert "--train, --test or both" in capsys.readouterr().err


def test_keyphrase_files_are_normalised_as_posts_are(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("#nba\n\uff03cafe\u0301\ncaf\u00e9\n#\n", encoding="utf-8")
    assert load_keyphrases(str(tmp_path / "train.txt")) == ["nba", "caf\u00e9"]
