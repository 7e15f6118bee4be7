"""Invariants of `dynkp judge`:

- killed at random moments, it goes on and asks nothing twice but what was under way; each way to end has its exit status;
- the API key is nowhere but in the request's header, nor accepted as an argument;
- the form for people and their answers go through the command line; the help's lists are those of the library, and its
  options are the settings of the run.
"""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dynkp import cli
from dynkp.chat.settings import RunSettings
from dynkp.cli import chat_options, judge
from dynkp.cli.errors import INTERRUPTED, RUN_FAILED, USER_ERROR
from dynkp.judging.ranks import CRITERIA, TIES
from dynkp.judging.run import ANSWER_FORMATS, JudgeSettings
from tests.conftest import REPOSITORY
from tests.support.chat_server import last_text, serve

KEY = "secret-0123456789abcdefXYZ"


def write(folder: Path, count: int, cursed: tuple[int, ...] = ()) -> None:
    posts = [{"id": f"p{n}", "text": f"post {n}" + " cursed" * (n in cursed), "keyphrases": [f"tag {n}"]} for n in range(count)]
    (folder / "posts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in posts))
    for system in ("first", "second"):
        rows = [{"id": f"p{n}", "keyphrases": [system]} for n in range(count)]
        (folder / f"{system}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def first_is_best(body: dict[str, Any]) -> dict[str, Any]:
    text = last_text(body)
    each = {"A": 1, "B": 2} if 'A: ["first"]' in text else {"A": 2, "B": 1}
    return {"content": json.dumps(dict.fromkeys(CRITERIA, each))}


def compared(folder: Path, *more: str) -> list[str]:
    predictions = [str(folder / f"{system}.jsonl") for system in ("first", "second")]
    return ["judge", "--posts", str(folder / "posts.jsonl"), "--predictions", *predictions, *more]


def asked(folder: Path, url: str, *more: str) -> list[str]:
    server = ("--base-url", url, "--model", "m", "--output", str(folder / "r.jsonl"))
    quick = ("--no-progress", "--retry-pause", "0.01", "--max-attempts", "2", "--concurrency", "4", "--resamples", "100")
    return compared(folder, *server, *quick, *more)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_killed_it_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    posts, kills, generator = 150, 3, random.Random(1)
    write(tmp_path, posts)
    journal = tmp_path / "r.journal" / "answers-00001.jsonl"
    with serve(latency=0.02, reply=first_is_best) as (url, server):
        command = [sys.executable, "-m", "dynkp.cli", *asked(tmp_path, url)]
        under_way = 0
        for moment in sorted(generator.sample(range(10, posts - 40), kills)):
            process = subprocess.Popen(command, cwd=REPOSITORY)
            while not journal.exists() or journal.read_bytes().count(b"\n") < moment:
                assert process.poll() is None
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.wait()
            answered = len(journal.read_bytes().splitlines())
            time.sleep(0.1)
            under_way = len(server.bodies) - answered  # of all kills so far, what was sent and is not in the journal
            assert under_way <= 4 * kills
        assert cli.main(asked(tmp_path, url)) == 0
        sent = Counter(json.dumps(body) for body in server.bodies)
    assert len(sent) == posts + 1  # and the probe
    assert sent.total() <= posts + 1 + 4 * kills
    report = json.loads((tmp_path / "r.report.json").read_text())
    assert report["mean_ranks"]["first"]["overall"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert [row["id"] for row in read(tmp_path / "r.jsonl")] == [f"p{n}" for n in range(posts)]


def test_each_ending_has_its_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 20, cursed=(4,))
    (tmp_path / "prices.json").write_text('{"m": {"input": 10000, "output": 20000}}')
    with serve(reply=first_is_best, cursed="cursed") as (url, server):
        cost = ("--prices", str(tmp_path / "prices.json"), "--max-cost", "11")
        assert cli.main(asked(tmp_path, url, *cost)) == chat_options.COST_REACHED
        said = capsys.readouterr()
        assert "--max-cost reached" in said.err and "not asked yet" in said.out and "cost " in said.out
        assert cli.main(asked(tmp_path, url)) == chat_options.SOME_FAILED
        said = capsys.readouterr()
        assert "1 posts have no ranks, see" in said.err and "20 posts: 19 ranked, 1 failed" in said.out
        assert "| first " in said.out and "1.00 (1.00-1.00)" in said.out and "p-value" in said.out
        sent = len(server.bodies)
        assert cli.main(asked(tmp_path, url, "--names", "one", "two", "--ties", "min")) == chat_options.SOME_FAILED
        assert "| one " in capsys.readouterr().out and len(server.bodies) == sent
        assert cli.main(asked(tmp_path, url, "--names", "one")) == USER_ERROR
        assert "dynkp judge: error: 1 names for 2 files" in capsys.readouterr().err
    assert cli.main(asked(tmp_path, "http://127.0.0.1:9/v1", "--max-tokens", "7")) == RUN_FAILED
    assert "connection failed" in capsys.readouterr().err


def test_interrupted_it_goes_on(tmp_path: Path) -> None:
    write(tmp_path, 60)
    with serve(latency=0.2, reply=first_is_best) as (url, server):
        command = [sys.executable, "-m", "dynkp.cli", *asked(tmp_path, url)]
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
        while len(server.bodies) < 10:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == INTERRUPTED and "the same command continues" in said
        assert cli.main(asked(tmp_path, url, "--concurrency", "32")) == 0
        assert len(server.bodies) == 61


def test_the_key_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    write(tmp_path, 6)

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        return {"content": f"{KEY} is your key"} if "post 3" in json.dumps(body) else first_is_best(body)

    with serve(reply=reply) as (url, server):
        assert cli.main(asked(tmp_path, url)) == chat_options.SOME_FAILED
        assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
        with pytest.raises(SystemExit):
            cli.main(asked(tmp_path, f"{url}?key={KEY}"))
    said = capsys.readouterr()
    assert "an argument holds the API key" in said.err and KEY not in said.err + said.out
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 8 and [file.name for file in files if KEY.encode() in file.read_bytes()] == []


def test_people_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 8)
    form, key = tmp_path / "form.html", tmp_path / "form.key.json"
    assert cli.main(compared(tmp_path, "--human", str(form), "--sample", "5")) == 0
    assert "5 posts to rank; on 0 more all systems agree; 0 posts cannot be judged" in capsys.readouterr().out
    content = json.loads(key.read_text())
    files = []
    for name in ("Ann", "Ben"):
        answers = [
            {"id": post["id"], "ranks": dict.fromkeys(CRITERIA, {"A": 1, "B": 1} if number == 0 and name == "Ben" else ranks)}
            for number, post in enumerate(content["posts"])
            for ranks in [{"A": 1, "B": 2} if post["order"][0] == ["first"] else {"A": 2, "B": 1}]
        ]
        files.append(tmp_path / f"{name}.json")
        said = {"form": content["form"], "annotator": name, "answers": [{**one, "complete": True} for one in answers]}
        files[-1].write_text(json.dumps(said))
    words = ["judge", "--read-human", *map(str, files), "--key", str(key), "--output", str(tmp_path / "human.jsonl")]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "2 annotators, 0 posts that one of them did not finish" in said and "Krippendorff's α" in said
    report = json.loads((tmp_path / "human.report.json").read_text())
    assert report["mean_ranks"]["second"]["overall"]["mean"] == pytest.approx((1.5 + 4 * 2) / 5)
    assert 0 < report["alpha"]["overall"] < 1 and report["annotators"] == {"Ann": 5, "Ben": 5}
    assert len(read(tmp_path / "human.jsonl")) == 10
    assert cli.main([*words[:4], "--key", str(files[0])]) == USER_ERROR
    assert "must be a JSON object with form, systems, posts" in capsys.readouterr().err


def test_the_help_is_the_library_s() -> None:
    assert judge.TIES == TIES and judge.ANSWER_FORMATS == ANSWER_FORMATS
    defaults = vars(judge.parser().parse_args([]))
    fields = {field.name: field for field in dataclasses.fields(JudgeSettings)}
    assert set(chat_options.COMMON) == {field.name for field in dataclasses.fields(RunSettings)} - {"key_variable", "progress"}
    for name in set(fields) & set(defaults) - {"posts", "output", "model", "predictions", "extra_body"}:
        assert defaults[name] == fields[name].default, name
    assert set(fields) - set(defaults) == {"key_variable", "progress"}


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "a model's judgement needs --posts, --predictions, --base-url, --model, --output"),
        (["--human", "form.html"], "--human needs --posts, --predictions"),
        (["--read-human", "a.json"], "--read-human needs --key"),
        (["--read-human", "a.json", "--key", "k", "--human", "f"], "give one of them"),
        (["--read-human", "a.json", "--key", "k", "--output", "."], "is a folder"),
        (["--read-human", "a.json", "--key", "k", "--output", "./a.json"], "is one of the files to read"),
        (["--posts", "p", "--predictions", "a", "b", "--human", "b"], "--human b is one of the files to read"),
        (["--ties", "none"], "invalid choice: 'none'"),
        (["--confidence", "2"], "not above 0 and at most 1"),
        (["--sample", "0"], "not a number of 1 or more"),
    ],
)
def test_command_lines_that_cannot_be_understood(words: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        judge.main(words)
    assert ending.value.code == 2 and error in " ".join(capsys.readouterr().err.split())
