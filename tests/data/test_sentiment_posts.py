"""Invariants of posts with a sentiment:

- TomBERT's files, MVSA's folders and rows with response chains get the same columns, with the right text, aspect, label and
  image;
- the rows of Twitter-2015, written as TomBERT's file, are read back unchanged;
- MVSA's label is the majority's per modality, and of the two the one that is not neutral;
- a line that cannot be parsed is an error with file and line; every row that cannot be used is a finding with its id, counted,
  and dropped only if this is asked for; findings about labels do not prevent prediction.
"""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from dynkp.data.posts import InvalidPostsError
from dynkp.data.sentiment_posts import load_sentiment_posts, read_sentiment_posts
from dynkp.data.sources import load_posts, write_posts_jsonl
from tests.support.posts import picture

COLUMNS = {"id", "images", "text", "rationale", "aspect", "label"}
HEADER = "index\t#1 Label\t#2 ImageID\t#3 String\t#3 String\n"


def load(source: Any, **options: Any) -> Any:
    return load_sentiment_posts(source, **{"progress": False, **options})


def codes(source: Any, **options: Any) -> list[tuple[str, str]]:
    with pytest.raises(InvalidPostsError) as error:
        load(source, **options)
    return [(finding.id, finding.code) for finding in error.value.report.findings]


@pytest.fixture(scope="module")
def chains(shared: Path) -> Path:
    return shared / "data/masc_t15"


def test_rows_with_chains(chains: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dynkp"):
        posts, report = load(chains / "test.jsonl", image_dir=chains / "images")
    raw = [json.loads(line) for line in (chains / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert set(posts.column_names) == COLUMNS | {"image_id"}
    assert (report.total, report.dropped, report.findings) == (937, 0, [])
    for post, row in zip(posts, raw, strict=True):
        assert (post["id"], post["text"], post["aspect"]) == (str(row["id"]), row["text"], row["aspect"])
        assert (post["label"], post["rationale"]) == (row["label"], row["cot"])
        assert [Path(image["path"]).name for image in post["images"]] == [row["image"]] * bool(row["image"])
    assert "18 of 937 rationales predict another label than their post's" in caplog.text


def test_tombert(chains: Path, tmp_path: Path) -> None:
    raw = [json.loads(line) for line in (chains / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    raw = [row for row in raw if row["image"] and row["text"].count(row["aspect"]) == 1 and "\t" not in row["text"]]
    assert len(raw) > 300
    numbers = {"negative": 0, "neutral": 1, "positive": 2}
    with (tmp_path / "test.tsv").open("w", encoding="utf-8") as file:
        file.write(HEADER)
        for index, row in enumerate(raw, start=1):
            text = row["text"].replace(row["aspect"], "$T$")
            file.write(f"{index}\t{numbers[row['label']]}\t{row['image']}\t{text}\t{row['aspect']}\n")
        file.write("\n")
    posts, _ = load(tmp_path / "test.tsv", image_dir=chains / "images")
    assert set(posts.column_names) == COLUMNS | {"image_id"}
    assert [post["id"] for post in posts] == [f"test-{index}" for index in range(1, len(raw) + 1)]
    for post, row in zip(posts, raw, strict=True):
        assert (post["text"], post["aspect"], post["label"]) == (row["text"], row["aspect"], row["label"])
        assert Path(post["images"][0]["path"]).name == row["image"]
        assert post["rationale"] is None


def test_what_is_wrong_with_tombert_rows(tmp_path: Path) -> None:
    file = tmp_path / "train.tsv"
    file.write_text(HEADER + '1\t3\ta.jpg\ta $T$\tb\n2\t1\ta.jpg\tno place\tb\n3\t1\ta.jpg\t$T$ "quoted\t \n4\t2\t\t$T$\tb\n')
    expected = [("train-1", "unknown_label"), ("train-2", "no_place_of_aspect"), ("train-3", "no_aspect")]
    assert codes(file, use_images=False) == expected
    posts, report = load(file, use_images=False, on_invalid="skip", report_file=tmp_path / "bad.jsonl")
    assert [post["id"] for post in posts] == ["train-4"] and posts[0]["images"] == []
    assert report.dropped == 3 == len((tmp_path / "bad.jsonl").read_text().splitlines())
    # To be predicted, a post needs no label: but what it has must be one.
    assert codes(file, need_labels=False, use_images=False) == expected
    file.write_text(HEADER + "1\t1\ta.jpg\ta $T$ b\n")
    with pytest.raises(ValueError, match=r"train\.tsv, line 2: must have 5 columns .* got 4"):
        load(file)
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        load(tmp_path / "none.tsv")


# (text, image) votes -> the label, or the finding; the table of Xu and Mao (2017).
MVSA = {
    "positive,positive": "positive",
    "positive,neutral": "positive",
    "neutral,positive": "positive",
    "neutral,negative": "negative",
    "negative,neutral": "negative",
    "negative,negative": "negative",
    "neutral,neutral": "neutral",
    "positive,negative": "contradictory_labels",
    "negative,positive": "contradictory_labels",
    "positive,neutral\tpositive,negative\tnegative,neutral": "positive",
    "positive,neutral\tneutral,neutral\tnegative,neutral": "no_majority",
    "positive,neutral\tpositive,positive\tpositive,negative": "no_majority",
    "Positive,negative\tpositive,negative\tneutral,neutral": "contradictory_labels",
}


@pytest.fixture
def mvsa(tmp_path: Path) -> Path:
    folder = tmp_path / "MVSA"
    (folder / "data").mkdir(parents=True)
    lines = ["ID\ttext,image", *(f"{number}\t{votes}" for number, votes in enumerate(MVSA, start=1)), ""]
    (folder / "labelResultAll.txt").write_text("\r\n".join(lines))
    for number in range(1, len(MVSA) + 1):
        (folder / "data" / f"{number}.txt").write_bytes(
            f"Caf\u00e9 {number} #sun \n".encode("cp1252" if number == 2 else "utf-8")
        )
        picture(number).save(folder / "data" / f"{number}.jpg")
    return folder


def test_mvsa(mvsa: Path, caplog: pytest.LogCaptureFixture) -> None:
    wrong = [(str(number), label) for number, label in enumerate(MVSA.values(), start=1) if "_" in label]
    assert codes(mvsa, task="msc") == wrong
    posts, report = load(mvsa, task="msc", on_invalid="skip")
    assert set(posts.column_names) == COLUMNS | {"annotations"}
    valid = {str(number): label for number, label in enumerate(MVSA.values(), start=1) if "_" not in label}
    assert {post["id"]: post["label"] for post in posts} == valid
    assert report.counts() == {"contradictory_labels": 3, "no_majority": 2} and report.dropped == 5
    assert [post["text"] for post in posts] == [f"Café {post_id} #sun" for post_id in valid]
    assert all(Path(post["images"][0]["path"]).parent.name == "data" for post in posts)
    assert "1 texts are not UTF-8" in caplog.text
    assert posts[0]["annotations"] == ["positive,positive"] and set(posts["aspect"]) == {None}
    # The file of labels stands for its folder.
    again, _ = load(mvsa / "labelResultAll.txt", task="msc", on_invalid="skip")
    assert again.to_list() == posts.to_list()
    # All can be predicted.
    assert len(load(mvsa, task="msc", need_labels=False)[0]) == len(MVSA)


def test_what_is_wrong_with_mvsa(mvsa: Path) -> None:
    labels = mvsa / "labelResultAll.txt"
    labels.write_text("ID\ttext,image\n1\tpositive,happy\n77\tneutral,neutral\n")
    assert codes(mvsa, task="msc") == [
        ("1", "unknown_vote"),
        ("77", "no_text_file"),
        ("77", "missing_file"),
    ]
    for line in ("1", "1 positive", "1 a,b,c"):
        labels.write_text(f"ID\ttext,image\n{line}\n")
        with pytest.raises(ValueError, match=r"labelResultAll\.txt, line 2: must be an id and 'text,image' labels"):
            load(mvsa, task="msc")


def test_rows_in_memory_and_written_ones(tmp_path: Path, chains: Path) -> None:
    posts, _ = load(chains / "test.jsonl", image_dir=chains / "images")
    posts = posts.select(range(40))
    write_posts_jsonl(posts, tmp_path / "posts.jsonl", image_dir=tmp_path / "images")
    again, _ = load(tmp_path / "posts.jsonl", image_dir=tmp_path / "images")
    for one, other in itertools.chain(zip(posts, again, strict=True), zip(posts, load(posts)[0], strict=True)):
        for name in ("id", "text", "aspect", "label", "rationale"):
            assert one[name] == other[name]
        assert len(one["images"]) == len(other["images"])
    posts.to_parquet(tmp_path / "posts.parquet")
    assert load(tmp_path / "posts.parquet")[0]["label"] == posts["label"]
    posts.save_to_disk(tmp_path / "saved")
    assert load(tmp_path / "saved")[0]["aspect"] == posts["aspect"]
    assert load_posts(posts).column_names == ["id", "images", "text", "keyphrases", "rationale", "aspect", "label", "image_id"]


def test_what_is_wrong_with_rows() -> None:
    rows = [
        {"id": "a", "text": "t", "aspect": "t", "label": " Positive "},
        {"id": "b", "text": "t", "aspect": None, "label": "neutral"},
        {"id": "c", "text": "t", "aspect": "t", "label": None},
        {"id": "d", "text": "t", "aspect": "t", "label": 2},
        {"id": "a", "text": "t", "aspect": "t", "label": "negative"},
    ]
    expected = [("b", "no_aspect"), ("c", "no_label"), ("d", "unknown_label"), ("a", "repeated_id")]
    assert codes(rows) == expected
    assert codes(rows, need_labels=False) == [finding for finding in expected if finding[1] != "no_label"]
    assert codes(rows, task="msc") == expected[1:]
    with pytest.raises(InvalidPostsError, match=r"post 'c': no_label: the label is None, and must be one of positive") as error:
        load(rows)
    assert "'keyphrases'" not in str(error.value)
    posts, _ = load(rows, on_invalid="skip")
    assert posts["label"] == ["positive"]
    # Unchecked, every row is there.
    assert len(read_sentiment_posts(rows)) == len(rows)
    with pytest.raises(ValueError, match=r"format='csv' is not known: use one of auto, tombert, mvsa, rows"):
        load(rows, format="csv")
    with pytest.raises(TypeError):
        load([rows[0], 3])
