"""Invariants of the files:

- every post is in the output or among the errors, once, in order, unless it is open; the counts say how many; the post's own
  columns are kept;
- near-copies are rejected in favour of the first; with `keep_all` posts without rationale stay, with null;
- an interrupted write leaves the files unchanged;
- merged shards equal the run over all posts, near-copies across shards included; unfinished, missing and mismatched shards
  are errors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynkp.chat.settings import RunPaths
from dynkp.data.sources import load_posts
from dynkp.rationales.files import merge_shards, rationale_summary
from dynkp.rationales.run import RationaleRun, RationaleSettings
from tests.support.chat_server import last_text, serve
from tests.support.posts import picture

PLAIN = "The author shows number {0} and {0} again, so people who look for {0} would find the post by this tag {0} times."
ANSWERS = {
    "refuse": "I'm sorry, but I can't help with that.",
    "copy": "This is what the teacher always says when it has no idea why people would use a tag like this one here.",
    "empty": " ",
}


def reply(body: dict[str, Any]) -> dict[str, Any]:
    text = last_text(body).split('"Post text": ')[1].split("\n")[0]
    kind, _, number = text.partition(" ")
    return {"content": ANSWERS.get(kind, PLAIN.format(f"n{number}x")), "reasoning_content": f"thinking about {text}"}


def write_posts(folder: Path, kinds: str) -> Path:
    """Posts by letter: good, refuse, copy, empty, failing, invalid."""
    words = {"g": "good", "r": "refuse", "c": "copy", "e": "empty", "f": "cursed", "i": "invalid"}
    picture(1).save(folder / "1.png")
    rows = []
    for number, kind in enumerate(kinds):
        row = {"id": f"p{number}", "text": f"{words[kind]} {number}", "keyphrases": ["tag"], "ocr": "x", "image": "1.png"}
        if kind == "i":
            row["image"] = "missing.png"
        rows.append(row)
    path = folder / "posts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(folder: Path, url: str = "", **options: Any) -> dict[str, Any]:
    settings = RationaleSettings(
        str(folder / "posts.jsonl"),
        str(folder / "r.jsonl"),
        "m",
        base_url=url,
        image_dir=str(folder),
        **{"concurrency": 4, "max_attempts": 2, "retry_pause": 0.01, "progress": False, "min_words": 5, **options},
    )
    with RationaleRun(settings) as one:
        one.ask() if url else one.replay()
        return one.write()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_originals(path: Path) -> list[dict[str, Any]]:
    """Rows; of near-copies not of which post, as a shard names the first one that it has itself."""
    return [{**row, "error": row["error"].partition(": that of")[0]} if "error" in row else row for row in read(path)]


KINDS = "ggrcgcefigcg"


def test_every_post_is_in_one_of_the_files(tmp_path: Path) -> None:
    write_posts(tmp_path, KINDS)
    with serve(reply=reply, cursed="cursed") as (url, _):
        report = run(tmp_path, url, preview=5)
    paths = RunPaths(tmp_path / "r.jsonl")
    rows, errors = read(paths.output), read(paths.errors)
    assert [row["id"] for row in rows] == ["p0", "p1", "p3", "p4", "p9", "p11"]
    assert list(rows[0]) == [
        *("id", "text", "keyphrases", "ocr", "image", "rationale", "rationale_model", "rationale_stage", "reasoning_content")
    ]
    assert rows[1]["rationale"] == PLAIN.format("n1x")
    assert (rows[1]["rationale_model"], rows[1]["rationale_stage"], rows[1]["image"]) == ("m", "explain", "1.png")
    assert rows[1]["reasoning_content"] == "thinking about good 1"
    assert [(row["index"], row["id"], row["reason"]) for row in errors] == [
        (2, "p2", "refusal"),
        (5, "p5", "near_copy"),
        (6, "p6", "empty"),
        (7, "p7", "request_failed"),
        (8, "p8", "invalid_post"),
        (10, "p10", "near_copy"),
    ]
    assert errors[0]["rationale"] == ANSWERS["refuse"] and "that of post number 3" in errors[1]["error"]
    assert "missing.png" in errors[4]["error"] and errors[4]["rationale"] is None
    assert rationale_summary(report) == (
        "12 posts: 6 with a rationale, 1 failed, 1 invalid; rejected: 1 empty, 1 refusal, 2 near_copy"
    )
    recorded = json.loads(paths.report.read_text())
    assert recorded["rejected"] == report["rejected"] and recorded["written"] == 6
    assert (
        sum(recorded[name] for name in ("written", "open", "invalid_post", "request_failed"))
        + sum(recorded["rejected"].values())
        == recorded["posts"]
        == 12
    )
    page = paths.preview.read_text()
    assert page.count("<article>") == 5 and "data:image/jpeg;base64," in page
    posts = load_posts(paths.output, image_dir=tmp_path)
    assert posts[1]["rationale"] == PLAIN.format("n1x") and len(posts) == 6


def test_other_filters_need_no_server(tmp_path: Path) -> None:
    write_posts(tmp_path, KINDS)
    with serve(reply=reply, cursed="cursed") as (url, _):
        run(tmp_path, url)
    report = run(tmp_path, filters=())
    assert report["written"] == 10
    report = run(tmp_path, filters=("no_gold_phrase",))
    assert report["rejected"]["no_gold_phrase"] == 2  # empty and refusal
    report = run(tmp_path, keep_all=True)
    rows = read(tmp_path / "r.jsonl")
    assert [row["id"] for row in rows] == [f"p{n}" for n in range(12) if n != 8]
    assert [row["rationale"] is None for row in rows].count(True) == 5


def test_open_posts_are_in_neither_file(tmp_path: Path) -> None:
    write_posts(tmp_path, "ggg")
    assert run(tmp_path)["open"] == 3
    assert read(tmp_path / "r.jsonl") == read(tmp_path / "r.errors.jsonl") == []


def test_an_interrupted_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_posts(tmp_path, "ggrg")
    with serve(reply=reply) as (url, _):
        run(tmp_path, url)
    before = (tmp_path / "r.jsonl").read_bytes(), (tmp_path / "r.errors.jsonl").read_bytes()
    monkeypatch.setattr("dynkp.rationales.files._reason", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert before == ((tmp_path / "r.jsonl").read_bytes(), (tmp_path / "r.errors.jsonl").read_bytes())


@pytest.mark.parametrize("keep_all", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_merged_shards_equal_the_whole_run(tmp_path: Path, count: int, keep_all: bool) -> None:
    write_posts(tmp_path, KINDS)
    with serve(reply=reply, cursed="cursed") as (url, server):
        run(tmp_path, url, keep_all=keep_all)
        names = ("r.jsonl", "r.errors.jsonl")
        whole = [without_originals(tmp_path / name) for name in names]
        if count == 1:
            with pytest.raises(FileNotFoundError, match=r"there is no finished shard, such as r\.1-of-2\.jsonl"):
                merge_shards(tmp_path / "r.jsonl", progress=False)
            return
        server.bodies.clear()
        for number in range(1, count + 1):
            run(tmp_path, url, shard=(number, count), keep_all=keep_all)
        assert len(server.bodies) == 12  # one is invalid, one fails twice
    for name in names:
        (tmp_path / name).unlink()
    report = merge_shards(tmp_path / "r.jsonl", progress=False)
    assert [without_originals(tmp_path / name) for name in names] == whole
    assert report["written"] == 6 and report["rejected"]["near_copy"] == 2 and report["requests"] == 12


@pytest.mark.parametrize("kinds", ["gggggg", "ggggrg"])
def test_a_shard_that_lost_rows_is_an_error(tmp_path: Path, kinds: str) -> None:
    write_posts(tmp_path, kinds)
    with serve(reply=reply) as (url, _):
        for number in (1, 2):
            run(tmp_path, url, shard=(number, 2), keep_all="r" in kinds)
    merge_shards(tmp_path / "r.jsonl", progress=False)
    before = (tmp_path / "r.jsonl").read_bytes()
    shard = tmp_path / "r.1-of-2.jsonl"
    shard.write_bytes(b"".join(shard.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="have 4 posts in their places, and their reports 6"):
        merge_shards(tmp_path / "r.jsonl", progress=False)
    assert (tmp_path / "r.jsonl").read_bytes() == before


def test_mismatched_shards_are_errors(tmp_path: Path) -> None:
    write_posts(tmp_path, "gggg")
    with serve(reply=reply) as (url, _):
        run(tmp_path, url, shard=(1, 2))
        with pytest.raises(FileNotFoundError, match=r"of 2 shards of .*, \[2\] are missing"):
            merge_shards(tmp_path / "r.jsonl")
        run(tmp_path, shard=(2, 2))
        with pytest.raises(ValueError, match=r"r\.2-of-2\.jsonl is not finished: 2 posts are open"):
            merge_shards(tmp_path / "r.jsonl")
        run(tmp_path, url, shard=(2, 2), max_tokens=9)
        with pytest.raises(ValueError, match=r"r\.2-of-2\.jsonl was made with different settings"):
            merge_shards(tmp_path / "r.jsonl")
        run(tmp_path, url, shard=(1, 3))
        with pytest.raises(ValueError, match=r"shards of \[2, 3\]"):
            merge_shards(tmp_path / "r.jsonl")
