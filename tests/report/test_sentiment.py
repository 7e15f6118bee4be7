"""Invariants of sentiment scores and `dynkp evaluate --task sentiment`:

- accuracy and F1 equal scikit-learn's own, on random predictions; an output that could not be parsed is wrong, and counted;
- classification depends on the label prompt's answers only; response chains are scored for posts with a rationale, beside the
  baseline, which does not depend on the system;
- rows and posts are matched by id; missing, repeated and unknown ones are errors or, if allowed, counted;
- what is printed, written and reported is the same; options of the other task are errors.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import accuracy_score, f1_score

from dynkp import cli
from dynkp.data.reasoning_tasks import REASONING_TASKS, SENTIMENTS
from dynkp.report import chains as chains_module
from dynkp.report.chains import chain_scores, mean_scores
from dynkp.report.sentiment import SentimentEvaluation, classification_scores, labelled_posts

TASK = REASONING_TASKS["masc"]


def rationale(words: str, label: str) -> str:
    return f'"Text_analysis": "{words}"\n\n"Prediction": {label}'


POSTS = [
    {
        "id": "a",
        "text": "go cubs",
        "aspect": "cubs",
        "label": "positive",
        "rationale": rationale("they cheer them on", "positive"),
    },
    {
        "id": "b",
        "text": "cubs lose",
        "aspect": "cubs",
        "label": "negative",
        "rationale": rationale("they lost a game", "negative"),
    },
    {
        "id": "c",
        "text": "yay cubs",
        "aspect": "cubs",
        "label": "positive",
        "rationale": rationale("it is a cheer for them", "positive"),
    },
    {"id": "d", "text": "cubs play", "aspect": "cubs", "label": "neutral", "rationale": None},
]
ANSWERS = [
    {"id": "d", "prediction": None, "raw": "mixed"},
    {"id": "a", "prediction": "positive", "raw": ""},
    {"id": "c", "prediction": "neutral", "raw": ""},
    {"id": "b", "prediction": "negative", "raw": ""},
]
CHAINS = [
    {"id": "a", "raw": rationale("they cheer them on loudly", "positive")},
    {"id": "b", "raw": rationale("they lost", "positive")},
    {"id": "c", "raw": ""},
    {"id": "d", "raw": rationale("they play", "neutral")},
]


@pytest.fixture(autouse=True)
def _without_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains_module, "wordnet_reader", lambda: None)


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("seed", range(20))
def test_classification_equals_scikit_learn(seed: int) -> None:
    draw = random.Random(seed)
    classes = SENTIMENTS[: 3 - seed % 2]  # in half of the cases a class never occurs
    labels = [draw.choice(classes) for _ in range(40)]
    predictions = [draw.choice([*classes, *labels[:3], None]) for _ in labels]
    found = classification_scores(predictions, labels)
    read = ["nothing" if prediction is None else prediction for prediction in predictions]
    options: dict[str, Any] = {"labels": list(SENTIMENTS), "zero_division": 0}
    assert found["accuracy"] == accuracy_score(labels, read)
    assert found["macro_f1"] == f1_score(labels, read, average="macro", **options)
    assert found["weighted_f1"] == f1_score(labels, read, average="weighted", **options)
    assert list(found["f1"].values()) == list(f1_score(labels, read, average=None, **options))
    assert (found["posts"], found["unread"]) == (40, predictions.count(None))
    assert found["accuracy"] <= 1 - found["unread"] / 40


def test_by_hand() -> None:
    scores = classification_scores(["positive", "negative", "neutral", None], [post["label"] for post in POSTS])
    assert scores["accuracy"] == 0.5 and scores["unread"] == 1
    # positive: P 1, R 1/2; negative: 1; neutral: 0.
    assert scores["f1"] == pytest.approx({"positive": 2 / 3, "neutral": 0, "negative": 1})
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 1) / 3)
    assert scores["weighted_f1"] == pytest.approx((2 * 2 / 3 + 1) / 4)


def evaluated(**options: Any) -> SentimentEvaluation:
    evaluation = SentimentEvaluation(labelled_posts(POSTS), **options)
    evaluation.add("mine", ANSWERS, CHAINS)
    return evaluation


def test_chains_and_their_floor() -> None:
    evaluation = evaluated()
    report = evaluation.report()
    system = report["systems"]["mine"]
    assert {name: system[name] for name in ("accuracy", "unread", "missing")} == {"accuracy": 0.5, "unread": 1, "missing": 0}
    references = [post["rationale"] for post in POSTS[:3]]
    expected = mean_scores(chain_scores([CHAINS[index]["raw"] for index in range(3)], references))
    assert {name: system["chains"][name] for name in expected} == pytest.approx(expected)
    # The chains predict positive, positive, nothing, neutral.
    assert (system["chains"]["posts"], system["chains"]["accuracy"], system["chains"]["agreement"]) == (3, 0.5, 0.25)
    # Two posts are positive, and each has the other's chain as its floor; "b" is the only negative one.
    floor = mean_scores(chain_scores([references[2], references[0]], [references[0], references[2]]))
    assert report["floor"] == pytest.approx({**floor, "posts": 2, "seed": 0})
    assert "WordNet" in report["notes"][0] and "WordNet" in evaluation.caption()
    assert system["chains"]["meteor"] is None and report["floor"]["meteor"] is None
    evaluation.add("without chains", ANSWERS)
    assert evaluation.systems["without chains"].items() <= {**system, "missing": 0}.items()
    assert "chains" not in evaluation.systems["without chains"]


def test_a_post_without_chain_partner_has_no_floor() -> None:
    evaluation = SentimentEvaluation(labelled_posts(POSTS[1:2]))
    evaluation.add("mine", ANSWERS[3:], CHAINS[1:2])
    assert evaluation.report()["floor"]["posts"] == 0 and evaluation.report()["floor"]["bleu_4"] is None
    assert evaluation.tables()[1][-1][1:] == ["-"] * 8


def test_texts_are_embedded_once() -> None:
    embedded: list[str] = []

    class Lengths:
        def encode(self, texts: list[str], **_: Any) -> list[list[float]]:
            embedded.extend(texts)
            return [[len(text), 50.0] for text in texts]

    evaluation = evaluated(embedding_model=Lengths())
    evaluation.add("other", ANSWERS, CHAINS)
    scores = evaluation.report()
    assert len(embedded) == len(set(embedded)) == 6  # three references, three chains
    references = [post["rationale"] for post in POSTS[:3]]
    expected = chain_scores([row["raw"] for row in CHAINS[:3]], references, embedding_model=Lengths())
    assert scores["systems"]["other"]["chains"]["cosine"] == pytest.approx(mean_scores(expected)["cosine"])
    assert 0 < scores["floor"]["cosine"] <= 1


def test_matching() -> None:
    gold = labelled_posts(POSTS)
    for rows, message in (
        (ANSWERS[1:], "missing ids: 'd'.*--allow-missing"),
        ([*ANSWERS, {"id": "z", "prediction": None}], "unknown ids: 'z'"),
        ([*ANSWERS, ANSWERS[0]], "repeated ids: 'd'"),
        ([{**row, "decode": decode} for row in ANSWERS for decode in (0, 1)], "2 decodes of a post"),
    ):
        with pytest.raises(ValueError, match=message):
            SentimentEvaluation(gold).add("mine", rows)
    evaluation = SentimentEvaluation(gold)
    evaluation.add("mine", ANSWERS[1:], CHAINS[:3], allow_missing=True)
    system = evaluation.systems["mine"]
    assert (system["missing"], system["missing_chains"], system["unread"]) == (1, 1, 1)
    assert "mine: 1 missing predictions" in evaluation.caption()
    with pytest.raises(ValueError, match="two systems are called 'mine'"):
        evaluation.add("mine", ANSWERS)
    for posts, message in (
        ([], "no posts to score"),
        ([*POSTS, POSTS[0]], "several posts have the same id: 'a'"),
        ([{"id": "x", "label": "happy"}], "label is none of positive, neutral, negative: 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            labelled_posts(posts)
    with pytest.raises(ValueError, match="no posts to score"):
        classification_scores([], [])


def test_scikit_learn_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r"pip install 'dynkp\[scores\]'"):
        classification_scores(["positive"], ["positive"])


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [
        *("evaluate", "--task", "sentiment", "--posts", write(tmp_path / "posts.jsonl", POSTS)),
        *("--predictions", write(tmp_path / "mine.jsonl", ANSWERS)),
    ]


def test_the_command(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = ["--chains", write(tmp_path / "chains.jsonl", CHAINS)]
    out = {name: str(tmp_path / f"out.{name}") for name in ("json", "markdown", "latex", "per-post")}
    assert cli.main([*files, *written, *(word for name, file in out.items() for word in (f"--{name}", file))]) == 0
    printed = capsys.readouterr().out
    expected = evaluated()
    assert json.loads(Path(out["json"]).read_text()) == json.loads(json.dumps(expected.report()))
    assert printed == Path(out["markdown"]).read_text()
    assert "| mine   |    50.00 |    55.56 |       58.33 |" in printed
    assert "another post, same label" in printed and "METEOR needs NLTK's WordNet" in printed
    assert r"\toprule" in Path(out["latex"]).read_text()
    rows = [json.loads(line) for line in Path(out["per-post"]).read_text().splitlines()]
    assert [(row["id"], row["right"], "chain" in row) for row in rows] == [
        ("a", True, True),
        ("b", True, True),
        ("c", False, True),
        ("d", False, False),
    ]
    # Without chains, no floor is computed.
    assert cli.main([*files, "--json", out["json"]]) == 0
    assert "floor" not in json.loads(Path(out["json"]).read_text())
    assert "same label" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--convention", "aimkp"], "--convention has no meaning with --task sentiment"),
        (["--k", "1"], "--k has no meaning with --task sentiment"),
        (["--task", "keyphrases", "--chains", "x"], "--chains has no meaning with --task keyphrases"),
        (["--chains", "x", "y"], "--chains has 2 files and --predictions 1 files"),
        (["--names", "x", "y"], "--names has 2 names and --predictions 1 files"),
        (["--predictions", "CHAINS"], "an object with 'id' and 'prediction'"),
        (["--predictions", "NUMBERS"], "id 'a': 'prediction' must be a string or null, got 3"),
        (["--posts", "KEYPHRASES"], "no_label"),
    ],
)
def test_what_does_not_fit(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    other = {
        "CHAINS": write(tmp_path / "chains.jsonl", CHAINS),
        "NUMBERS": write(tmp_path / "numbers.jsonl", [{"id": "a", "prediction": 3}]),
        "KEYPHRASES": write(tmp_path / "keyphrases.jsonl", [{"id": "a", "text": "t", "keyphrases": ["x"]}]),
    }
    assert cli.main([*files, *(other.get(word, word) for word in more)]) == 2
    assert message in capsys.readouterr().err


def test_released_chains(shared: Path, tmp_path: Path) -> None:
    """The teacher's own labels on Twitter-2015: 919 of 937 are the posts' (data/README.md)."""
    posts = shared / "data/masc_t15/test.jsonl"
    rows = [json.loads(line) for line in posts.read_text(encoding="utf-8").splitlines()]
    answers = [{"id": row["id"], "prediction": TASK.parse(row["cot"]).prediction} for row in rows]
    file = write(tmp_path / "teacher.jsonl", answers)
    assert (
        cli.main(["evaluate", "--task", "sentiment", "--posts", str(posts), "--predictions", file, "--json", f"{file}.json"])
        == 0
    )
    system = json.loads(Path(f"{file}.json").read_text())["systems"]["teacher"]
    assert system["accuracy"] == 919 / 937 and system["unread"] == 0
