"""Invariants of statistics and of posts that are read without training:

- their content is checked as before training: nothing that validation finds is dropped in silence;
- training keyphrases are cleaned, and CMKP's lines of several are split;
- test posts that repeat training posts are found.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynkp.cli import main
from dynkp.data.posts import InvalidPostsError, load_valid_posts
from dynkp.data.statistics import load_keyphrases, repeated_posts

GOOD = {"id": "good", "text": "my dog", "keyphrases": ["beagles"], "image": "a.jpg"}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


BAD = [
    ({"keyphrases": ["a", 5]}, "post 'p1': wrong_type: a keyphrase must be a string"),
    ({"keyphrases": "a; b"}, "post 'p1': wrong_type: keyphrases must be a list"),
    ({"keyphrases": ["a;b"]}, "post 'p1': separator_in_keyphrase"),
    ({"keyphrases": ["a", "A"]}, "post 'p1': repeated_keyphrase"),
    ({"text": 5}, "post 'p1': wrong_type: text must be a string"),
    ({"text": "\ud83d"}, "post 'p1': bad_unicode"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_content_is_checked_as_before_training(tmp_path, change, message, capsys):
    file = write(tmp_path / "posts.jsonl", GOOD, {**GOOD, "id": "p1", **change})
    with pytest.raises(InvalidPostsError, match=message):
        load_valid_posts(file)
    predictions = write(tmp_path / "p.jsonl", *({"id": name, "keyphrases": ["a"]} for name in ("good", "p1")))
    for command in (
        ["stats", "--test", file],
        ["stats", "--train", file],
        ["evaluate", "--posts", file, "--predictions", predictions],
        ["evaluate", "--posts", write(tmp_path / "g.jsonl", GOOD), "--predictions", predictions, "--train-keyphrases", file],
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there are no posts"),
        ([{"id": "1", "text": "t", "tags": ["a"]}], "none of the 1 posts has keyphrases.*not read: tags"),
        ([{"data": [GOOD]}], "rows under 'data', not a post"),
    ],
)
def test_files_that_hold_no_posts(tmp_path, rows, message, capsys):
    file = write(tmp_path / "posts.jsonl", *rows)
    with pytest.raises(ValueError, match=message):
        load_valid_posts(file)
    assert main(["stats", "--test", file]) == 2
    if "none of" not in message:  # posts without keyphrases may be converted
        assert main(["convert", "--posts", file, "--output", str(tmp_path / "out.json"), "--no-progress"]) == 2
    assert not (tmp_path / "out.json").exists()


def test_wrong_columns_are_not_converted(tmp_path, capsys):
    file = write(tmp_path / "posts.jsonl", {"id": "1", "caption": "t", "tags": ["a"]})
    assert main(["convert", "--posts", file, "--output", str(tmp_path / "out.jsonl"), "--no-progress"]) == 2
    assert "not read: caption, tags" in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()


def test_repeated_ids_and_posts_are_mentioned(tmp_path, caplog):
    train = write(tmp_path / "train.jsonl", GOOD, {**GOOD, "id": "2", "text": "other"})
    test = write(tmp_path / "test.jsonl", {**GOOD, "id": "9", "text": "my  dog"}, {**GOOD, "id": "9", "text": "new"})
    assert not main(["stats", "--train", train, "--test", test])
    assert "1 of 2 posts have the text and the images of a post of" in caplog.text and "first '9'" in caplog.text
    assert "1 ids are of several posts, first '9'" in caplog.text
    caplog.clear()
    assert not main(["convert", "--posts", test, "--output", str(tmp_path / "o.jsonl"), "--no-progress"])
    assert "1 posts have the id of an earlier post, first '9'" in caplog.text


def test_images_make_posts_differ():
    with_image = {"id": "1", "text": "a", "images": [{"bytes": None, "path": "/x/a.jpg"}]}
    assert repeated_posts([{**with_image, "images": []}], [with_image]) == []
    assert repeated_posts([{**with_image, "id": "7"}], [with_image]) == ["7"]


def test_images_are_opened_if_their_folder_is_given(tmp_path, capsys):
    file = write(tmp_path / "posts.jsonl", GOOD)
    (tmp_path / "images").mkdir()
    assert not main(["stats", "--test", file])
    assert main(["stats", "--test", file, "--image-dir", str(tmp_path / "images")]) == 2
    assert "post 'good': missing_file" in capsys.readouterr().err


def test_training_keyphrases_are_cleaned_and_split(tmp_path):
    (tmp_path / "k.txt").write_text("#NBA\nrock & roll;# dogs # ; ;\n\n#NBA\n")
    assert load_keyphrases(str(tmp_path / "k.txt")) == ["NBA", "rock & roll", "dogs"]
    (tmp_path / "k.txt").write_text("my dog<sep>beagles;dogs<sep>http://x/a.jpg\n")
    with pytest.raises(ValueError, match="X_src.txt"):
        load_keyphrases(str(tmp_path / "k.txt"))
