"""Invariants of conversion:

- CMKP's real posts are unchanged after JSON Lines -> CMKP's raw files -> Parquet -> AimKP's JSON -> JSON Lines, and the images
  of the real Twitter-2015 posts are unchanged, byte for byte, after Parquet;
- any posts are unchanged after Parquet, with every column, whatever types the columns mix;
- a value that a format cannot represent is an error that names the post, or is counted; nothing is dropped silently;
- the output is complete or absent, also when the process is killed; memory does not grow with the number of posts;
- `load_posts` and the Hub's loader read what was written.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tracemalloc

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, List, Value, load_dataset
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dynkp.data import conversion
from dynkp.data.conversion import ConversionReport, convert_posts, read_whole_posts
from dynkp.data.posts import InvalidPostsError, validate_posts
from dynkp.data.sources import load_posts

POST = {"id": "p", "text": "my dog", "keyphrases": ["beagles", "dogs"]}


def picture(color="red") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(data, "PNG")
    return data.getvalue()


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def without(row: dict, *names: str) -> dict:
    return {name: value for name, value in row.items() if name not in names}


# --- real posts ---


def test_cmkp_through_every_format(shared, tmp_path):
    source = shared / "data/cmkp/test.jsonl"
    steps = ["test_src.txt", "a.parquet", "b.json", "c.jsonl", "again_src.txt"]
    reports = []
    for before, after in zip([source, *(tmp_path / step for step in steps)], steps, strict=False):
        reports.append(convert_posts(before, tmp_path / after, images="names"))
        assert reports[-1].posts == reports[-1].images == 5372 and not reports[-1].skipped
    # The raw files hold no ids; nothing else is lost, and the others lose nothing at all.
    assert [dict(report.not_written) for report in reports] == [{"id": 5372}, {}, {}, {}, {"id": 5372}]
    given, got = rows_of(source), rows_of(tmp_path / "c.jsonl")
    assert [row["id"] for row in got[:2]] == ["test-0", "test-1"]
    assert [without(row, "id", "images", "rationale") for row in got] == [without(row, "id", "image") for row in given]
    assert [row["images"] for row in got] == [[row["image"]] for row in given]
    for end in ("_src.txt", "_ocr_final.txt", "_attribute_cleaned.txt"):
        assert (tmp_path / f"again{end}").read_bytes() == (tmp_path / f"test{end}").read_bytes()
    assert load_posts(tmp_path / "test_src.txt")["keyphrases"] == [row["keyphrases"] for row in given]


def test_images_into_parquet_and_out(shared, tmp_path):
    source = shared / "data/masc_t15"
    report = convert_posts(source / "test.jsonl", tmp_path / "t.parquet", image_dir=source / "images")
    assert (report.posts, report.images) == (607, 300)
    convert_posts(tmp_path / "t.parquet", tmp_path / "t.jsonl", output_image_dir=tmp_path / "images")
    convert_posts(tmp_path / "t.jsonl", tmp_path / "u.parquet", image_dir=tmp_path / "images")
    whole = [dict(post) for post in load_posts(source / "test.jsonl", image_dir=source / "images")]
    for path, images in (("t.parquet", None), ("t.jsonl", tmp_path / "images"), ("u.parquet", None)):
        posts = load_posts(tmp_path / path, image_dir=images)
        assert [without(dict(post), "images") for post in posts] == [without(post, "images") for post in whole]
        assert sum(map(len, posts["images"])) == 300
    for name in os.listdir(source / "images"):
        assert (tmp_path / "images" / name).read_bytes() == (source / "images" / name).read_bytes()
    assert not validate_posts(load_posts(tmp_path / "t.parquet"), progress=False)[1].findings


# --- any posts ---

words = st.text(max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
any_posts = st.lists(
    st.fixed_dictionaries(
        {"text": words, "keyphrases": st.lists(words, max_size=3), "rationale": st.none() | words.map("r".__add__)},
        optional={"one": values, "two": values, "images": st.lists(st.sampled_from(["a.png", "b/c.png"]), max_size=2)},
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=50, deadline=None)
@given(any_posts)
def test_any_columns_survive_parquet(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("round")
    conversion_size, conversion._POSTS_TYPED_AT_ONCE = (
        conversion._POSTS_TYPED_AT_ONCE,
        2,
    )  # so that types of several batches meet
    try:
        convert_posts([{"id": str(n), **row} for n, row in enumerate(rows)], folder / "x.jsonl")
        convert_posts(folder / "x.jsonl", folder / "x.parquet", images="names")
        convert_posts(folder / "x.parquet", folder / "y.jsonl")
    finally:
        conversion._POSTS_TYPED_AT_ONCE = conversion_size
    first, last = rows_of(folder / "x.jsonl"), rows_of(folder / "y.jsonl")
    for row, again in zip(first, last, strict=True):
        for name in again.keys() - row.keys():  # Parquet has every column in every row
            assert again.pop(name) is None
        assert again == row


def test_every_json_type_in_a_column(tmp_path):
    kinds = [1, 2.5, "3", '{"a": 1}', True, None, [1, "x"], {"a": {}}, {}, [], [[]], "null", "größe\u2028"]
    rows = [{**POST, "id": str(n), "x": kind, "tags": [], "n": n if n % 2 else None} for n, kind in enumerate(kinds)]
    convert_posts(rows, tmp_path / "x.parquet")
    convert_posts(tmp_path / "x.parquet", tmp_path / "x.jsonl")
    got = rows_of(tmp_path / "x.jsonl")
    assert [row["x"] for row in got] == kinds and [row["tags"] for row in got] == [[]] * len(kinds)
    assert [type(row["x"]) for row in got] == [type(kind) for kind in kinds]
    assert [row["n"] for row in got] == [n if n % 2 else None for n in range(len(kinds))]


def test_prompt_completion_rows_pass_through(tmp_path):
    turns = {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}]}
    row = {"id": "c", "images": ["a.png"], **turns, "completion": [{"role": "assistant", "content": "a"}]}
    convert_posts([row], tmp_path / "x.jsonl")
    convert_posts(tmp_path / "x.jsonl", tmp_path / "x.parquet", images="names")
    convert_posts(tmp_path / "x.parquet", tmp_path / "y.jsonl")
    assert rows_of(tmp_path / "x.jsonl") == rows_of(tmp_path / "y.jsonl") == [row]
    for name in ("x.json", "x_src.txt"):
        with pytest.raises(InvalidPostsError, match="post 'c' cannot be written .* prompt-completion row"):
            convert_posts([row], tmp_path / name)


# --- the forms ---


def test_parquet_is_what_the_hub_s_viewer_reads(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    rows = [{**POST, "id": str(n), "image": "a.png" if n else None} for n in range(250)]
    convert_posts(rows, tmp_path / "hub/data/test", output_format="parquet", image_dir=tmp_path, shard_bytes=10_000)
    shards = sorted((tmp_path / "hub/data/test").iterdir())
    assert [shard.name for shard in shards] == ["00000.parquet", "00001.parquet"]
    file = pq.ParquetFile(shards[0])
    assert file.metadata.row_group(0).num_rows == 100 and file.metadata.row_group(0).column(0).has_column_index
    loaded = load_dataset(str(tmp_path / "hub"), split="test", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 250 and loaded.features["images"] == List(ImageFeature())
    assert loaded[1]["images"][0].getpixel((0, 0)) == (255, 0, 0) and loaded[0]["images"] == []
    posts = load_posts(tmp_path / "hub", split="test")
    assert posts["id"] == [row["id"] for row in rows]
    assert posts[1]["images"] == [{"bytes": picture(), "path": "a.png"}]
    with pytest.raises(ValueError, match="exists: a folder of shards is created"):
        convert_posts(rows, tmp_path / "hub/data/test", output_format="parquet", image_dir=tmp_path)


def test_aimkp_s_rows(tmp_path):
    rows = [
        {**POST, "images": ["a.png"], "ocr": "x"},
        {"id": "q", "text": " my dog\n", "keyphrases": ["k"], "rationale": "why"},
        {"id": "r", "text": "", "keyphrases": ["k"], "images": ["a.png", "b.png"]},
    ]
    convert_posts(rows, tmp_path / "x.json")
    question = "What phrases should be used to tag the media?"
    assert json.loads((tmp_path / "x.json").read_text()) == [
        {
            "id": "p",
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": f"<image>my dog\n{question}"},
                {"from": "gpt", "value": "beagles, dogs"},
            ],
            "ocr": "x",
        },
        {
            "id": "q",
            "conversations": [{"from": "human", "value": f" my dog\n\n{question}"}, {"from": "gpt", "value": "k"}],
            "text": " my dog\n",
            "rationale": "why",
        },
        {
            "id": "r",
            "image": ["a.png", "b.png"],
            "conversations": [{"from": "human", "value": f"<image><image>{question}"}, {"from": "gpt", "value": "k"}],
        },
    ]
    convert_posts(rows, tmp_path / "x.jsonl", output_format="llava")
    assert rows_of(tmp_path / "x.jsonl") == json.loads((tmp_path / "x.json").read_text())
    for name in ("x.json", "x.jsonl"):
        again = [post for post, _ in read_whole_posts(tmp_path / name)]
        assert [(post["text"], post["keyphrases"], post["rationale"]) for post in again] == [
            (row["text"], row["keyphrases"], row.get("rationale")) for row in rows
        ]


def test_cmkp_s_raw_files(tmp_path):
    line = "my dog<sep>beagles;dogs<sep>http://pictures.invalid/a/1.jpg\nno picture<sep>k\n"
    (tmp_path / "a_src.txt").write_text(line)
    convert_posts(tmp_path / "a_src.txt", tmp_path / "b.jsonl")
    assert rows_of(tmp_path / "b.jsonl")[0]["images"] == ["1.jpg"]
    report = convert_posts(tmp_path / "b.jsonl", tmp_path / "a2_src.txt")
    assert (tmp_path / "a2_src.txt").read_text() == line  # the whole address, not only its last part
    assert sorted(os.listdir(tmp_path)) == ["a2_src.txt", "a_src.txt", "b.jsonl"] and report.not_written == {"id": 2}

    rows = [
        {"id": "c-0", "text": " blanks ", "keyphrases": ["k"], "rationale": "why"},
        {"id": "x", "text": "t", "keyphrases": [], "attributes": ["a", "b"], "ocr": None, "score": 1},
    ]
    (tmp_path / "c_ocr_final.txt").write_text("of an older file")
    report = convert_posts(rows, tmp_path / "c_src.txt")
    assert report.not_written == {"rationale": 1, "whitespace around the text": 1, "id": 1, "score": 1}
    assert (tmp_path / "c_attribute_cleaned.txt").read_text() == "\na b\n" and not (tmp_path / "c_ocr_final.txt").exists()
    posts = load_posts(tmp_path / "c_src.txt")
    assert posts["keyphrases"] == [["k"], []] and posts["attributes"] == [[], ["a", "b"]]
    (tmp_path / "c_trg.txt").touch()
    with pytest.raises(ValueError, match="c_trg.txt would be read with the new"):
        convert_posts(rows, tmp_path / "c_src.txt")


@pytest.mark.parametrize(
    ("post", "form", "message"),
    [
        ({"keyphrases": ["a, b"]}, "x.json", "'a, b' cannot be part of a list separated by ','"),
        ({"keyphrases": ["#"]}, "x.json", "'' cannot be part"),
        ({"text": "an <image> tag"}, "x.json", "stands for an image"),
        ({"keyphrases": ["a;b"]}, "x_src.txt", "'a;b' cannot be part"),
        ({"text": "two\nlines"}, "x_src.txt", "no line breaks"),
        ({"text": "a<sep>b"}, "x_src.txt", "no '<sep>'"),
        ({"ocr": "two\nlines"}, "x_src.txt", "no line breaks"),
        ({"ocr": 7}, "x_src.txt", "text only"),
        ({"attributes": ["a b"]}, "x_src.txt", "words without whitespace"),
        ({"images": ["a", "b"]}, "x_src.txt", "it has 2 images"),
        ({"image": "a/b.png"}, "x_src.txt", "has a folder"),
        ({"image": picture()}, "x.jsonl", "embedded image: pass a folder to write it to as output_image_dir="),
        ({"image": "no.png"}, "x.parquet", "pass its folder as image_dir="),
        ({"image": b"no picture"}, "x.parquet", "not an image"),
        ({"text": 3}, "x.jsonl", "wrong_type: text must be a string"),
        ({"text": "\ud83d"}, "x.jsonl", "bad_unicode"),
        ({"when": datetime.date(2026, 11, 21)}, "x.jsonl", "column 'when' has .* drop="),
        ({"score": float("nan")}, "x.jsonl", "column 'score' has nan"),
    ],
)
def test_what_a_form_cannot_hold(tmp_path, post, form, message):
    bad, good = {**POST, "id": "bad", **post}, {**POST, "id": "good"}
    with pytest.raises(InvalidPostsError, match=f"post 'bad' cannot be written as .*{message}") as caught:
        convert_posts([good, bad], tmp_path / form)
    assert caught.value.report.findings[0].index == 1 and os.listdir(tmp_path) == []
    report = convert_posts([good, bad, good], tmp_path / form, on_invalid="skip")
    assert (report.posts, [(item.id, item.index) for item in report.skipped]) == (2, [("bad", 1)])
    assert re.search(message, report.skipped[0].message) and "1 posts skipped, first 'bad'" in report.summary()
    assert len(list(read_whole_posts(tmp_path / form))) == 2


def test_images_that_cannot_be_embedded(tmp_path):
    (tmp_path / "half.png").write_bytes(picture()[:40])
    for name, message in (
        ("none.png", "there is no file"),
        ("half.png", "is not an image"),
        ("../a.png", "is outside the image"),
    ):
        with pytest.raises(InvalidPostsError, match=f"post 'p' .*{message}"):
            convert_posts([{**POST, "image": name}], tmp_path / "x.parquet", image_dir=tmp_path)
    assert os.listdir(tmp_path) == ["half.png"]


def test_names_of_images(tmp_path):
    """Names are kept, folders in them too; one that is taken by another image, or leads out, gives way to a checksum."""
    red, blue = picture("red"), picture("blue")
    images = [("a/x.png", red), ("a/x.png", red), ("a/x.png", blue), ("../x.png", blue), (None, red)]
    rows = [{**POST, "id": str(n), "image": {"bytes": data, "path": name}} for n, (name, data) in enumerate(images)]
    convert_posts(rows, tmp_path / "x.jsonl", output_image_dir=tmp_path / "out")
    names = [row["images"][0] for row in rows_of(tmp_path / "x.jsonl")]
    assert names[:2] == ["a/x.png"] * 2
    assert names[2] == names[3] == hashlib.sha256(blue).hexdigest()[:24] + ".png"
    assert names[4] == hashlib.sha256(red).hexdigest()[:24] + ".png"
    posts = load_posts(tmp_path / "x.jsonl", image_dir=tmp_path / "out")
    assert [open(post["images"][0]["path"], "rb").read() for post in posts] == [data for _, data in images]
    # Files are copied likewise.
    convert_posts(tmp_path / "x.jsonl", tmp_path / "y.jsonl", image_dir=tmp_path / "out", output_image_dir=tmp_path / "copy")
    assert (tmp_path / "y.jsonl").read_bytes() == (tmp_path / "x.jsonl").read_bytes()
    assert (tmp_path / "copy/a/x.png").read_bytes() == red
    # A name in an absolute path is made relative to the folder.
    convert_posts([{**POST, "image": str(tmp_path / "out/a/x.png")}], tmp_path / "z.parquet", image_dir=tmp_path / "out")
    assert load_posts(tmp_path / "z.parquet")[0]["images"] == [{"bytes": red, "path": "a/x.png"}]


def test_columns_are_joined_and_dropped(tmp_path):
    rows = [{**POST, "ocr": "bark!", "attributes": ["dog", "grass"]}, {**POST, "id": "q", "ocr": " ", "attributes": None}]
    report = convert_posts(rows, tmp_path / "x.jsonl", join=["ocr", "attributes"], drop=["attributes"])
    first, second = rows_of(tmp_path / "x.jsonl")
    assert (first["text"], first["ocr"]) == ("my dog\nocr: bark!\nattributes: dog grass", "bark!")
    assert second["text"] == "my dog" and "attributes" not in first
    assert report.not_written == {"attributes": 1}
    convert_posts(rows, tmp_path / "y.jsonl", join=["ocr"], join_format="{value} | {text}")
    assert rows_of(tmp_path / "y.jsonl")[0]["text"] == "bark! | my dog"
    report = convert_posts([{**POST, "image": "a.png"}], tmp_path / "z.parquet", images="drop")
    assert report.not_written == {"images": 1} and report.images == 0


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("x", {}, "/x' is unknown"),
        ("x.jsonl", {"output_format": "csv"}, "output_format='csv' is not known"),
        ("x.txt", {"output_format": "cmkp"}, "name it X_src.txt"),
        ("x.jsonl", {"images": "all"}, "images='all' is not known"),
        ("x.jsonl", {"images": "embed"}, "only Parquet files contain images"),
        ("x.parquet", {"output_image_dir": "d"}, "nothing is written there for parquet"),
        ("x.jsonl", {"on_invalid": "drop"}, "on_invalid='drop' is not known"),
        ("x.jsonl", {"join_format": "{text}"}, "must have {text} and {value}"),
        ("x.jsonl", {"join_format": "{text} {value} {0}"}, "must have {text} and {value}"),
        ("x.jsonl", {"join": ["orc"]}, "join='orc': no post has this column; the columns are id, images, keyphrases"),
        ("x.jsonl", {"drop": ["text"]}, "drop=text: every post has these"),
    ],
)
def test_options_that_do_not_fit(tmp_path, output, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        convert_posts([POST], tmp_path / output, **options)
    assert os.listdir(tmp_path) == []


def test_sources_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="there are no posts"):
        convert_posts([], tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="no post could be written: 0 posts"):
        convert_posts([{**POST, "text": 3}], tmp_path / "x.jsonl", on_invalid="skip")
    with pytest.raises(ValueError, match="read twice: pass a list"):
        convert_posts(iter([POST]), tmp_path / "x.parquet")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        convert_posts([POST], tmp_path / "x.jsonl", image_dir=tmp_path / "none")
    (tmp_path / "x.jsonl").write_text(json.dumps(POST))
    with pytest.raises(ValueError, match="x.jsonl' would replace the posts that are read"):
        convert_posts(tmp_path / "x.jsonl", f"{tmp_path}/./x.jsonl")
    (tmp_path / "x.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="there is no file"):
        convert_posts(tmp_path / "none.jsonl", tmp_path / "x.jsonl")
    assert os.listdir(tmp_path) == []


def test_datasets_in_memory_and_conversations_beside_keyphrases(tmp_path):
    features = Features({"text": Value("string"), "keyphrases": List(Value("string")), "image": ImageFeature()})
    row = {"text": "t", "keyphrases": ["k"], "image": {"bytes": picture(), "path": None}}
    data = Dataset.from_list([row], features=features)
    for source in (data, data.to_iterable_dataset()):
        convert_posts(source, tmp_path / "x.parquet")
        assert load_posts(tmp_path / "x.parquet")[0]["images"] == [{"bytes": picture(), "path": None}]
    row = {**POST, "images": [], "rationale": None, "conversations": [{"from": "human", "value": "something else"}]}
    convert_posts([row], tmp_path / "x.jsonl")
    assert rows_of(tmp_path / "x.jsonl") == [row]


def test_summary():
    report = ConversionReport(posts=1200, images=3)
    report.not_written.update(id=2, rationale=1500)
    assert report.summary() == "1,200 posts with 3 images. Not written, by number of posts: rationale 1,500, id 2"


# --- whole or absent; flat ---


@pytest.mark.parametrize("form", ["x.jsonl", "x.parquet", "x.json", "x_src.txt", "shards"])
def test_a_killed_conversion_leaves_no_output(tmp_path, form):
    """SIGKILL in the middle: the last post's text takes the process with it."""
    options = {"output_format": "parquet"} if form == "shards" else {}
    code = f"""
import json, os, signal
from dynkp.data import conversion, sources
rows = [{{"id": str(n), "text": "t", "keyphrases": ["k"], "ocr": "o"}} for n in range(1500)]
if {form!r} != "shards":
    conversion.convert_posts(rows[:7], {str(tmp_path / form)!r})
class Deadly(list):
    passes = 0
    def __iter__(self):
        type(self).passes += 1
        for n, row in enumerate(super().__iter__()):
            if n == 1400 and self.passes == {2 if form in ("x.parquet", "shards") else 1}:
                os.kill(os.getpid(), signal.SIGKILL)
            yield row
conversion.convert_posts(Deadly(rows), {str(tmp_path / form)!r}, **{options!r})
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == -signal.SIGKILL
    assert any(name.startswith(".") for name in os.listdir(tmp_path))  # it was on its way
    if form == "shards":
        assert not (tmp_path / form).exists()
    else:
        assert len(list(read_whole_posts(tmp_path / form))) == 7  # the older file, untouched
    rows = [{"id": str(n), "text": "t", "keyphrases": ["k"], "ocr": "o"} for n in range(1500)]
    convert_posts(rows, tmp_path / form, **options)
    source = sorted((tmp_path / form).iterdir()) if form == "shards" else tmp_path / form
    assert len(list(read_whole_posts(source))) == 1500
    assert not any(name.startswith(".") for name in os.listdir(tmp_path))


@pytest.mark.parametrize("form", ["y.jsonl", "y.parquet"])
def test_memory_does_not_grow_with_the_posts(tmp_path, form):
    def peak(count: int) -> int:
        with open(tmp_path / "x.jsonl", "w") as file:
            for n in range(count):
                noise = base64.b85encode(hashlib.sha512(str(n).encode()).digest()).decode() * 20
                file.write(json.dumps({"id": str(n), "text": noise, "keyphrases": ["k"], "extra": [n]}) + "\n")
        tracemalloc.start()
        convert_posts(tmp_path / "x.jsonl", tmp_path / form)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    few, many = peak(1000), peak(6000)
    assert many < 1.5 * few + (2 << 20), (few, many)  # 6,000 posts are 10 MB of text
