"""Invariants of the row format and of validation:

- rows of every kind get the same typed columns, so that datasets can be joined; normalising twice changes nothing;
- nothing is lost silently: every row of arbitrary input is kept, or has a finding with its id;
- each kind of invalid post is found under its code, in datasets and in streams, and dropped only if this is asked for;
- a post that names an image, in whatever column or type, is never used without it in silence;
- TRL's prompt-completion rows keep exactly their columns;
- streams stay streams, are read one post at a time, may be read twice, and can be split between workers;
- a hundred thousand posts take seconds.
"""

from __future__ import annotations

import io
import json
import logging
import time
import unicodedata

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, List, Value, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from dynkp.data.posts import Finding, InvalidPostsError, PostReport, normalise_posts, open_image, validate_posts
from dynkp.data.rows import CONTENT, IDENTITY, LOAD_FINDINGS, fold_keyphrase, without_images
from dynkp.mmkp_f1.answers import normalise_phrase
from tests.support.images import png_claiming
from tests.support.spellings import SPELLINGS

GOOD = {"id": "good", "text": "my dog", "keyphrases": ["beagles", "dogs"]}


def picture(color: str = "red") -> bytes:
    data = io.BytesIO()
    PILImage.new("RGB", (20, 10), color).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def image_dir(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture())
    (folder / "broken.png").write_bytes(picture()[:40])
    (folder / "text.jpg").write_text("not a picture")
    (tmp_path / "secret.png").write_bytes(picture())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    return folder


def codes(rows, **options) -> list[str]:
    """Codes found in the rows, which must be the same for a list, a dataset and a stream."""
    options = {"progress": False, "on_invalid": "skip", **options}
    posts, report = validate_posts([GOOD, *rows], **options)
    assert posts["id"][:1] == ["good"] and LOAD_FINDINGS not in posts.column_names

    stream, streamed = validate_posts(IterableDataset.from_generator(lambda: iter([GOOD, *rows])), **options)
    assert [post["id"] for post in stream] == posts["id"][:]
    assert streamed == report
    assert report.dropped == len(rows) + 1 - len(posts)
    return [finding.code for finding in report.findings]


# --- the row format ---


def test_rows_get_typed_columns_even_when_empty():
    posts = normalise_posts([{"text": "a"}, {"text": "b", "rationale": None, "images": [], "note": None}])
    assert posts.features == Features(
        {
            "id": Value("string"),
            "images": List(Image(decode=False)),
            "text": Value("string"),
            "keyphrases": List(Value("string")),
            "rationale": Value("string"),
            "note": Value("string"),
        }
    )
    full = normalise_posts([{**GOOD, "rationale": "why", "image": picture(), "note": "n"}])
    joined = concatenate_datasets([posts, full])
    assert joined["rationale"] == [None, None, "why"]
    assert open_image(joined[2]["images"][0]).getpixel((0, 0)) == (255, 0, 0)


def test_ids_are_strings_and_made_where_missing():
    rows = [{"id": 7}, {"id": None}, {}, {"id": ""}, {"id": np.int64(8)}, {"id": "x"}]
    assert normalise_posts([{**row, "text": "t"} for row in rows], stem="train")["id"] == [
        "7",
        "train-1",
        "train-2",
        "train-3",
        "8",
        "x",
    ]
    columns = Dataset.from_dict({"id": [7, None], "text": ["a", "b"]})
    assert normalise_posts(columns, stem="s")["id"] == ["7", "s-1"]
    stream = normalise_posts(columns.to_iterable_dataset(), stem="s")
    assert [row["id"] for row in stream] == ["7", "s-1"]


def test_columns_of_other_names_are_named():
    with pytest.raises(InvalidPostsError, match="from the column 'keyphrases'; not read: caption, tags"):
        validate_posts([{"id": "1", "caption": "my dog", "tags": ["beagles"]}], progress=False)
    with pytest.raises(InvalidPostsError) as error:  # some have them: the column is right
        validate_posts([{"text": "a", "keyphrases": []}, {"text": "b", "keyphrases": ["c"], "tags": []}], progress=False)
    assert "not read" not in str(error.value)


def test_images_in_every_format(image_dir):
    forms = [
        {"image": "a.png"},
        {"image": str(image_dir / "a.png")},
        {"images": ["a.png", "a.png"]},
        {"image": picture()},
        {"images": [PILImage.new("RGB", (20, 10), "red")]},
        {"image": {"bytes": picture(), "path": None}},
        {"image": {"bytes": None, "path": "a.png"}},
        {"image": None},
        {"image": ""},
        {"images": []},
        {"images": None},
        {},
    ]
    posts = normalise_posts([{"text": "t", **form} for form in forms], image_dir=image_dir)
    assert [len(images) for images in posts["images"]] == [1, 1, 2, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    pixels = {open_image(image).getpixel((3, 3)) for images in posts["images"] for image in images}
    assert pixels == {(255, 0, 0)}
    assert posts[0]["images"] == [{"bytes": None, "path": str(image_dir / "a.png")}], "kept as a path, not decoded"


def test_images_in_memory_are_kept_upright():
    image = PILImage.new("RGB", (20, 10))
    image.getexif()[0x0112] = 6
    [stored] = normalise_posts([{"text": "t", "image": image}])[0]["images"]
    assert open_image(stored).size == (10, 20)


@pytest.mark.parametrize("stream", [False, True])
def test_image_columns_of_datasets_are_not_decoded(stream, monkeypatch):
    columns = {"text": ["a", "b"], "image": [{"bytes": picture(), "path": "x.png"}, None]}
    posts = Dataset.from_dict(columns, features=Features({"text": Value("string"), "image": Image()}))
    columns = {"text": ["a"], "images": [[{"bytes": picture(), "path": "x.png"}] * 2]}
    many = Dataset.from_dict(columns, features=Features({"text": Value("string"), "images": List(Image())}))
    monkeypatch.setattr(Image, "decode_example", lambda *_, **__: pytest.fail("a picture was decoded"))
    for dataset, expected in ((posts, [1, 0]), (many, [2])):
        normal = normalise_posts(dataset.to_iterable_dataset() if stream else dataset)
        assert [len(row["images"]) for row in normal] == expected
        assert next(iter(normal))["images"][0] == {"bytes": picture(), "path": "x.png"}


def test_relative_names_without_a_folder_are_announced_once(caplog):
    rows = [{"text": "t", "image": f"{n}.jpg"} for n in range(3)] + [{"text": "u"}]
    with caplog.at_level(logging.WARNING):
        assert normalise_posts(rows)["images"] == [[]] * 4
    assert [record.getMessage()[:49] for record in caplog.records] == ["3 relative image names in 4 posts, but there is n"]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert normalise_posts(Dataset.from_list(rows))["images"] == [[]] * 4
    assert caplog.text.count("3 relative image names in 4 posts") == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert [row["images"] for row in normalise_posts(IterableDataset.from_generator(lambda: iter(rows)))] == [[]] * 4
    assert caplog.text.count("'0.jpg'") == 1 and len(caplog.records) == 1


def relative(name: str = "a.png"):
    return {"bytes": None, "path": name}


@pytest.mark.parametrize("kind", [Image(), Image(decode=False)])
@pytest.mark.parametrize("stream", [False, True])
def test_names_in_typed_columns_are_opened_as_datasets_does(kind, stream, image_dir, monkeypatch):
    """`datasets` reads a relative name in the working folder."""
    monkeypatch.chdir(image_dir)
    rows = [{**GOOD, "images": [relative()]}]
    posts = Dataset.from_list(rows, features=Features({**_TEXT_TYPES, "images": List(kind)}))
    single = posts.map(lambda post: {"image": relative()}, remove_columns="images", features=_with(image=kind))
    for data in (posts, single):
        [post] = validate_posts(data.to_iterable_dataset() if stream else data, progress=False)[0]
        assert post["images"] == [relative(str(image_dir / "a.png"))]
    # With a folder, they are relative to it.
    monkeypatch.chdir("/")
    [post] = normalise_posts(posts.to_iterable_dataset() if stream else posts, image_dir=image_dir)
    assert post["images"] == [relative(str(image_dir / "a.png"))]
    if not stream:
        with pytest.raises(InvalidPostsError, match="post 'good': missing_file: there is no file '/a.png'"):
            validate_posts(posts, progress=False)


_TEXT_TYPES = {"id": Value("string"), "text": Value("string"), "keyphrases": List(Value("string"))}


def _with(**types) -> Features:
    return Features({**_TEXT_TYPES, **types})


@pytest.mark.parametrize(
    ("columns", "code"),
    [
        ({"images": ["a.png"]}, "no_image_dir"),
        ({"image": {"path": "a.png"}}, "no_image_dir"),
        ({"images": '["a.png"]'}, "wrong_type"),
        ({"images": '{"path": "a.png"}'}, "wrong_type"),
        ({"images": ["iVBORw0KGgo" * 500]}, "unreadable_image"),
        ({"images": "data:image/png;base64,iVBORw0KGgo"}, "external_url"),
        ({"images": [{"url": "https://example.com/a.png"}]}, "external_url"),
        ({"image": {"url": "https://example.com/a.png"}}, "external_url"),
        ({"images": [{"file": "a.png"}]}, "wrong_type"),
        ({"image_path": "a.png"}, "unread_image"),
        ({"img": "a.png"}, "unread_image"),
        ({"Image": "a.png"}, "unread_image"),
        ({"image_urls": ["https://example.com/a.png"]}, "unread_image"),
        ({"picture": b"..."}, "unread_image"),
        ({"images": [], "photo": "a.png"}, "unread_image"),
        ({"file_name": "a.png"}, "unread_image"),
    ],
)
def test_a_post_that_names_an_image_is_never_used_without_it_in_silence(columns, code):
    row = {**GOOD, "id": "p1", **columns}
    assert codes([row]) == [code]
    for posts in ([row], Dataset.from_list([row]), normalise_posts(Dataset.from_list([row])), normalise_posts([row])):
        with pytest.raises(InvalidPostsError, match=f"post 'p1': {code}"):
            validate_posts(posts, progress=False)
    if code != "wrong_type":  # that text alone is used may be said
        posts, report = validate_posts([row], use_images=False, progress=False)
        assert not report.findings and len(posts) == 1
        # ... and forgets nothing: a later reader that uses images finds the same.
        with pytest.raises(InvalidPostsError, match=f"post 'p1': {code}"):
            validate_posts(posts, progress=False)
        assert not validate_posts(without_images(posts), progress=False)[1].findings


def test_columns_that_only_resemble_images_are_no_finding(image_dir):
    row = {**GOOD, "image_id": "7", "image_address": "http://x/a.png", "ocr": "img", "image_path": None, "imagery": "a.png"}
    assert not validate_posts([row, {**row, "id": "2", "image": "a.png", "img": "a.png"}], image_dir=image_dir, progress=False)[
        1
    ].findings


def test_a_keyphrase_of_a_megabyte_takes_no_time():
    start = time.process_time()
    for phrase in ("# " * 500_000, "#" * 1_000_000, "# " * 250_000 + "a" + " #" * 250_000):
        normalise_phrase(phrase)
        fold_keyphrase(phrase)
    assert time.process_time() - start < 1


def test_what_is_carried_along_stays_as_it_was():
    extra = {"label": [1, 2], "nested": {"a": [1.5]}, "mixed": 1, "flag": True}
    posts = normalise_posts([{**GOOD, **extra}, {**GOOD, "mixed": "one"}, {**GOOD, "unicode": [{"\ud83d": "\ud83d"}]}])
    assert posts[2]["unicode"] == [{"?": "?"}] and [item["code"] for item in posts[2][LOAD_FINDINGS]] == ["bad_unicode"] * 2
    assert {name: posts[0][name] for name in extra} == extra
    assert posts[1]["mixed"] == "one" and posts[0]["unicode"] is None
    columns = Dataset.from_dict(
        {"text": ["t"], "score": [0.5]}, features=Features({"text": Value("string"), "score": Value("float32")})
    )
    assert normalise_posts(columns).features["score"] == Value("float32")


def test_already_normal_posts_are_not_copied(image_dir, tmp_path, monkeypatch):
    rows = [{**GOOD, "image": "a.png"}, {"text": "u", "keyphrases": ["k"]}]
    posts = normalise_posts(rows, image_dir=image_dir)
    odd = posts.map(lambda row: {"keyphrases": [" #k "]})
    with monkeypatch.context() as patched:
        patched.setattr(Dataset, "map", lambda *_, **__: pytest.fail("the posts were copied"))
        assert list(normalise_posts(posts)) == list(normalise_posts(posts, image_dir=image_dir)) == list(posts)
    # A column that only looks normal is read, and so are images of another folder.
    assert normalise_posts(odd)["keyphrases"] == [["k"], ["k"]]
    (tmp_path / "other").mkdir()
    with pytest.raises(InvalidPostsError, match="path_outside"):
        validate_posts(posts, image_dir=tmp_path / "other", progress=False)


@pytest.mark.parametrize("bad", ["posts.jsonl", 7, {"text": "one row"}, DatasetDict({"train": Dataset.from_list([GOOD])})])
def test_what_is_no_dataset_is_a_type_error(bad):
    with pytest.raises(TypeError, match="posts must be"):
        normalise_posts(bad)
    with pytest.raises(TypeError, match="must be a dict"):
        normalise_posts([GOOD, "text"])
    for name in ("\ud800", 5):
        with pytest.raises(TypeError, match="column's name"):
            normalise_posts([{**GOOD, name: 1}])


def test_missing_image_folder_is_named():
    with pytest.raises(FileNotFoundError, match="image_dir='/no/such/folder'"):
        normalise_posts([GOOD], image_dir="/no/such/folder")


@given(st.text(max_size=12))
def test_cleaning_is_what_the_answer_parser_does(phrase):
    from dynkp.data.tasks import keyphrase_problem

    cleaned = normalise_phrase(phrase)
    assert normalise_phrase(cleaned) == cleaned
    problem = keyphrase_problem(cleaned)
    assert problem is None or not problem.startswith("begins or ends"), (phrase, problem)


# --- TRL's rows ---

CONVERSATION = {
    "prompt": [
        {"role": "system", "content": "Tag posts."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "my dog"}]},
    ],
    "completion": [{"role": "assistant", "content": "beagles"}],
    "reasoning_completion": None,
}


def test_conversational_rows_pass_through_unharmed():
    reasoned = {**CONVERSATION, "id": "own", "reasoning_completion": [{"role": "assistant", "content": "<think>..."}]}
    rows = [{**CONVERSATION, "images": [picture()]}, reasoned]
    posts, report = validate_posts(rows, progress=False)
    assert posts.column_names == ["id", "images", "prompt", "completion", "reasoning_completion"]
    for post, row in zip(posts, rows, strict=True):
        assert {name: post[name] for name in CONVERSATION} == {name: row[name] for name in CONVERSATION}
    assert posts["id"] == ["post-0", "own"]
    assert (report.conversations, report.without_image, report.without_text, report.without_keyphrases) == (2, 1, 0, 0)
    for dataset in (posts, posts.to_iterable_dataset(), IterableDataset.from_generator(lambda: iter(rows))):
        assert list(validate_posts(dataset, progress=False)[0]) == list(posts)


def test_conversational_datasets_keep_their_types():
    message = List({"role": Value("string"), "content": Value("string")})
    features = Features({"prompt": message, "completion": message})
    text = {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}
    posts, _ = validate_posts(Dataset.from_list([text], features=features), progress=False)
    assert {name: posts.features[name] for name in features} == features
    assert posts[0] == {"id": "post-0", "images": [], **text}


def test_an_empty_completion_teaches_nothing():
    row = {**CONVERSATION, "completion": []}
    with pytest.raises(InvalidPostsError, match="no_completion"):
        validate_posts([row], progress=False)
    assert len(validate_posts([row], need_keyphrases=False, progress=False)[0]) == 1


# --- findings ---


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"keyphrases": ["a", " # "]}, "empty_keyphrase"),
        ({"keyphrases": ["a", ""]}, "empty_keyphrase"),
        ({"keyphrases": ["NBA Finals", "#nba  finals"]}, "repeated_keyphrase"),
        ({"keyphrases": ["STRASSE", "straße"]}, "repeated_keyphrase"),
        ({"keyphrases": ["rock; roll"]}, "separator_in_keyphrase"),
        ({"keyphrases": ["</answer>a"]}, "tag_in_keyphrase"),
        ({"keyphrases": ["a<think>"]}, "tag_in_keyphrase"),
        ({"keyphrases": "a; b"}, "wrong_type"),
        ({"keyphrases": {"a": 1}}, "wrong_type"),
        ({"keyphrases": 1.0}, "wrong_type"),
        ({"keyphrases": float("nan")}, "wrong_type"),
        ({"keyphrases": ["a", None]}, "wrong_type"),
        ({"keyphrases": ["a", 3]}, "wrong_type"),
        ({"keyphrases": []}, "no_keyphrases"),
        ({"keyphrases": None}, "no_keyphrases"),
        ({"keyphrases": ["\ud83d"]}, "bad_unicode"),
        ({"text": "\udc00"}, "bad_unicode"),
        ({"text": 5}, "wrong_type"),
        ({"text": float("nan")}, "wrong_type"),
        ({"text": ["t"]}, "wrong_type"),
        ({"text": " "}, "empty_post"),
        ({"rationale": float("nan")}, "wrong_type"),
        ({"rationale": ["why"]}, "wrong_type"),
        ({"id": 1.5}, "wrong_type"),
        ({"id": True}, "wrong_type"),
        ({"id": "good"}, "repeated_id"),
        ({"image": "none.png"}, "missing_file"),
        ({"image": "broken.png"}, "unreadable_image"),
        ({"image": "text.jpg"}, "unreadable_image"),
        ({"image": "."}, "unreadable_image"),
        ({"image": "../secret.png"}, "path_outside"),
        ({"image": "link.png"}, "path_outside"),
        ({"image": "/etc/hostname"}, "path_outside"),
        ({"image": "https://example.com/a.png"}, "external_url"),
        ({"image": b"nothing"}, "unreadable_image"),
        ({"images": ["a.png", "none.png"]}, "missing_file"),
        ({"image": 3}, "wrong_type"),
        ({"images": [None]}, "wrong_type"),
        ({"image": "a.png", "images": ["a.png"]}, "wrong_type"),
        ({"keyphrases": None, "conversations": []}, "bad_conversation"),
        ({"keyphrases": None, "conversations": "hello"}, "bad_conversation"),
        ({"keyphrases": None, "conversations": [{"value": "q"}, {"value": "a"}, {"value": "q"}]}, "bad_conversation"),
        ({"keyphrases": None, "conversations": [{"from": "human"}]}, "bad_conversation"),
    ],
)
def test_each_kind_of_invalid_post_is_found(row, code, image_dir):
    post = {"id": "bad", "text": "t", "keyphrases": ["k"], **row}
    assert codes([post], image_dir=image_dir) == [code]
    with pytest.raises(ValueError, match=code) as caught:
        validate_posts([GOOD, post], image_dir=image_dir, progress=False)
    assert isinstance(caught.value, InvalidPostsError)
    named = {"repeated_id": "'good'"}.get(code, "'post-1'" if not isinstance(post["id"], str) else "'bad'")
    assert named in str(caught.value) and "on_invalid='skip'" in str(caught.value)


def test_a_bomb_is_found_by_its_header():
    assert codes([{**GOOD, "id": "b", "image": png_claiming(60_000, 60_000)}]) == ["decompression_bomb"]


def test_an_image_too_large_in_memory_is_refused_before_it_is_touched():
    image = PILImage.Image()
    image._size = (60_000, 60_000)
    assert [item["code"] for item in normalise_posts([{**GOOD, "image": image}])[0][LOAD_FINDINGS]] == ["decompression_bomb"]


def test_wrong_types_of_whole_columns_are_found_too():
    columns = Dataset.from_dict({"text": ["t", "u"], "keyphrases": ["a; b", "c"]})
    _, report = _skip(columns.add_item({"text": "v", "keyphrases": None}), need_keyphrases=False)
    assert report.counts() == {"wrong_type": 2}
    numbers = Dataset.from_dict({"text": [1, 2], "keyphrases": [["a"], ["b"]]})
    with pytest.raises(InvalidPostsError, match="text must be a string, got int 1"):
        validate_posts(numbers, progress=False)


def _skip(posts, **options):
    return validate_posts(posts, on_invalid="skip", progress=False, **options)


def test_what_is_valid_depends_on_the_task():
    row = {"id": "1", "text": "t", "keyphrases": ["rock, roll"]}
    assert codes([row]) == []
    assert codes([row], separator=", ") == ["separator_in_keyphrase"]
    assert codes([{"id": "1", "text": "t"}], need_keyphrases=False) == []
    assert codes([{**GOOD}], unique_ids=False) == []
    assert codes([{**GOOD, "id": "1", "image": b"nothing"}], check_images=False) == []


def test_a_rationale_may_hold_tags_and_an_image_alone_is_a_post():
    assert codes([{**GOOD, "id": "1", "rationale": "</think>"}, {"id": "2", "image": picture(), "keyphrases": ["k"]}]) == []


def test_report_counts_what_posts_lack():
    rows = [
        GOOD,
        {"id": "1", "text": " ", "keyphrases": [], "image": picture(), "rationale": " "},
        {"id": "2", "text": "t", "keyphrases": ["k"], "rationale": "why"},
    ]
    _, report = validate_posts(rows, need_keyphrases=False, progress=False)
    lacking = (report.without_image, report.without_text, report.without_keyphrases, report.without_rationale)
    assert (report.total, *lacking) == (3, 2, 1, 1, 2)
    assert report.summary().startswith("3 posts (2 without image, 1 without text, 1 without keyphrases, 2 without")


def test_the_error_counts_names_ten_and_tells_the_remedy(tmp_path):
    rows = [{"id": f"p{n}", "text": "t", "keyphrases": ["a", "a", "b;c"]} for n in range(20)]
    with pytest.raises(InvalidPostsError) as caught:
        validate_posts(rows, report_file=tmp_path / "report.jsonl", progress=False)
    message = str(caught.value)
    assert message.startswith("20 invalid posts. Read: 20 posts (20 without image")
    assert "repeated_keyphrase 20, separator_in_keyphrase 20" in message
    assert message.count("  post 'p") == 10 and "and 30 more" in message
    assert len(caught.value.report.findings) == 40
    written = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert [Finding(**row) for row in written] == caught.value.report.findings


def test_skip_drops_reports_and_logs(tmp_path, caplog):
    rows = [GOOD, {**GOOD, "text": "other"}, {"id": "x", "text": "t", "keyphrases": []}, {**GOOD, "id": "y"}]
    with caplog.at_level(logging.WARNING):
        posts, report = _skip(rows, report_file=tmp_path / "r.jsonl")
    assert posts["id"] == ["good", "y"] and report.dropped == 2
    assert "2 of 4 posts" in caplog.text and str(tmp_path / "r.jsonl") in caplog.text
    written = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(row["id"], row["index"], row["code"]) for row in written] == [
        ("good", 1, "repeated_id"),
        ("x", 2, "no_keyphrases"),
    ]


def test_nothing_left_is_an_error_even_when_skipping():
    with pytest.raises(InvalidPostsError, match="no_keyphrases"):
        _skip([{"id": "x", "text": "t"}])
    with pytest.raises(ValueError, match="on_invalid='drop'"):
        validate_posts([GOOD], on_invalid="drop")


def test_errors_survive_the_way_out_of_a_worker():
    error = InvalidPostsError.of(PostReport(total=1, findings=[Finding("x", 0, "empty_post", "m")]))
    assert str(type(error)(str(error))) == str(error)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
plausible = st.fixed_dictionaries(
    {},
    optional={
        "id": st.sampled_from(["a", "b", 1, None]) | anything,
        "text": st.text(max_size=5) | anything,
        "keyphrases": st.lists(st.text(max_size=4) | st.sampled_from(["a;b", "#", "A", "a"]), max_size=3) | anything,
        "image": st.sampled_from(["x.jpg", "../x", "http://x/y"]) | anything,
        "images": anything,
        "rationale": anything,
        "conversations": anything,
    },
)


@settings(max_examples=150, deadline=None)
@given(st.lists(plausible, max_size=5))
def test_no_row_is_lost_silently_whatever_it_holds(rows):
    rows = [{"id": "good-one", "text": "t", "keyphrases": ["k"]}, *rows]
    posts, report = _skip(rows)
    invalid = {finding.index for finding in report.findings}
    assert report.total == len(rows) == len(posts) + len(invalid)
    assert report.dropped == len(invalid)
    assert len(set(posts["id"])) == len(posts)
    again, second = validate_posts(posts, progress=False)
    assert list(again) == list(posts) and not second.findings


# --- streams ---


def test_a_stream_is_read_as_it_goes():
    read = []

    def endless():
        index = 0
        while True:
            read.append(index)
            yield {"id": index, "text": "t", "keyphrases": ["k"] if index % 2 else []}
            index += 1

    posts, report = _skip(
        IterableDataset.from_generator(
            endless,
            features=Features({"id": Value("int64"), "text": Value("string"), "keyphrases": List(Value("string"))}),
        )
    )
    assert read == []
    assert [post["id"] for post in posts.take(3)] == ["1", "3", "5"]
    assert report.counts()["no_keyphrases"] >= 3
    assert len(read) < 200


def test_a_stream_may_be_passed_twice_and_reports_each_finding_once(tmp_path):
    rows = [GOOD, {**GOOD}, {**GOOD, "id": "x"}]
    file = tmp_path / "r.jsonl"
    file.write_text("from an earlier run\n")
    posts, report = _skip(IterableDataset.from_generator(lambda: iter(rows)), report_file=file)
    for _ in range(2):
        assert [post["id"] for post in posts] == ["good", "x"]
        assert (report.total, report.dropped, report.counts()) == (3, 1, {"repeated_id": 1})
    assert [json.loads(line)["code"] for line in file.read_text().splitlines()] == ["repeated_id"]


def test_a_peek_into_a_stream_finds_no_repeats():
    rows = [{**GOOD, "id": str(n)} for n in range(5)]
    posts, report = validate_posts(IterableDataset.from_generator(lambda: iter(rows)))
    reader = iter(posts)
    next(reader)
    assert len(list(posts.take(4))) == 4
    assert len(list(reader)) == 4 and not report.findings


def test_a_stream_raises_at_the_invalid_post():
    rows = [GOOD, {**GOOD, "id": "x", "keyphrases": ["a;b"]}]
    posts, _ = validate_posts(IterableDataset.from_generator(lambda: iter(rows)))
    reader = iter(posts)
    assert next(reader)["id"] == "good"
    with pytest.raises(InvalidPostsError, match="'x': separator_in_keyphrase"):
        next(reader)


def test_a_stream_splits_between_workers_and_resumes():
    posts = Dataset.from_list([{**GOOD, "id": str(n)} for n in range(40)])
    stream, _ = _skip(posts.to_iterable_dataset(num_shards=4))
    loader = DataLoader(stream, batch_size=5, num_workers=2, collate_fn=lambda rows: [row["id"] for row in rows])
    assert sorted(int(post_id) for batch in loader for post_id in batch) == list(range(40))
    reader = iter(stream)
    head = [next(reader)["id"] for _ in range(17)]
    state = stream.state_dict()
    stream.load_state_dict(state)
    assert head + [post["id"] for post in stream] == [str(n) for n in range(40)]


def test_shards_without_ids_are_pointed_out(caplog):
    posts = Dataset.from_list([{"text": "t"}] * 4).to_iterable_dataset(num_shards=2)
    with caplog.at_level(logging.WARNING):
        normalise_posts(posts)
    assert "no column 'id' and 2 shards" in caplog.text


# --- size and real data ---


def test_a_hundred_thousand_posts_take_seconds():
    count = 100_000
    posts = Dataset.from_dict(
        {"text": [f"post {n}" for n in range(count)], "keyphrases": [[f"a{n}", f"b{n}"] for n in range(count)]}
    )
    start = time.process_time()
    valid, report = validate_posts(posts, progress=False)
    assert time.process_time() - start < 20
    assert len(valid) == report.total == count


def test_real_tweets_are_valid(shared):
    for name, count, keyphrases in (("test", 5372, 7117), ("valid", 5370, 7185)):
        rows = [json.loads(line) for line in (shared / f"data/cmkp/{name}.jsonl").read_text().splitlines()]
        posts, report = validate_posts(rows, use_images=False, progress=False)
        assert len(posts) == report.without_image == count and not report.findings
        assert sum(map(len, posts["keyphrases"])) == keyphrases
        assert posts["keyphrases"] == [row["keyphrases"] for row in rows]


# --- spellings ---


@pytest.mark.parametrize("spellings", SPELLINGS, ids=lambda spellings: spellings[0])
def test_equivalent_spellings_are_equal_after_loading_and_repeats_are_found(spellings):
    rows = [
        {"id": str(i), "text": unicodedata.normalize("NFD", spellings[0]), "keyphrases": [s]} for i, s in enumerate(spellings)
    ]
    typed = Dataset.from_list(
        [{"images": [], "rationale": None, **row} for row in rows], features=Features({**IDENTITY, **CONTENT})
    )
    for posts in (rows, Dataset.from_list(rows), typed, Dataset.from_list(rows).to_iterable_dataset()):
        for post in normalise_posts(posts):
            assert (post["text"], post["keyphrases"]) == (spellings[0], [spellings[0]])
    with pytest.raises(InvalidPostsError, match="repeats"):
        validate_posts([{"text": "a", "keyphrases": [spellings[0], spelling]} for spelling in spellings[1:]], progress=False)
