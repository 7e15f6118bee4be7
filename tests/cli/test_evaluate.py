"""Invariants of `dynkp evaluate`:

- its figures are the published scorers' on the released predictions of CMKP's test set, in every subset;
- predictions and posts are matched by id: their order does not matter, and missing, repeated and unknown ids are listed;
- several decodes are scored one by one and averaged; several systems are compared, and a difference that chance explains
  gets no mark;
- a file that is no predictions file is an error with file and line, never a figure.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynkp import cli, score_keyphrases

POSTS = [
    {"id": "a", "text": "my dog at the sea", "keyphrases": ["dog", "summer"]},
    {"id": "b", "text": "goal!", "keyphrases": ["mufc"]},
    {"id": "c", "text": "rain in the city", "keyphrases": ["storm hour"]},
]
ROWS = [
    {"id": "c", "keyphrases": ["sun", "storms hour"], "reasoned": True, "output_words": 30, "output_tokens": 9, "raw": "x"},
    {"id": "a", "keyphrases": ["dogs"], "reasoned": False, "output_words": 1, "output_tokens": 3, "raw": "dogs"},
    {"id": "b", "keyphrases": [], "reasoned": False, "output_words": 2, "output_tokens": 6, "raw": "; ;"},
]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def posts(tmp_path: Path) -> str:
    return write(tmp_path / "posts.jsonl", POSTS)


def evaluate(*arguments: str) -> int:
    return cli.main(["evaluate", *arguments])


def report(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    assert evaluate(*arguments, "--json", str(tmp_path / "out" / "scores.json")) == 0
    return json.loads((tmp_path / "out" / "scores.json").read_text())


@pytest.fixture(scope="module")
def released(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str, dict[str, Any]]:
    """A 2020 system's predictions of the first half of CMKP's test set, shuffled; the posts; training; reference figures."""
    folder, data = tmp_path_factory.mktemp("released"), shared / "data" / "cmkp"
    lines = [line.split("\t") for line in (data / "best_pred.txt").read_text(encoding="utf-8").splitlines()]
    rows = [{"id": post_id, "keyphrases": phrases.split(";")} for post_id, phrases in lines]
    random.Random(0).shuffle(rows)
    with (data / "test.jsonl").open(encoding="utf-8") as file:
        posts = write(folder / "posts.jsonl", [line for _, line in zip(range(2686), file, strict=False)])
    reference = json.loads((data / "reference_first_half.json").read_text())
    return write(folder / "predictions.jsonl", rows), posts, str(data / "train_keyphrases.txt"), reference


def test_the_2020_script_s_figures(released: tuple[str, str, str, dict[str, Any]], tmp_path: Path) -> None:
    predictions, posts, train, _ = released
    found = report(tmp_path, "--predictions", predictions, "--posts", posts, "--train-keyphrases", train, "--resamples", "0")
    assert found["convention"] == "cmkp"
    counts = {name: subset["posts"] for name, subset in found["subsets"].items()}
    assert counts == {"all": 2686, "present": 1138, "absent": 1745, "seen": 2656, "unseen": 43}
    figures = {"all": 46.675, "present": 82.862, "absent": 27.811, "seen": 47.660, "unseen": 0.0}
    for subset, figure in figures.items():
        assert round(100 * found["subsets"][subset]["f1@1"], 3) == figure
    assert set(found["subsets"]["all"]) >= {"posts", "phrases", "p@1", "r@1", "f1@1", "map@5", "ndcg@5"}
    aimkp = ["--predictions", predictions, "--posts", posts, "--convention", "aimkp", "--resamples", "0"]
    assert round(100 * report(tmp_path, *aimkp)["subsets"]["all"]["f1@1"], 3) == 45.422


def test_intervals_hold_the_score(released: tuple[str, str, str, dict[str, Any]], tmp_path: Path) -> None:
    predictions, posts, _, _ = released
    options = ["--resamples", "300", "--subsets", "all", "--confidence", "0.9"]
    found = report(tmp_path, "--predictions", predictions, "--posts", posts, *options)
    low, high = found["intervals"]["subsets"]["all"]["f1@1"]
    assert 0.44 < low < found["subsets"]["all"]["f1@1"] < high < 0.49
    assert found["intervals"]["confidence"] == 0.9 and list(found["subsets"]) == ["all"]
    assert report(tmp_path, "--predictions", predictions, "--posts", posts, *options) == found


def test_one_system(posts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions = write(tmp_path / "p.jsonl", ROWS)
    train = write(tmp_path / "train.txt", ["dog\n", "storm  hour\n", "\n"])
    found = report(tmp_path, "--predictions", predictions, "--posts", posts, "--train-keyphrases", train)
    lists = [["dogs"], [], ["sun", "storms hour"]]
    gold, texts = [post["keyphrases"] for post in POSTS], [post["text"] for post in POSTS]
    assert found["subsets"] == score_keyphrases(lists, gold, texts=texts, train_keyphrases=["dog", "storm hour"])
    assert (found["posts"], found["missing"], found["decodes"]) == (3, 0, 1)
    assert found["reasoning_share"] == pytest.approx(1 / 3) and found["output_words"] == 11 and found["output_tokens"] == 6
    assert found["empty_share"] == found["unparsable_share"] == pytest.approx(1 / 3)
    text = capsys.readouterr().out
    assert "convention cmkp, 3 posts" in text and "33.33 % reasoned" in text and "image" not in text
    assert len(text.splitlines()) == 9


def test_training_posts_instead_of_a_list(posts: str, tmp_path: Path) -> None:
    predictions = write(tmp_path / "p.jsonl", ROWS)
    train = write(tmp_path / "train.jsonl", [{"id": "t", "text": "x", "keyphrases": ["dog", "storm hour"]}])
    listed = write(tmp_path / "train.txt", ["dog\r\n", "storm hour"])
    common = ["--predictions", predictions, "--posts", posts, "--train-keyphrases"]
    assert report(tmp_path, *common, train) == report(tmp_path, *common, listed)


def test_decodes_are_averaged(posts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = [["summer"], ["mufc"], ["storm hour"]]
    second = [{"id": post["id"], "keyphrases": phrases, "decode": 1} for post, phrases in zip(POSTS, others, strict=True)]
    first = [{**row, "decode": 0} for row in ROWS]
    single = report(tmp_path, "--predictions", write(tmp_path / "one.jsonl", ROWS), "--posts", posts)
    alone = write(tmp_path / "two.jsonl", [{**row, "decode": 0} for row in second])
    other = report(tmp_path, "--predictions", alone, "--posts", posts)
    both = report(tmp_path, "--predictions", write(tmp_path / "both.jsonl", second + first), "--posts", posts)
    assert both["decodes"] == 2 and both["subsets_of_decodes"] == [single["subsets"], other["subsets"]]
    for measure in ("p@1", "f1@1", "map@5", "micro_f1@3"):
        for subset in ("all", "absent"):
            mean = (single["subsets"][subset][measure] + other["subsets"][subset][measure]) / 2
            assert both["subsets"][subset][measure] == pytest.approx(mean)
    assert both["subsets"]["all"]["posts"] == 3
    assert "Means over 2 decodes" in capsys.readouterr().out


def many(count: int, seed: int, accuracy: float) -> tuple[list[Any], list[Any]]:
    generator = random.Random(seed)
    posts = [{"id": str(index), "text": f"word{index % 3}", "keyphrases": [f"word{index % 3}"]} for index in range(count)]
    right = [generator.random() < accuracy for _ in posts]
    return posts, [
        {"id": post["id"], "keyphrases": post["keyphrases"] if ok else ["no"], "reasoned": ok, "output_words": 4}
        for post, ok in zip(posts, right, strict=True)
    ]


def test_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gold, base = many(300, 1, 0.5)
    files = [write(tmp_path / f"{name}.jsonl", rows) for name, rows in (("base", base), ("alike", many(300, 2, 0.51)[1]))]
    files.append(write(tmp_path / "bet_ter.jsonl", many(300, 3, 0.8)[1]))
    posts = write(tmp_path / "posts.jsonl", gold)
    outputs = [str(tmp_path / "t" / name) for name in ("t.md", "t.tex", "posts.jsonl")]
    flags = ["--resamples", "500", "--markdown", outputs[0], "--latex", outputs[1], "--per-post", outputs[2]]
    found = report(tmp_path, "--predictions", *files, "--posts", posts, *flags)
    assert list(found) == ["convention", "systems", "comparisons"] and list(found["systems"]) == ["base", "alike", "bet_ter"]
    rows = {(row["second"], row["subset"], row["measure"]): row for row in found["comparisons"]}
    better, alike = rows["bet_ter", "all", "f1@1"], rows["alike", "all", "f1@1"]
    scores = {name: system["subsets"]["all"]["f1@1"] for name, system in found["systems"].items()}
    assert better["difference"] == pytest.approx(scores["bet_ter"] - scores["base"])
    assert better["low"] <= better["difference"] <= better["high"]
    assert better["permutation_p"] < 0.01 > better["bootstrap_p"] and alike["permutation_p"] > 0.05
    assert ("alike", "absent", "f1@1") not in rows  # there is no absent keyphrase
    printed = capsys.readouterr().out
    assert Path(outputs[0]).read_text() == printed
    line = next(line for line in printed.splitlines() if line.startswith("| bet_ter"))
    assert f"{100 * scores['bet_ter']:.2f}‡" in line
    assert "†" not in next(line for line in printed.splitlines() if line.startswith("| alike"))
    latex = Path(outputs[1]).read_text()
    assert r"bet\_ter &" in latex and r"$^\ddagger$" in latex and latex.count(r"\begin{tabular}") == 2
    per_post = [json.loads(row) for row in Path(outputs[2]).read_text().splitlines()]
    assert len(per_post) == 900 and [row["system"] for row in per_post[:3]] == ["base", "alike", "bet_ter"]
    hits = [row["scores"]["all"]["p@1"] for row in per_post if row["system"] == "base"]
    assert np.mean(hits) == pytest.approx(scores["base"])


def test_equal_systems_have_no_mark(posts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "p.jsonl", ROWS)
    found = report(tmp_path, "--predictions", file, file, "--names", "one", "two", "--posts", posts, "--resamples", "200")
    assert {row["permutation_p"] for row in found["comparisons"]} == {1.0}
    assert "‡" not in capsys.readouterr().out.split("Percent")[0]


def test_ids_that_do_not_match_are_listed(posts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [ROWS[1], ROWS[1], {"id": "z", "keyphrases": ["x"]}, {"id": "y", "keyphrases": []}]
    file = write(tmp_path / "p.jsonl", rows)
    assert evaluate("--predictions", file, "--posts", posts) == 2
    error = capsys.readouterr().err
    assert file in error
    for part in ("repeated ids: 'a'", "unknown ids: 'z', 'y'", "missing ids: 'b', 'c'"):
        assert part in error
    assert evaluate("--predictions", file, "--posts", posts, "--allow-missing") == 2  # the rest is still wrong
    assert "missing" not in capsys.readouterr().err


def test_missing_may_be_allowed(posts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "p.jsonl", ROWS[:2])
    found = report(tmp_path, "--predictions", file, "--posts", posts, "--allow-missing")
    assert found["missing"] == 1 and found["subsets"]["all"]["posts"] == 3
    assert found["reasoning_share"] == 0.5  # of the outputs there are
    assert "1 missing predictions are scored as empty" in capsys.readouterr().out
    empty = report(tmp_path, "--predictions", write(tmp_path / "none.jsonl", []), "--posts", posts, "--allow-missing")
    assert empty["missing"] == 3 and empty["subsets"]["all"]["f1@1"] == 0


def test_an_id_may_be_a_number(tmp_path: Path) -> None:
    posts = write(tmp_path / "posts.jsonl", [{"id": 7, "text": "x", "keyphrases": ["dog"]}])
    file = write(tmp_path / "p.jsonl", [{"id": 7, "keyphrases": ["dog"]}])
    assert report(tmp_path, "--predictions", file, "--posts", posts)["subsets"]["all"]["f1@1"] == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a", "keyphrases": ["dog"]', "line 2: not valid JSON"),
        ('{"id": "a", "keyphra', "the line is torn"),
        ("[]\n", "line 2: a prediction must be an object with 'id' and 'keyphrases'"),
        ('{"id": "a"}\n', "line 2: a prediction must be an object"),
        ('{"id": null, "keyphrases": []}\n', "line 2: 'id' must be a string"),
        ('{"id": "a", "keyphrases": "dog; cat"}\n', "'keyphrases' must be a list of strings, got 'dog; cat'"),
        ('{"id": "a", "keyphrases": ["dog", null]}\n', "'keyphrases' must be a list of strings"),
        ('{"id": "a", "keyphrases": NaN}\n', "'keyphrases' must be a list of strings, got nan"),
        ('{"id": "a", "keyphrases": [], "decode": "first"}\n', "'decode' must be a whole number"),
        ('{"id": "a", "keyphrases": [], "output_words": NaN}\n', "'output_words' must be a number, got nan"),
        ("[" * 100_000 + "\n", "line 2: not usable JSON"),
    ],
)
def test_lines_that_are_no_predictions(
    posts: str, tmp_path: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "p.jsonl", [ROWS[2], line])
    assert evaluate("--predictions", file, "--posts", posts) == 2
    error = capsys.readouterr().err
    assert message in error and "p.jsonl, line 2" in error and len(error) < 600


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--subsets", "all", "unseen"], "'unseen' needs train_keyphrases"),
        (["--subsets", "rare"], "subsets: 'rare' is not known"),
        (["--confidence", "95"], "confidence=95.0 must be between 0 and 1"),
        (["--resamples", "-1"], "resamples=-1 must be 0"),
        (["--k", "0"], "every cut-off must be an integer of at least 1"),
        (["--names", "a", "b"], "--names has 2 names and --predictions 1 files"),
        (["--train-keyphrases", "EMPTY"], "has no keyphrases"),
        (["--train-keyphrases", "/nowhere.txt"], "/nowhere.txt"),
        (["--posts", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--posts", "BLANK"], "post 'x': empty_keyphrase"),
        (["--posts", "BARE"], "post 'y': empty_keyphrase"),
    ],
)
def test_errors_name_what_is_wrong(
    posts: str, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = [{"id": "x", "text": "t", "keyphrases": []}, {"id": "y", "text": "t", "keyphrases": ["  "]}, POSTS[0]]
    files = {"EMPTY": write(tmp_path / "empty.txt", ["\n\n"]), "BARE": write(tmp_path / "bare.jsonl", bare)}
    files["BLANK"] = write(tmp_path / "blank.jsonl", [{"id": "x", "text": "t", "keyphrases": ["dog", " "]}, POSTS[0]])
    file = write(tmp_path / "p.jsonl", ROWS)
    assert evaluate("--predictions", file, "--posts", posts, *[files.get(word, word) for word in more]) == 2
    assert message in capsys.readouterr().err


def test_figures_may_go_into_a_pipe(posts: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    file = write(tmp_path / "p.jsonl", ROWS)
    assert evaluate("--predictions", file, "--posts", posts, "--resamples", "0", "--json", str(tmp_path / "pipe")) == 0
    assert json.loads(os.read(reader, 1 << 16))["posts"] == len(POSTS)
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_crossed_subsets(posts: str, tmp_path: Path) -> None:
    train = write(tmp_path / "train.txt", ["dog\n"])
    common = ["--predictions", write(tmp_path / "p.jsonl", ROWS), "--posts", posts, "--train-keyphrases", train]
    found = report(tmp_path, *common, "--subsets", "present&seen", "absent&unseen")
    assert {name: subset["posts"] for name, subset in found["subsets"].items()} == {"present&seen": 1, "absent&unseen": 3}
