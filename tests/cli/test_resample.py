"""Invariants of `dynkp resample`: with CMKP's validation posts standing in for training, the files hold the posts of the
design notes and the report says so; every row keeps its columns and its id; the report is there only with both files.
"""

from __future__ import annotations

import json
import os
import re

import pytest

from dynkp import cli
from dynkp.data.conversion import convert_posts


def run(out, train, test, target="0.4492", *more) -> int:
    files = ["--train", str(train), "--test", str(test), "--out-dir", str(out)]
    return cli.main(["resample", *files, "--target-overlap", target, *more])


def read(path) -> dict[str, dict]:
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


def test_cmkp(shared, tmp_path, capsys):
    data = shared / "data/cmkp"
    assert run(tmp_path / "v2", data / "valid.jsonl", data / "test.jsonl") == 0
    assert sorted(os.listdir(tmp_path / "v2")) == ["report.json", "report.md", "test.jsonl", "train.jsonl"]
    report = json.loads((tmp_path / "v2/report.json").read_text())
    assert (report["exclusive_keyphrases"], report["moved_posts"]) == (770, 1087)
    assert report["overlap_after_moving"] == 1687 / 3304 and 0.448 < report["overlap"] <= 0.4492
    given, train, test = read(data / "valid.jsonl"), read(tmp_path / "v2/train.jsonl"), read(tmp_path / "v2/test.jsonl")
    assert len(train) == 4283 and len(test) == 6459 - report["dropped_posts"] and not train.keys() & test.keys()
    assert train.keys() <= given.keys() and len(given.keys() - train.keys()) == 1087
    assert [post_id for post_id in given if post_id in train] == list(train)  # in order
    for row in train.values():
        source = given[row["id"]]
        assert row["images"] == [source.pop("image")] and {name: row[name] for name in source} == source
    resampled = report["resampled"]["test"]
    assert (resampled["posts"], resampled["unique_in_train_share"]) == (len(test), report["overlap"])
    table = (tmp_path / "v2/report.md").read_text()
    assert table == capsys.readouterr().out
    assert [cell.strip() for cell in table.splitlines()[0].strip("| ").split("|")] == [
        "Datasets",
        "# Train Posts",
        "# Test Posts",
        "# KP / Post",
        "Train KP ∩ Test KP",
    ]
    assert ["after moving", "4,283", "6,459", "1.33", "51.06%"] in [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()
    ]
    first = (tmp_path / "v2/test.jsonl").read_bytes()
    assert run(tmp_path / "v2", data / "valid.jsonl", data / "test.jsonl", "0.4492", "--seed", "1") == 0
    assert (tmp_path / "v2/test.jsonl").read_bytes() != first
    assert run(tmp_path / "v2", data / "valid.jsonl", data / "test.jsonl") == 0
    assert (tmp_path / "v2/test.jsonl").read_bytes() == first


def test_pictures_inside_the_source_become_files(shared, tmp_path):
    images = shared / "data/masc_t15/images"
    convert_posts(shared / "data/masc_t15/test.jsonl", tmp_path / "all.jsonl")
    rows = [{**row, "keyphrases": ["x"]} for row in read(tmp_path / "all.jsonl").values()][:60]
    for name, part in (("train", rows[:40]), ("test", rows[40:])):
        convert_posts(part, tmp_path / f"{name}.parquet", image_dir=images)
    sources = tmp_path / "train.parquet", tmp_path / "test.parquet"
    assert run(tmp_path / "out", *sources, "1") == 2  # nowhere to put them
    assert not list((tmp_path / "out").iterdir())
    assert run(tmp_path / "out", *sources, "1", "--output-image-dir", str(tmp_path / "images")) == 0
    written = read(tmp_path / "out/train.jsonl") | read(tmp_path / "out/test.jsonl")
    names = [name for row in written.values() for name in row["images"]]
    assert len(written) == 60 and len(names) > 10
    assert all((tmp_path / "images" / name).read_bytes() == (images / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("train", "test", "target", "message"),
    [
        ({"keyphrases": ["b"]}, {"keyphrases": ["a"]}, "1", "no training post would stay"),
        ({"keyphrases": ["a"]}, {"keyphrases": ["a"]}, "0", "leaves no test post"),
        ({"keyphrases": "a"}, {"keyphrases": ["a"]}, "1", "post 'x': wrong_type: keyphrases must be a list"),
        ({"id": "y", "keyphrases": ["a"]}, {"keyphrases": ["a"]}, "1", "post 'y' .* has the id of another post"),
        ({"prompt": [], "completion": []}, {"keyphrases": ["a"]}, "1", "post 'x' has no column 'keyphrases'"),
    ],
)
def test_errors(tmp_path, capsys, train, test, target, message):
    for name, row in (("train", {"id": "x", **train}), ("test", {"id": "y", **test})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": "t", **row}))
    assert run(tmp_path / "out", tmp_path / "train.jsonl", tmp_path / "test.jsonl", target) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_sources_are_not_replaced(tmp_path, capsys):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"id": name, "text": "t", "keyphrases": ["a"]}))
    before = (tmp_path / "test.jsonl").read_bytes()
    assert run(tmp_path, tmp_path / "train.jsonl", tmp_path / "test.jsonl", "1") == 2
    assert "test.jsonl would be replaced, and its posts are read" in capsys.readouterr().err
    assert (tmp_path / "test.jsonl").read_bytes() == before and len(os.listdir(tmp_path)) == 2


def test_a_target_that_is_no_share(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, "a", "b", "44.92")
    assert "44.92 is not a share: give a number from 0 to 1" in capsys.readouterr().err
