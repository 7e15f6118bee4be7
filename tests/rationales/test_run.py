"""Invariants of a run of rationales:

- against a real server, `transformers serve` with a LLaVA-shaped model saved on disk, offline: 200 real posts, each with its
  picture, get an answer; the second run asks nothing; chains ask a second time where the model is wrong (an untrained one is);
- settings that change the question change what is settled; others do not;
- batches exported, answered and imported in rounds end in the files that asking directly ends in;
- settings that cannot work are refused before anything is asked.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynkp.data.reasoning_tasks import REASONING_TASKS
from dynkp.data.sources import load_masc_posts, write_posts_jsonl
from dynkp.rationales.filters import DEFAULT_FILTERS
from dynkp.rationales.run import RationaleRun, RationaleSettings
from dynkp.synthetic.tiny_model import build_tiny_vlm
from tests.support.chat_server import last_text, serve
from tests.support.posts import picture
from tests.support.server_behaviours import ANSWER, FAILED, REJECTED, HostileServer, behaviours


def settings(folder: Path, url: str, **options: Any) -> RationaleSettings:
    defaults = {"concurrency": 4, "progress": False, "filters": (), "retry_pause": 0.01, "max_attempts": 2}
    return RationaleSettings(str(folder / "posts.jsonl"), str(folder / "r.jsonl"), "m", base_url=url, **{**defaults, **options})


def run(chosen: RationaleSettings) -> tuple[Any, list[dict[str, Any]], list[dict[str, Any]]]:
    with RationaleRun(chosen) as one:
        outcome = one.ask()
        one.write()
        return outcome, read(one.paths.output), read(one.paths.errors)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def real_server(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Iterator[tuple[str, str]]:
    """`transformers serve` with a tiny LLaVA; its address and the model's name."""
    folder = tmp_path_factory.mktemp("teacher")
    texts = [json.loads(line)["text"] for line in (shared / "data/masc_t15/test.jsonl").open()][:200]
    small = {"hidden_size": 32, "layers": 1, "heads": 2, "vision_hidden": 32, "vision_layers": 1, "vocab_size": 400}
    model, processor = build_tiny_vlm(texts, word_level=False, max_positions=4096, **small)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder / "model"), "--host", "127.0.0.1"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu"],
            stdout=log,
            stderr=log,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    assert process.poll() is None, (folder / "log").read_text()
                    time.sleep(0.2)
            else:
                pytest.fail((folder / "log").read_text())
            yield f"http://127.0.0.1:{port}/v1", str(folder / "model")
        finally:
            process.terminate()
            process.wait(30)


def test_a_real_server_and_200_real_posts(real_server: tuple[str, str], shared: Path, tmp_path: Path) -> None:
    url, model = real_server
    images = shared / "data/masc_t15/images"
    posts = load_masc_posts(shared / "data/masc_t15/test.jsonl", images)
    posts = posts.select([place for place, row in enumerate(posts) if row["images"]][:200]).remove_columns("rationale")
    write_posts_jsonl(posts, tmp_path / "posts.jsonl", image_dir=images)
    chosen = dataclasses.replace(
        settings(tmp_path, url, image_dir=str(images), max_side=64, max_tokens=4, preview=20, concurrency=2), model=model
    )
    outcome, rows, errors = run(chosen)
    assert (outcome.settled, outcome.failed, outcome.requests, errors) == (200, 0, 200, [])
    assert [row["id"] for row in rows] == posts["id"]
    assert all(row["rationale_model"] == model for row in rows)
    assert len({row["rationale"] for row in rows}) > 20
    assert (tmp_path / "r.preview.html").read_text().count("<img ") >= 20
    # The server saw the pictures: the prompt has their tokens.
    journal = read(tmp_path / "r.journal" / "answers-00001.jsonl")
    assert min(row["prompt_tokens"] for row in journal) > 16 and {row["finish_reason"] for row in journal} <= {"length", "stop"}
    again, same, _ = run(chosen)
    assert again.requests == 0 and same == rows


def test_chains_of_a_real_server(real_server: tuple[str, str], shared: Path, tmp_path: Path) -> None:
    url, model = real_server
    lines = (shared / "data/masc_t15/test.jsonl").read_text().splitlines()
    chosen_lines = [line for line in lines if json.loads(line)["image"]][:10]
    (tmp_path / "posts.jsonl").write_text("\n".join(chosen_lines) + "\n")
    images = str(shared / "data/masc_t15/images")
    options = {"task": "masc", "image_dir": images, "max_side": 64, "max_tokens": 4, "concurrency": 2}
    outcome, rows, errors = run(dataclasses.replace(settings(tmp_path, url, **options), model=model))
    assert (outcome.settled, outcome.failed, outcome.requests, errors) == (10, 0, 20, [])
    assert {row["rationale_stage"] for row in rows} == {"explain"}


def write_masc(folder: Path, count: int = 12) -> list[dict[str, Any]]:
    labels = ("positive", "neutral", "negative")
    rows = [{"id": n, "text": f"post {n}", "aspect": "dog", "label": labels[n % 3]} for n in range(count)]
    (folder / "posts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def always_positive(body: dict[str, Any]) -> dict[str, Any]:
    """Right for a third; told the answer, right for all but post 5."""
    text = last_text(body)
    told = text.partition("The right answer is known: ")[2].partition(".")[0]
    label = told if told and "post 5\n" not in text else "positive"
    return {"content": f'"Text_analysis": "it says so in so many words"\n\n"Prediction": "{label}"'}


def test_the_stage_is_recorded_per_post(tmp_path: Path) -> None:
    write_masc(tmp_path)
    with serve(reply=always_positive) as (url, server):
        outcome, rows, errors = run(settings(tmp_path, url, task="masc", filters=("wrong_prediction",)))
        assert outcome.requests == len(server.bodies) == 12 + 8
    assert [row["rationale_stage"] for row in rows] == [("predict" if n % 3 == 0 else "explain") for n in range(12) if n != 5]
    assert [(row["id"], row["reason"]) for row in errors] == [("5", "wrong_prediction")]
    assert all(REASONING_TASKS["masc"].is_right(row, row["rationale"]) for row in rows)


def test_what_is_asked_decides_what_is_settled(tmp_path: Path) -> None:
    write_masc(tmp_path, 4)
    with serve() as (url, server):

        def sent(**options: Any) -> int:
            before = len(server.bodies)
            run(settings(tmp_path, url, task="msc", **options))
            return len(server.bodies) - before

        first = sent()
        assert first == 8
        assert sent() == sent(concurrency=1, min_words=3, timeout=3, keep_all=True) == 0
        for change in ({"temperature": 0.5}, {"max_tokens": 9}, {"seed": 3}, {"extra_body": {"top_k": 3}}):
            assert sent(**change) == 8, change
            assert sent(**change) == 0, change
        assert sent() == 0
        assert server.bodies[-1]["top_k"] == 3


def test_openai_s_name_for_the_length_replaces_the_common_one(tmp_path: Path) -> None:
    body = settings(tmp_path, "", extra_body={"max_completion_tokens": 7}, temperature=0.0).request_settings()
    assert body == {"model": "m", "max_completion_tokens": 7, "temperature": 0.0}


def test_batches_end_where_asking_ends(tmp_path: Path) -> None:
    (tmp_path / "asked").mkdir()
    (tmp_path / "batch").mkdir()
    for folder in (tmp_path / "asked", tmp_path / "batch"):
        write_masc(folder)
    with serve(reply=always_positive) as (url, _):
        _, rows, _ = run(settings(tmp_path / "asked", url, task="masc"))
    chosen = settings(tmp_path / "batch", "", task="masc")
    for rounds, expected in enumerate((12, 8, 0)):
        folder = tmp_path / f"files{rounds}"
        with RationaleRun(chosen) as one:
            count, files = one.export(folder)
            assert count == expected
        results = []
        for request in (json.loads(line) for file in files for line in file.open()):
            choice = {"message": always_positive(request["body"]), "finish_reason": "stop"}
            response = {"status_code": 200, "body": {"choices": [choice]}}
            results.append({"custom_id": request["custom_id"], "response": response, "error": None})
        (folder / "results").write_text("".join(json.dumps(row) + "\n" for row in reversed(results)))
        with RationaleRun(chosen) as one:
            assert one.import_results([folder / "results"]).answers == expected
            outcome = one.replay()
            one.write()
    assert outcome.open == 0
    assert read(tmp_path / "batch" / "r.jsonl") == rows


def test_a_batch_leaves_broken_images_out(tmp_path: Path) -> None:
    rows = [{"text": f"post {n}", "keyphrases": ["dogs"], "image": f"{n}.jpg"} for n in range(3)]
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n\n")
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.jpg")
    (tmp_path / "1.jpg").write_bytes(b"no picture")
    chosen = RationaleSettings(
        str(tmp_path / "posts.jsonl"), str(tmp_path / "r.jsonl"), "m", image_dir=str(tmp_path), progress=False
    )
    for folder, expected in (("one", 2), ("two", 2)):
        with RationaleRun(chosen) as one:
            assert one.export(tmp_path / folder)[0] == expected
    with RationaleRun(chosen) as one:
        assert one.replay().open == 2
        assert one.write()["invalid_post"] == 1
    (error,) = read(tmp_path / "r.errors.jsonl")
    assert (error["id"], error["reason"]) == ("posts-1", "invalid_post") and "supported format" in error["error"]


def test_settings_that_cannot_work(tmp_path: Path) -> None:
    write_masc(tmp_path, 1)
    (tmp_path / "prices.json").write_text('{"other": {"input": 1, "output": 1}}')
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"max_cost": 1.0}, "max_cost=1.0 needs the price of model 'm'"),
        ({"max_cost": 1.0, "prices": str(tmp_path / "prices.json")}, "prices.json.* has none"),
        ({"max_side": 3}, "max_side=3 must be at least 16"),
        ({"task": "mask"}, "task='mask'"),
        ({"filters": ("none",)}, "are not known"),
        ({"image_dir": str(tmp_path / "none")}, "is not a folder"),
    ]
    for options, error in wrong:
        with pytest.raises((ValueError, OSError), match=error):
            RationaleRun(settings(tmp_path, "http://127.0.0.1:9/v1", **options))
    with RationaleRun(settings(tmp_path, "")) as one, pytest.raises(ValueError, match="base_url is missing"):
        one.ask()
    with RationaleRun(settings(tmp_path, "")), pytest.raises(BlockingIOError, match="another run is writing"):
        RationaleRun(settings(tmp_path, ""))


def test_no_server_and_no_post_ends_a_run(tmp_path: Path) -> None:
    """Each behaviour of a server for one post, good posts and hostile ones between them: each has the outcome that it must."""
    found = [one for one in behaviours("http://127.0.0.1:9") if not one.chunks or one.name == "endless"]
    posts: list[Any] = []
    for number, behaviour in enumerate(found):
        posts.append({"id": behaviour.name, "text": f"<<{behaviour.name}>>", "keyphrases": ["dog"]})
        posts.append({"id": f"good {number}", "text": f"good {number}", "keyphrases": ["dog"]})
    hostile = [
        {"id": "images", "text": "x", "keyphrases": ["dog"], "images": [{"bytes": [1, 2]}]},
        {"id": "deep", "text": "x", "keyphrases": ["dog"], "more": json.loads("[" * 300 + "]" * 300)},
        {"id": "keyphrases", "text": "x", "keyphrases": {"a": [7]}},
    ]
    good = {"id": "good findings", "text": "y", "keyphrases": ["dog"], "load_findings": [{"message": 7}]}
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(post) + "\n" for post in [*posts, *hostile, good]))
    with serve(HostileServer) as (url, _):
        for stopped in (None, "server"):  # the second run asks only the post whose server was not reached
            outcome, written, errors = run(settings(tmp_path, url, filters=DEFAULT_FILTERS, max_attempts=1, timeout=10.0))
            assert outcome.stopped == stopped and outcome.open == 0
            reasons = {row["id"]: row["reason"] for row in errors}
            outcomes = {row["id"]: ANSWER for row in written}
            for post_id, reason in reasons.items():
                outcomes[post_id] = {"request_failed": FAILED, "invalid_post": "invalid"}.get(reason, REJECTED)
            expected = {one.name: one.outcome for one in found} | {f"good {number}": ANSWER for number in range(len(found))}
            expected |= {post["id"]: "invalid" for post in hostile} | {"good findings": ANSWER}
            assert {name: outcomes.get(name) for name in expected if outcomes.get(name) != expected[name]} == {}
            assert all("load_findings" not in row for row in written)
