"""Invariants of `dynkp convert`: the command line reaches every option of `convert_posts`; what was not written is printed;
errors name the post, the exit status says so, and there is no output then.
"""

from __future__ import annotations

import json
import os

import pytest
from PIL import Image

from dynkp import cli
from dynkp.data.sentiment_posts import load_sentiment_posts
from dynkp.data.sources import load_posts

ROWS = [
    {"id": "a", "text": "my dog", "keyphrases": ["dogs"], "ocr": "bark", "image": "O_4242.jpg", "rationale": "why"},
    {"id": "b", "text": "two\nlines", "keyphrases": ["k"], "ocr": ""},
]


def convert(tmp_path, output: str, *more: str) -> int:
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    posts = str(tmp_path / "posts.jsonl")
    return cli.main(["convert", "--posts", posts, "--output", str(tmp_path / output), "--no-progress", *more])


def test_options_and_summary(tmp_path, capsys):
    more = ["--join", "ocr", "--join-format", "{text} [{value}]", "--drop", "ocr", "--on-invalid", "skip"]
    report = tmp_path / "skipped.jsonl"
    assert convert(tmp_path, "x_src.txt", *more, "--report-file", str(report)) == 0
    assert (tmp_path / "x_src.txt").read_text() == "my dog [bark]<sep>dogs<sep>O_4242.jpg\n"
    assert capsys.readouterr().out == (
        f"{tmp_path / 'x_src.txt'}: 1 posts with 1 images; 1 posts skipped, first 'b'. "
        "Not written, by number of posts: id 1, ocr 1, rationale 1\n"
    )
    [finding] = map(json.loads, report.read_text().splitlines())
    assert (finding["id"], finding["index"], finding["code"]) == ("b", 1, "not_convertible")


def test_pictures(shared, tmp_path, capsys):
    images = shared / "data/masc_t15/images"
    source = ["convert", "--posts", str(shared / "data/masc_t15/test.jsonl"), "--no-progress"]
    more = ["--to", "parquet", "--image-dir", str(images), "--shard-size", "2"]
    assert cli.main([*source, "--output", str(tmp_path / "hub/data/test"), *more]) == 0
    shards = os.listdir(tmp_path / "hub/data/test")
    assert len(shards) > 1 and sum(len(post["images"]) for post in load_posts(tmp_path / "hub", split="test")) == 300
    out = ["convert", "--posts", str(tmp_path / "hub"), "--split", "test", "--output", str(tmp_path / "t.json")]
    assert cli.main([*out, "--output-image-dir", str(tmp_path / "images")]) == 0
    assert sorted(os.listdir(tmp_path / "images")) == sorted(os.listdir(images))
    assert cli.main([*out, "--images", "drop"]) == 0
    assert "607 posts with 0 images. Not written, by number of posts: images 300" in capsys.readouterr().out


def test_errors(tmp_path, capsys):
    assert convert(tmp_path, "x_src.txt") == 2
    assert "dynkp convert: error: post 'b' cannot be written as cmkp: 'two\\nlines'" in capsys.readouterr().err
    assert convert(tmp_path, "x.parquet") == 2
    assert (
        "post 'a' cannot be written as parquet: image 'O_4242.jpg' is a file name: pass its folder" in capsys.readouterr().err
    )
    assert convert(tmp_path, "x.jsonl", "--split", "a", "--join", "orc") == 2
    assert "join='orc'" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["posts.jsonl"]
    with pytest.raises(SystemExit, match="2"):
        convert(tmp_path, "x", "--to", "parquet", "--shard-size", "0")
    assert "give megabytes" in capsys.readouterr().err


# Posts with a sentiment


def test_sentiment(tmp_path, capsys):
    folder = tmp_path / "MVSA"
    (folder / "data").mkdir(parents=True)
    (folder / "labelResultAll.txt").write_text("ID\ttext,image\n1\tpositive,neutral\n2\tpositive,negative\n")
    for name in ("1", "2"):
        (folder / "data" / f"{name}.txt").write_text(f"text {name}")
        Image.new("RGB", (20, 20)).save(folder / "data" / f"{name}.jpg")
    output = tmp_path / "posts.jsonl"
    more = ["convert", "--task", "msc", "--posts", str(folder), "--output", str(output), "--no-progress"]
    assert cli.main(more) == 2
    assert "post '2' cannot be written as jsonl: contradictory_labels" in capsys.readouterr().err
    listed = tmp_path / "left_out.jsonl"
    assert cli.main([*more, "--on-invalid", "skip", "--report-file", str(listed)]) == 0
    assert "1 posts with 1 images; 1 posts skipped, first '2'" in capsys.readouterr().out
    assert json.loads(listed.read_text())["id"] == "2"
    converted, _ = load_sentiment_posts(output, task="msc", image_dir=folder / "data", progress=False)
    direct, _ = load_sentiment_posts(folder, task="msc", on_invalid="skip", progress=False)
    assert converted.to_list() == direct.to_list() and direct["label"] == ["positive"]
    assert cli.main([*more, "--on-invalid", "skip", "--to", "parquet", "--output", str(tmp_path / "posts.parquet")]) == 0
    (post,), _ = load_sentiment_posts(tmp_path / "posts.parquet", task="msc", progress=False)
    assert post["images"][0]["bytes"] and post["text"] == "text 1"
    capsys.readouterr()
    # Rows without ids get the file's; a file is not replaced by itself.
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "go cubs", "aspect": "cubs", "label": "Positive", "cot": "A cheer."}) + "\n")
    assert cli.main(["convert", "--task", "masc", "--posts", str(rows), "--output", str(rows)]) == 2
    assert "would replace the posts that are read" in capsys.readouterr().err
    assert cli.main(["convert", "--task", "masc", "--posts", str(rows), "--output", str(output), "--no-progress"]) == 0
    row = json.loads(output.read_text())
    assert (row["id"], row["label"], row["rationale"]) == ("rows-0", "positive", "A cheer.")
