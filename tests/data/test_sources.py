"""Invariants of sources:

- the same posts are read from every format (JSON, CMKP's and AimKP's files, Parquet, saved datasets, folders, memory), at
  once or as a stream, with the same ids;
- the real CMKP and Twitter-2015 files have the counts of their description;
- a row that cannot be parsed is an error with file and line, whatever the line contains;
- what `write_posts_jsonl` writes is read back unchanged, images included;
- nothing is downloaded, and downloaded data cannot name files of this machine.
"""

from __future__ import annotations

import io
import json
import logging
import time
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from dynkp.data import sources
from dynkp.data.posts import InvalidPostsError, open_image, validate_posts
from dynkp.data.sources import load_masc_posts, load_posts, write_posts_jsonl

ROWS = [
    {"id": "a", "text": "my dog", "keyphrases": ["beagles", "dogs"], "image": "a.png"},
    {"id": "b", "text": "line\u2028separator\x85 and 'quotes'", "keyphrases": ["k"], "rationale": "why\nnot"},
    {"id": "c", "text": "", "keyphrases": ["größe"], "image": "c.png"},
]
COLORS = {"a.png": "red", "c.png": "blue"}


def picture(color: str) -> bytes:
    data = io.BytesIO()
    PILImage.new("RGB", (8, 6), color).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def image_dir(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, color in COLORS.items():
        (folder / name).write_bytes(picture(color))
    return folder


def jsonl(path, rows=ROWS, end: str = "\n"):
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode())
    return path


def content(posts) -> list:
    """What a dataset or stream holds, with images decoded."""
    return [
        (
            post["id"],
            post["text"],
            post["keyphrases"],
            post["rationale"],
            [open_image(image).getpixel((0, 0)) for image in post["images"]],
        )
        for post in posts
    ]


EXPECTED = [
    ("a", "my dog", ["beagles", "dogs"], None, [(255, 0, 0)]),
    ("b", "line\u2028separator\x85 and 'quotes'", ["k"], "why\nnot", []),
    ("c", "", ["größe"], None, [(0, 0, 255)]),
]


# --- one content, many forms ---


def _written(form: str, tmp_path):
    """The posts in that form: what to give `load_posts`."""
    embedded = [
        {**row, "image": {"bytes": picture(COLORS[row["image"]]), "path": None} if "image" in row else None} for row in ROWS
    ]
    features = Features(
        {name: Value("string") for name in ("id", "text", "rationale")}
        | {"keyphrases": List(Value("string")), "image": Image()}
    )
    dataset = Dataset.from_list([{"rationale": None, **row} for row in embedded], features=features)
    folder = tmp_path / "data"
    folder.mkdir()
    match form:
        case "jsonl":
            return jsonl(folder / "x.jsonl")
        case "jsonl with Windows line ends and a byte order mark":
            path = jsonl(folder / "x.jsonl", end="\r\n\r\n")
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
            return path
        case "json array":
            (folder / "x.json").write_text(json.dumps(ROWS, indent=1))
            return str(folder / "x.json")
        case "json lines named json":
            return jsonl(folder / "x.json")
        case "folder with a split":
            jsonl(folder / "train.jsonl")
            return folder
        case "several files":
            return [jsonl(folder / "x.jsonl", ROWS[:1]), jsonl(folder / "y.jsonl", ROWS[1:])]
        case "parquet":
            dataset.to_parquet(folder / "x.parquet")
            return folder / "x.parquet"
        case "folder of parquet":
            dataset.to_parquet(folder / "train-00000.parquet")
            return folder
        case "saved dataset":
            dataset.save_to_disk(folder / "saved")
            return folder / "saved"
        case "saved splits":
            DatasetDict({"train": dataset, "other": dataset.select([0])}).save_to_disk(folder / "saved")
            return str(folder / "saved")
        case "dataset":
            return dataset
        case "stream":
            return dataset.to_iterable_dataset()
        case "rows":
            return ROWS
    raise AssertionError(form)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "form",
    [
        "jsonl",
        "jsonl with Windows line ends and a byte order mark",
        "json array",
        "json lines named json",
        "folder with a split",
        "several files",
        "parquet",
        "folder of parquet",
        "saved dataset",
        "saved splits",
        "dataset",
        "stream",
        "rows",
    ],
)
def test_every_format_gives_the_same_posts(form, streaming, tmp_path, image_dir):
    posts = load_posts(_written(form, tmp_path), image_dir=image_dir, streaming=streaming)
    assert isinstance(posts, IterableDataset if streaming or form == "stream" else Dataset)
    assert content(posts) == EXPECTED
    valid, report = validate_posts(posts, progress=False)
    assert content(valid) == EXPECTED and not report.findings


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_ids_are_the_file_and_the_row(tmp_path, streaming):
    rows = [{"text": "t", "keyphrases": ["k"]}, {"id": 7, "text": "t"}, {"text": "t"}]
    one, two = jsonl(tmp_path / "one.jsonl", rows), jsonl(tmp_path / "two.jsonl", rows[:1])
    Dataset.from_list(rows[:1]).to_parquet(tmp_path / "three.parquet")
    assert [post["id"] for post in load_posts([one, two], streaming=streaming)] == ["one-0", "7", "one-2", "two-0"]
    assert [post["id"] for post in load_posts(tmp_path / "three.parquet", streaming=streaming)] == ["three-0"]


def test_extra_columns_and_types_are_the_same_read_at_once_or_as_a_stream(tmp_path):
    rows = [{**ROWS[0], "score": 1, "tags": ["x"]}, {**ROWS[1], "score": 2.5, "mixed": {"a": [1, "b"]}}]
    path = jsonl(tmp_path / "x.jsonl", rows)
    posts, stream = load_posts(path, image_dir=tmp_path), load_posts(path, image_dir=tmp_path, streaming=True)
    assert {name: kind for name, kind in stream.features.items() if name != "load_findings"} == posts.features
    assert [{k: v for k, v in row.items() if k != "load_findings"} for row in stream] == list(posts)
    assert posts[1]["score"] == 2.5 and posts[1]["mixed"] == {"a": [1, "b"]}


def test_a_column_that_a_stream_meets_late_is_announced(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sources, "_PROBE", 2)
    path = jsonl(tmp_path / "x.jsonl", [*ROWS[:2], {**ROWS[2], "late": 1}, {**ROWS[2], "late": 2}])
    with caplog.at_level(logging.WARNING):
        posts = list(load_posts(path, streaming=True, image_dir=tmp_path))
    assert len(posts) == 4 and "late" not in posts[2]
    assert caplog.text.count("the column late occurs first in post 'c'") == 1
    assert load_posts(path)["late"] == [None, None, 1, 2]


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_stream_of_parquet_holds_a_row_group(tmp_path, form):
    """And not the whole file, which pyarrow would read ahead while the first posts are trained on."""
    file = tmp_path / "data" / "train.parquet"
    file.parent.mkdir()
    table = pa.table({"id": [f"p{n}" for n in range(2000)], "text": [f"{n:05d}" * 2000 for n in range(2000)]})
    pq.write_table(table, file, row_group_size=20, compression="none", use_dictionary=False)
    assert file.stat().st_size > 20_000_000
    stream = load_posts(file if form == "file" else tmp_path, streaming=True)
    assert stream.num_shards == 100
    before, most, read = pa.total_allocated_bytes(), 0, []
    for post in stream:
        read.append(post["id"])
        most = max(most, pa.total_allocated_bytes() - before)
        if len(read) < 50:
            time.sleep(0.01)  # a step: time enough to read everything
    assert read == [f"p{n}" for n in range(2000)]
    assert 0 < most < 2_000_000


def test_a_stream_of_parquet_numbers_posts_without_id(tmp_path):
    file = tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": [f"text {n}" for n in range(30)]}), file, row_group_size=10)
    stream = load_posts(file, streaming=True)
    assert [post["id"] for post in stream] == [f"train-{n}" for n in range(30)]


def test_a_stream_of_several_files_splits_between_workers(tmp_path):
    files = [jsonl(tmp_path / f"{n}.jsonl", [{"text": "t", "keyphrases": ["k"]}] * 10) for n in range(3)]
    stream, _ = validate_posts(load_posts(files, streaming=True))
    loader = DataLoader(stream, batch_size=4, num_workers=2, collate_fn=lambda rows: [row["id"] for row in rows])
    ids = [post_id for batch in loader for post_id in batch]
    assert sorted(ids) == sorted(f"{n}-{index}" for n in range(3) for index in range(10))


def test_conversational_rows_of_a_file_pass_through_unharmed(tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}],
            "completion": [{"role": "assistant", "content": "a"}],
            "reasoning_completion": None,
            "images": ["a.png"],
        }
    ]
    for streaming in (False, True):
        posts = load_posts(jsonl(tmp_path / "x.jsonl", rows), image_dir=tmp_path, streaming=streaming)
        [post] = validate_posts(posts, check_images=False, progress=False)[0]
        assert post == {**rows[0], "id": "x-0", "images": [{"bytes": None, "path": str(tmp_path / "a.png")}]}


# --- what cannot be read ---


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "b", ', "not valid JSON"),
        (b"{'id': 'b'}", "not valid JSON"),
        (b"42", "a row must be a JSON object"),
        (b"[]", "a row must be a JSON object"),
        (b"null", "a row must be a JSON object"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "not usable JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not usable JSON"),
    ],
    ids=str,
)
def test_bad_lines_are_named(tmp_path, line, message, streaming):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"id": "a", "text": "t"}\n\n' + line + b'\n{"id": "c", "text": "t"}\n')
    with pytest.raises(ValueError, match=rf"x\.jsonl, line 3: {message}"):
        list(load_posts(path, streaming=streaming))


def test_bad_arrays_are_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[\n{"text": "t"},\n{"text" "t"}\n]')
    with pytest.raises(ValueError, match=r"x\.json, line 3: not valid JSON"):
        load_posts(path)
    path.write_text('[{"text": "t"}, 3]')
    with pytest.raises(ValueError, match=r"x\.json, element 1: a row must be a JSON object"):
        load_posts(path)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=40))
def test_any_file_is_posts_or_an_error_that_names_it(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("any") / "x.jsonl"
    path.write_bytes(data)
    try:
        posts = load_posts(path)
    except ValueError as error:
        assert "x.jsonl" in str(error)
    else:
        assert len(posts) == 0 or b"{" in data


def test_an_empty_file_is_an_empty_dataset_with_the_right_types(tmp_path):
    (tmp_path / "x.jsonl").write_text("")
    posts = load_posts(tmp_path / "x.jsonl")
    assert len(posts) == 0 and posts.features["keyphrases"] == List(Value("string"))
    assert list(load_posts(tmp_path / "x.jsonl", streaming=True)) == []


def test_arguments_that_do_not_fit_are_named(tmp_path):
    path = jsonl(tmp_path / "x.jsonl")
    (tmp_path / "x.csv").write_text("id,text\n")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    DatasetDict({"test": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*none\.jsonl'"):
        load_posts(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="file or folder './none'"):
        load_posts("./none")
    with pytest.raises(FileNotFoundError, match="image_dir='nowhere'"):
        load_posts(path, image_dir="nowhere")
    with pytest.raises(ValueError, match="format='csv' is not known"):
        load_posts(path, format="csv")
    with pytest.raises(ValueError, match=r"'.*x\.csv': the format of a \.csv file"):
        load_posts(tmp_path / "x.csv")
    with pytest.raises(ValueError, match=r"split='train\[:5\]'"):
        load_posts(path, split="train[:5]")
    with pytest.raises(ValueError, match="split='train' is not in .*: it has test"):
        load_posts(tmp_path / "splits")
    with pytest.raises(TypeError, match="pass one of them"):
        load_posts(DatasetDict({"test": Dataset.from_list(ROWS)}))


def test_slices_of_parquet(tmp_path):
    Dataset.from_list([{"id": str(n), "text": "t"} for n in range(9)]).to_parquet(tmp_path / "x.parquet")
    assert load_posts(tmp_path / "x.parquet", split="train[2:4]")["id"] == ["2", "3"]


# --- the Hub ---


def test_hub_ids_go_to_load_dataset(monkeypatch):
    asked = {}

    def load_dataset(path, **options):
        asked.update(path=path, **options)
        rows = Dataset.from_dict({"text": ["t"], "keyphrases": [["k"]], "image": ["/etc/hostname"]})
        return rows.to_iterable_dataset() if options["streaming"] else rows

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    for streaming in (False, True):
        posts = load_posts("someone/posts", name="v2", split="test", streaming=streaming)
        assert asked == {
            "path": "someone/posts",
            "name": "v2",
            "split": "test",
            "streaming": streaming,
            "data_dir": None,
            "data_files": None,
        }, "and nothing else: no trust_remote_code"
        [post] = posts
        assert post["id"] == "posts-0" and post["images"] == []
        with pytest.raises(InvalidPostsError, match="names a local file"):
            list(validate_posts(posts, progress=False)[0])


def test_a_local_folder_of_images_with_metadata(tmp_path):
    (tmp_path / "a.png").write_bytes(picture("red"))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "t", "keyphrases": ["k"]}))
    for streaming in (False, True):
        [post] = load_posts(tmp_path, streaming=streaming)
        assert open_image(post["images"][0]).getpixel((0, 0)) == (255, 0, 0)


# --- CMKP and AimKP ---


@pytest.fixture(scope="module")
def tweets(shared):
    return [json.loads(line) for line in (shared / "data/cmkp/test.jsonl").read_text().splitlines()][:500]


@pytest.mark.parametrize("streaming", [False, True])
def test_cmkp_raw_files(tweets, tmp_path, streaming, caplog):
    lines = [f"{row['text']}<sep>{';'.join(row['keyphrases'])}<sep>https://host/media/{row['image']}" for row in tweets]
    (tmp_path / "test_src.txt").write_text("\n".join(lines) + "\n")
    for source in (tmp_path / "test_src.txt", tmp_path):
        posts = list(load_posts(source, split="test", streaming=streaming))
        assert [(post["text"], post["keyphrases"]) for post in posts] == [(r["text"], r["keyphrases"]) for r in tweets]
        assert posts[3]["id"] == "test-3" and "ocr" not in posts[0]
    with_pictures = load_posts(tmp_path / "test_src.txt", image_dir=tmp_path, streaming=streaming)
    assert next(iter(with_pictures))["images"] == [{"bytes": None, "path": str(tmp_path / tweets[0]["image"])}]

    (tmp_path / "test_ocr_final.txt").write_text("".join(row["ocr"] + "\n" for row in tweets))
    (tmp_path / "test_attribute_cleaned.txt").write_text("".join(" ".join(r["attributes"]) + "\n" for r in tweets))
    posts = list(load_posts(tmp_path, split="test", streaming=streaming))
    assert [(post["ocr"], post["attributes"]) for post in posts] == [(r["ocr"], r["attributes"]) for r in tweets]
    (tmp_path / "test_ocr_final.txt").write_text("one line\n")
    with pytest.raises(ValueError, match="same number of lines"):
        list(load_posts(tmp_path, split="test", streaming=streaming))


def test_cmkp_targets_in_a_file_of_their_own(tmp_path):
    (tmp_path / "valid_src.txt").write_text("one dog\ntwo cats\n")
    (tmp_path / "valid_trg.txt").write_text("dogs;beagles\n\n")
    posts = load_posts(tmp_path / "valid_src.txt")
    assert posts["keyphrases"] == [["dogs", "beagles"], []] and posts["images"] == [[], []]
    (tmp_path / "bad_src.txt").write_text("a<sep>k<sep>i.jpg\nno target\n")
    with pytest.raises(ValueError, match=r"bad_src\.txt, line 2: must be 'text<sep>"):
        load_posts(tmp_path / "bad_src.txt")


@pytest.mark.parametrize("question", ["What phrases should be used to tag the media?", None])
@pytest.mark.parametrize("streaming", [False, True])
def test_aimkp_conversations(tweets, tmp_path, question, streaming):
    """As AimKP's files have them, with and without their field `text`."""
    rows = []
    for index, tweet in enumerate(tweets):
        asked = f"<image>{tweet['text']}\n{question or 'What phrases should be used to tag the media?'}"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": ", ".join(tweet["keyphrases"])}]
        row = {"id": f"{index:07}", "image": tweet["image"], "conversations": turns}
        rows.append(row if question else {**row, "text": tweet["text"]})
    (tmp_path / "test.json").write_text(json.dumps(rows, indent=2))
    posts, report = validate_posts(load_posts(tmp_path / "test.json", streaming=streaming), use_images=False, progress=False)
    got = [(post["id"], post["text"], post["keyphrases"]) for post in posts]
    assert got == [(f"{index:07}", row["text"], row["keyphrases"]) for index, row in enumerate(tweets)]
    assert "conversations" not in posts.column_names and report.without_keyphrases == 0


def test_llava_datasets_in_arrow(tmp_path):
    turns = [{"from": "human", "value": "my dog\n<image>"}, {"from": "gpt", "value": "beagles,dogs, "}]
    Dataset.from_list([{"conversations": turns, "image": None}]).to_parquet(tmp_path / "x.parquet")
    [post] = load_posts(tmp_path / "x.parquet")
    assert (post["text"], post["keyphrases"]) == ("my dog", ["beagles", "dogs", ""])
    with pytest.raises(InvalidPostsError, match="empty_keyphrase"):
        validate_posts(load_posts(tmp_path / "x.parquet"), progress=False)


# --- Twitter-2015 ---


def test_aspects_of_an_image_become_its_keyphrases(shared):
    folder = shared / "data/masc_t15"
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    posts = load_masc_posts(folder / "test.jsonl", folder / "images")
    valid, report = validate_posts(posts, progress=False)
    assert (len(valid), report.without_image, report.without_rationale) == (607, 307, 0)
    assert not report.findings
    assert posts["text"] == list(dict.fromkeys(row["text"] for row in rows))
    # Every aspect is some post's keyphrase, but for case and "#".
    of_post = {post["text"]: post for post in posts}
    for row in rows:
        post = of_post[row["text"]]
        assert row["aspect"].strip("# ").casefold() in [phrase.casefold() for phrase in post["keyphrases"]]
    assert len(rows) - sum(map(len, posts["keyphrases"])) == 9, "aspects given twice"
    assert all(len(post["keyphrases"]) == len(post["labels"]) for post in posts)
    first = of_post[rows[0]["text"]]
    assert (first["id"], first["keyphrases"], first["labels"]) == ("659", ["Parks and Recreation"], ["neutral"])
    assert first["rationale"] == rows[0]["cot"]
    assert open_image(first["images"][0], post_id=first["id"]).mode == "RGB"

    assert load_posts(folder / "test.jsonl", image_dir=folder / "images")[:] == posts[:], "recognised by its columns"
    stream = load_posts(folder / "test.jsonl", image_dir=folder / "images", streaming=True).remove_columns("load_findings")
    assert list(stream) == list(posts)
    joined = load_masc_posts(folder / "test.jsonl", rationales="joined")
    chains = Counter(row["text"] for row in rows)
    assert all(
        chain.count('"Text_analysis"') <= chains[text] for text, chain in zip(joined["text"], joined["rationale"], strict=True)
    )
    several = next(text for text, count in chains.items() if count > 2)
    assert of_post[several]["rationale"] in joined[posts["text"].index(several)]["rationale"]
    assert joined["images"] == [[]] * 607


def test_masc_rows_that_share_an_image_or_lack_fields(tmp_path):
    row = {"image_id": "5", "image": "5.jpg", "text": "one", "aspect": "#A", "label": "neutral", "cot": ""}
    path = jsonl(tmp_path / "x.jsonl", [row, {**row, "text": "two"}, {**row, "aspect": " a", "cot": "c", "label": "positive"}])
    posts = load_masc_posts(path)
    assert posts["id"] == ["5", "5-2"]
    assert (posts[0]["keyphrases"], posts[0]["labels"], posts[0]["rationale"]) == (["A"], ["neutral"], "c")
    with pytest.raises(ValueError, match="x-1: a MASC row needs"):
        load_masc_posts(jsonl(path, [row, {"text": "t"}]))
    with pytest.raises(ValueError, match="rationales='all'"):
        load_masc_posts(path, rationales="all")


# --- writing ---


def test_what_is_written_is_read_back(shared, tmp_path):
    folder = shared / "data/masc_t15"
    posts = load_masc_posts(folder / "test.jsonl", folder / "images").select(range(40))
    write_posts_jsonl(posts, tmp_path / "x.jsonl", image_dir=tmp_path / "images")
    again = load_posts(tmp_path / "x.jsonl", image_dir=tmp_path / "images")
    for name in ("id", "text", "keyphrases", "rationale", "labels"):
        assert again[name] == posts[name]
    for images, written in zip(posts["images"], again["images"], strict=True):
        assert [open_image(image).tobytes() for image in images] == [open_image(image).tobytes() for image in written]
    assert sum(map(len, posts["images"])) > 5
    assert not validate_posts(again, image_dir=tmp_path / "images", progress=False)[1].findings
    # Images that lie in the folder already are referred to, not copied.
    write_posts_jsonl(again.to_iterable_dataset(), tmp_path / "y.jsonl", image_dir=tmp_path / "images")
    assert (tmp_path / "y.jsonl").read_bytes() == (tmp_path / "x.jsonl").read_bytes()


def test_images_in_memory_are_written_under_names_of_ours(tmp_path):
    posts = load_posts([{"id": "../../evil", "text": "t", "keyphrases": ["k"], "image": picture("red")}])
    with pytest.raises(ValueError, match=r"post '../../evil' has an image: pass image_dir="):
        write_posts_jsonl(posts, tmp_path / "x.jsonl")
    write_posts_jsonl(posts, tmp_path / "x.jsonl", image_dir=tmp_path / "images")
    [file] = (tmp_path / "images").iterdir()
    assert file.suffix == ".png" and sorted(path.name for path in tmp_path.iterdir()) == ["images", "x.jsonl"]
    [post] = load_posts(tmp_path / "x.jsonl", image_dir=tmp_path / "images")
    assert post["id"] == "../../evil" and open_image(post["images"][0]).getpixel((0, 0)) == (255, 0, 0)


words = st.text(max_size=20)
valid_posts = st.lists(
    st.fixed_dictionaries(
        {"text": words.map("t".__add__), "keyphrases": st.lists(words, max_size=3), "rationale": st.none() | words},
        optional={"extra": st.lists(st.integers(-9, 9), max_size=2)},
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=30, deadline=None)
@given(valid_posts)
def test_any_posts_survive_the_file(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("round")
    posts = load_posts([{"id": f"p{n}", **row} for n, row in enumerate(rows)])
    write_posts_jsonl(posts, folder / "x.jsonl")
    assert list(load_posts(folder / "x.jsonl")) == list(posts)


# --- files that are not rows ---


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_spread_over_several_lines_are_read(tmp_path, streaming):
    file = tmp_path / "x.jsonl"
    for text in (
        "\n\n" + "\n".join(json.dumps(row, indent=2) for row in ROWS) + "\n\n",
        "".join(json.dumps(row, indent=1) for row in ROWS),
        "\n" + json.dumps(ROWS, indent=2) + "\n \n",
    ):
        file.write_text(text)
        posts = load_posts(file, image_dir=tmp_path, streaming=streaming)
        assert [post["text"] for post in posts] == [row["text"] for row in ROWS]


@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_around_the_rows_is_named(tmp_path, indent):
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"version": 1, "data": ROWS}, indent=indent))
    with pytest.raises(ValueError, match=r"x\.json.*rows under 'data', not a post"):
        load_posts(file)


def test_findings_never_come_from_a_file(tmp_path):
    """A stream with that column would pass as validated already, names outside the folder included."""
    rows = [
        {"id": "1", "text": "t", "keyphrases": ["k"], "images": [{"bytes": None, "path": "../secret.jpg"}], "load_findings": []}
    ]
    (tmp_path / "images").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    jsonl(tmp_path / "x.jsonl", [{**rows[0], "load_findings": 7}])
    for file in ("x.parquet", "x.jsonl"):
        for streaming in (False, True):
            posts = load_posts(tmp_path / file, image_dir=tmp_path / "images", streaming=streaming)
            with pytest.raises(InvalidPostsError, match="path_outside"):
                list(validate_posts(posts, progress=False)[0])


def test_a_post_that_cannot_be_written_is_named_and_leaves_the_old_file(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text("old")
    good = {"id": "good", "text": "t"}
    cases = [
        ({"id": "p1", "text": "t", "score": float("nan")}, None, "post 'p1' cannot be written: its column 'score'"),
        (
            {"id": "p1", "text": "t", "image": str(tmp_path / "gone.jpg")},
            tmp_path / "images",
            "post 'p1' .* its image .*gone.jpg",
        ),
        ({"id": "p1", "text": "t", "image": str(tmp_path / "gone.jpg")}, None, "post 'p1' has an image"),
    ]
    for bad, folder, message in cases:
        with pytest.raises(ValueError, match=message):
            write_posts_jsonl(load_posts([good, bad]), file, image_dir=folder)
        assert file.read_text() == "old"
