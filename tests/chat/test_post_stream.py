"""Invariants of the stream of posts:

- posts come in order, with their number, id and place; reading from a place gives what follows it; shards and a limit divide
  them, and together give them all;
- a line that is no post is a post with findings, and so is one whose image must not be read;
- the fingerprint changes with the line, the settings, and each image's size or time, and with nothing else;
- addresses are images only where allowed; memory does not grow with the file.
"""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from dynkp.chat.post_stream import PostStream
from tests.support.posts import picture


def written(folder: Path, rows: list[Any], name: str = "posts.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def plain(count: int) -> list[dict[str, Any]]:
    return [{"id": f"p{number}", "text": f"text {number} ü", "keyphrases": ["dog"]} for number in range(count)]


def test_posts_come_in_order(tmp_path: Path) -> None:
    rows = plain(5)
    del rows[2]["id"]
    rows[3]["id"] = 33
    path = written(tmp_path, [*rows[:2], "", *rows[2:]])
    sources = list(PostStream(path))
    assert [source.index for source in sources] == [0, 1, 2, 3, 4]
    assert [source.id for source in sources] == ["p0", "p1", "posts-2", "33", "p4"]
    assert [source.post["id"] for source in sources] == ["p0", "p1", "posts-2", "33", "p4"]
    assert [source.post["text"] for source in sources] == [row["text"] for row in rows]
    assert sources[-1].end == path.stat().st_size
    assert [source.row for source in sources] == rows
    for source in sources:
        rest = list(PostStream(path).read(source.end, source.index + 1))
        assert [one.line for one in rest] == [one.line for one in sources[source.index + 1 :]]
        assert [one.index for one in rest] == list(range(source.index + 1, 5))


@pytest.mark.parametrize("limit", [None, 0, 1, 7, 100])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shards_divide_the_posts(tmp_path: Path, count: int, limit: int | None) -> None:
    path = written(tmp_path, plain(11))
    shards = [PostStream(path, shard=(number, count), limit=limit) for number in range(1, count + 1)]
    indices = [[source.index for source in shard] for shard in shards]
    assert [len(shard) for shard in shards] == [len(one) for one in indices]
    assert sorted(sum(indices, [])) == list(range(11 if limit is None else min(limit, 11)))
    for shard, one in zip(shards, indices, strict=True):
        assert [shard.index_in_file(place) for place in range(len(one))] == one
        assert [shard.index_in_shard(index) for index in one] == list(range(len(one)))


def test_a_file_without_a_last_line_break_and_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"id": "a"}\r\n{"id": "b"}')
    stream = PostStream(tmp_path / "p.jsonl")
    assert [source.id for source in stream] == ["a", "b"] and len(stream) == 2


def test_empty_lines_are_no_posts(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"id": "a"}\n\n \r\n{"id": "b"}\n\n')
    assert len(PostStream(tmp_path / "p.jsonl")) == 2
    shards = [PostStream(tmp_path / "p.jsonl", shard=(number, 2)) for number in (1, 2)]
    assert [(len(list(shard)), len(shard)) for shard in shards] == [(1, 1), (1, 1)]
    assert len(PostStream(tmp_path / "p.jsonl", limit=2)) == 2


def test_a_line_that_is_no_post_does_not_end_the_run(tmp_path: Path) -> None:
    path = written(tmp_path, [*plain(1), "{broken", "[1]", '{"id": "x", "text": 3, "keyphrases": "dog"}', *plain(1)])
    findings = [source.findings() for source in PostStream(path)]
    assert findings[0] == findings[4] == []
    assert "post 1: not valid JSON" in findings[1][0]
    assert "post 2: a row must be a JSON object" in findings[2][0]
    assert findings[3] == ["text must be a string, got int 3", "keyphrases must be a list of strings, got str 'dog'"]


def test_images_stay_in_their_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    picture(1).save(tmp_path / "images" / "1.png")
    names = ["1.png", "../posts.jsonl", "http://host/1.png"]
    path = written(tmp_path, [{"text": "x", "image": name} for name in names])
    sources = list(PostStream(path, tmp_path / "images"))
    assert [len(source.findings()) for source in sources] == [0, 1, 1]
    assert sources[0].post["images"] == [{"bytes": None, "path": str(tmp_path / "images" / "1.png")}]
    assert "is outside the image folder" in sources[1].findings()[0]
    assert "never fetched" in sources[2].findings()[0]


def test_addresses_where_they_are_allowed(tmp_path: Path) -> None:
    path = written(tmp_path, [{"text": "x", "images": ["https://host/1.png"]}, {"text": "x", "image": "ftp://host/1.png"}])
    one, two = PostStream(path, allow_image_urls=True)
    assert one.post["image_urls"] == ["https://host/1.png"] and one.post["images"] == [] and not one.findings()
    assert len(two.findings()) == 1


def test_the_fingerprint_is_that_of_line_settings_and_images(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "1.png")
    path = written(tmp_path, [{"id": "a", "image": "1.png"}, {"id": "b", "image": "none.png"}, {"id": "a", "image": "1.png"}])

    def fingerprints(settings: bytes = b"s") -> list[bytes]:
        return [source.fingerprint(settings) for source in PostStream(path, tmp_path)]

    first, missing, same = before = fingerprints()
    assert first == same != missing and len(first) == 16
    assert fingerprints() == before
    assert not set(fingerprints(b"t")) & set(before)
    os.utime(tmp_path / "1.png", ns=(1, 1))
    touched = fingerprints()
    assert touched[0] != first and touched[1] == missing
    picture(1).save(tmp_path / "none.png")
    assert fingerprints()[1] != missing


def test_a_place_is_known_by_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, plain(3))
    before = PostStream(path).identity()
    assert PostStream(path).identity() == before != PostStream(path, limit=2).identity()
    written(tmp_path, plain(4))
    assert PostStream(path).identity() != before


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, plain(30_000))
    stream = PostStream(path)
    tracemalloc.start()
    for source in stream:
        source.fingerprint(b"s")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5 * (1 << 20)  # the file's buffer is 1 MiB


@pytest.mark.parametrize("text", ['[{"id": "a"}]', "id,text\n", "\n\n 3"])
def test_other_forms_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match="posts must be JSON Lines"):
        PostStream(tmp_path / "p.json")


def test_what_is_not_there_or_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        PostStream(tmp_path / "none.jsonl")
    path = written(tmp_path, plain(1))
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        PostStream(path, tmp_path / "none")
    for shard in ((0, 2), (3, 2)):
        with pytest.raises(ValueError, match="shard="):
            PostStream(path, shard=shard)


@pytest.mark.parametrize("value", [None, 7, "x", [], [7], [None], [{}], [{"message": 3}], {"a": 1}, [["deep"]]])
def test_reserved_columns_never_come_from_the_file(tmp_path: Path, value: Any) -> None:
    row = {"id": "a", "text": "x", "keyphrases": ["k"]}
    (source,) = PostStream(written(tmp_path, [{**row, "load_findings": value, "image_urls": ["http://host/1.png"]}]))
    assert source.findings() == [] and source.row == row and source.post["image_urls"] == []


@pytest.mark.parametrize(
    "row",
    [
        {"images": [{"bytes": [1, 2, 3]}]},
        {"image": {"bytes": "text", "path": "1.png"}},
        {"images": {"bytes": {"a": 1}}},
        {"images": [[["1.png"]]]},
        {"images": [{"path": {"a": 1}}]},
        {"text": {"a": []}, "id": [[]]},
        {"conversations": {"a": 1}},
    ],
)
def test_a_row_of_any_shape_is_a_finding_of_its_post(tmp_path: Path, row: dict[str, Any]) -> None:
    (source,) = PostStream(written(tmp_path, [row]), tmp_path)
    assert source.findings() and isinstance(source.post["id"], str) and source.fingerprint(b"s")


def test_the_depth_of_json_is_limited(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    for depth, valid in ((99, True), (101, False), (300, False), (900, False), (100_000, False)):
        for begin, end in (("[", "]"), ('{"a": ', "}")):
            nested = begin * depth + "1" * (begin != "[") + end * depth
            path.write_text('{"id": "a", "text": "x", "extra": ' + nested + "}\n")
            (source,) = PostStream(path)
            assert (not source.findings()) == valid, (depth, begin)
    path.write_text(json.dumps({"id": "a", "text": "x", "extra": [[n] for n in range(1000)]}) + "\n")
    assert [source.findings() for source in PostStream(path)] == [[]]
